"""A call of a project: as it was made (the flow parameters of ``run_project``), and as it was found to be right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import ParameterError, Problem

FLOW_NAME = "run_project"
"""The name of the flow that runs projects."""

PROJECT_SCHEME = "block://"
"""``block://NAME`` as a project's URI stands for what the block of that name holds."""


@dataclass(frozen=True)
class RunRequest:
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
        git_credentials: The name of a git-credentials block; None looks for one by the repository's host.
        tracking: The name of an mlflow-tracking-server block; None tracks as this process does.
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
    git_credentials: str | None = None
    tracking: str | None = None

    def with_form(self, extra_parameters: Mapping[str, Any] | None, options: Mapping[str, Any] | None) -> RunRequest:
        """Returns the call with what the form of a deployment keeps apart.

        Args:
            extra_parameters: Further values by parameter name.
            options: Fields of this class by name, in place of the call's own; what is None is left alone.

        Raises:
            ParameterError: There is no such option; all of them at once.
        """
        given = {name: value for name, value in (options or {}).items() if value is not None}
        known = {each.name for each in fields(self)} - {"uri", "entry_point", "parameters"}
        unknown = [name for name in given if name not in known]
        if unknown:
            problems = [
                Problem(
                    f"there is no run option {name!r}",
                    parameter=name,
                    fix=f"did you mean {near!r}?" if (near := nearest(name, known)) else None,
                )
                for name in unknown
            ]
            raise ParameterError("The run's options do not fit", problems)
        parameters = {**(self.parameters or {}), **(extra_parameters or {})}
        return replace(self, **given, parameters=parameters or None)

    def with_project(self, project: Mapping[str, Any]) -> RunRequest:
        """Returns the call with what a project block holds: the call's own values win over the block's defaults.

        Args:
            project: ``uri``, ``version``, ``entry_point``, ``parameters`` and ``options``.

        Raises:
            ParameterError: The block has an option that there is not.
        """
        initial = RunRequest(uri=self.uri)
        options = {
            name: value
            for name, value in (project.get("options") or {}).items()
            if getattr(self, name, None) == getattr(initial, name, None)
        }
        named = replace(
            self,
            uri=str(project["uri"]),
            version=self.version or project.get("version"),
            entry_point=project.get("entry_point") or "main" if self.entry_point == "main" else self.entry_point,
            parameters={**(project.get("parameters") or {}), **(self.parameters or {})},
        )
        return named.with_form(None, options)

    def flow_parameters(self) -> dict[str, Any]:
        """Returns the parameters for the flow ``run_project``."""
        return asdict(self)
