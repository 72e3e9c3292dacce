"""The flow parameters of ``run_project`` as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ProjectCall:
    """A call of a project: plain JSON, no secrets; the fields mean what they mean to ``run()``.

    Attributes:
        uri: The project's URI.
        entry_point: The entry point's name.
        version: The version of a git project.
        parameters: Values by parameter name.
        docker_args: Arguments for the container.
        experiment_name: The MLflow experiment by name.
        experiment_id: The MLflow experiment by id.
        backend: The backend's name.
        backend_config: The backend's configuration.
        storage_dir: Where remote ``path`` parameters are downloaded to.
        run_id: The MLflow run to go on with.
        run_name: The MLflow run's name.
        env_manager: The environment manager; None chooses by the project.
        build_image: Whether an image is built for the project.
        timeout: Seconds that the command may take; None for no limit.
        retries: How often a failed command is tried again.
    """

    uri: str
    entry_point: str = "main"
    version: str | None = None
    parameters: Mapping[str, Any] | None = None
    docker_args: Mapping[str, Any] | None = None
    experiment_name: str | None = None
    experiment_id: str | None = None
    backend: str = "local"
    backend_config: Mapping[str, Any] | str | None = None
    storage_dir: str | None = None
    run_id: str | None = None
    run_name: str | None = None
    env_manager: str | None = None
    build_image: bool = False
    timeout: float | None = None
    retries: int = 0

    def flow_parameters(self) -> dict[str, Any]:
        """Returns the parameters for the flow ``run_project``."""
        return asdict(self)
