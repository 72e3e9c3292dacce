"""Kubeconfigs for the servers of the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def make_kubeconfig(cluster: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a kubeconfig with one context; what has no value is left out.

    Args:
        cluster: Where the server is: ``server``, ``certificate-authority-data`` …
        user: The way in: ``token``, ``client-key-data`` …
    """
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "tests",
        "clusters": [{"name": "tests", "cluster": {key: value for key, value in cluster.items() if value}}],
        "users": [{"name": "tests", "user": {key: value for key, value in user.items() if value}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
    }
