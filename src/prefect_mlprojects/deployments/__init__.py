"""Deployments: projects that Prefect schedules, and starts from a typed form in its UI."""

from prefect_mlprojects.deployments.creation import Deployment, deploy
from prefect_mlprojects.deployments.serving import serve

__all__ = ["Deployment", "deploy", "serve"]
