"""Prefect blocks: credentials, projects and configurations of backends, stored once and used by name.

The entry point group ``prefect.collections`` loads this package when a Prefect server starts, which registers the types.
"""

from prefect_mlprojects.blocks.configurations import (
    DatabricksBackendBlock,
    KubernetesJobDefaults,
    MLflowProject,
    MLprojectBackend,
)
from prefect_mlprojects.blocks.credentials import (
    DatabricksWorkspace,
    DockerEngine,
    DockerRegistry,
    GitCredentialsBlock,
    KubernetesCluster,
    MLflowTrackingServer,
)

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
