"""A double of a Kubernetes cluster: an API server over HTTP, its controllers and one node; see ``server.py`` for its limits."""

from .server import KubernetesDouble

__all__ = ["KubernetesDouble"]
