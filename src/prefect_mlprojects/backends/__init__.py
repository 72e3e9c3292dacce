"""Backends: where a project's command runs."""

from prefect_mlprojects.backends.registry import available_backends, get_backend, select_backend

__all__ = ["available_backends", "get_backend", "select_backend"]
