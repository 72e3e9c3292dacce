"""Prefect blocks: credentials and configurations that a deployment names and nobody sees.

The entry point group ``prefect.collections`` loads this package where a Prefect server starts, which registers the blocks.
"""

from prefect_mlprojects.blocks.backend import MLprojectBackend
from prefect_mlprojects.blocks.databricks import DatabricksBackendBlock, DatabricksWorkspace
from prefect_mlprojects.blocks.docker import DockerEngine, DockerRegistry
from prefect_mlprojects.blocks.git import GitCredentialsBlock
from prefect_mlprojects.blocks.kubernetes import KubernetesCluster, KubernetesJobDefaults
from prefect_mlprojects.blocks.project import MLflowProject
from prefect_mlprojects.blocks.tracking import MLflowTrackingServer

__all__ = [
    "DatabricksBackendBlock",
    "DatabricksWorkspace",
    "DockerEngine",
    "DockerRegistry",
    "GitCredentialsBlock",
    "KubernetesCluster",
    "KubernetesJobDefaults",
    "MLflowProject",
    "MLflowTrackingServer",
    "MLprojectBackend",
]
