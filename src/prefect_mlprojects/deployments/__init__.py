"""Deployments: projects that Prefect runs on a schedule or from a typed form in its UI."""

from prefect_mlprojects.deployments.creation import Deployment, deploy, serve

__all__ = ["Deployment", "deploy", "serve"]
