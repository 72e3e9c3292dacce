"""A call of a project: as it was made (the flow parameters of ``run_project``), and as it was found to be right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.backends import select_backend
from prefect_mlprojects.backends.contract import Backend, BackendCall, PreparingBackend
from prefect_mlprojects.environments.detection import choose_manager
from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.sources.git.credentials import GitCredentialsLookup
from prefect_mlprojects.spec import (
    CheckedParameters,
    EntryPoint,
    Project,
    check_parameters,
    find_entry_point,
    load_project,
    spark_job_entry_point,
)
from prefect_mlprojects.types import BackendConfig, EnvironmentManagerName

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


@dataclass(frozen=True)
class CallContext:
    """What belongs to a call but must not be stored with it, or is not known when it is made.

    Attributes:
        config: The backend's configuration, validated, with what it names in blocks.
        tracking_uri: The absolute tracking URI; it may hold a password.
        docker_auth: Credentials for the image registry.
        git_credentials: Finds the credentials that the project is fetched with.
        config_is_known: Whether the configuration is whole; not where it stands in a block that was not read yet. The backend
            is then asked about the call only when it is.
    """

    config: BackendConfig = field(default_factory=dict, repr=False)
    tracking_uri: str = field(default="", repr=False)
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    git_credentials: GitCredentialsLookup | None = field(default=None, repr=False, compare=False)
    config_is_known: bool = True


def context_before_run(call: RunRequest, tracking_uri: str) -> CallContext:
    """Returns what belongs to a call before it runs, when no block has been read yet.

    Args:
        call: The call.
        tracking_uri: The absolute tracking URI.
    """
    config = call.backend_config if isinstance(call.backend_config, Mapping) else {}
    return CallContext(config, tracking_uri, config_is_known=not isinstance(call.backend_config, str))


@dataclass(frozen=True)
class CheckedCall:
    """A call whose project, entry point, parameters, backend and environment fit together.

    Attributes:
        project: The project.
        entry_point: The entry point.
        parameters: The values, defaults filled in.
        backend: The backend that runs it.
        env_manager: The environment manager that makes its environment; None when the backend does that itself.
        backend_call: What the backend knows of it.
    """

    project: Project
    entry_point: EntryPoint
    parameters: CheckedParameters
    backend: Backend
    env_manager: EnvironmentManagerName | None
    backend_call: BackendCall

    @property
    def environment_kind(self) -> str:
        """The kind of its environment for MLflow's tag ``mlflow.project.env``."""
        return self.backend.environment_kind if isinstance(self.backend, PreparingBackend) else (self.env_manager or "")


def check_call(call: RunRequest, working_copy: WorkingCopy, context: CallContext) -> CheckedCall:
    """Checks a call against its project; pure reading, no network, nothing built.

    Args:
        call: The call.
        working_copy: The project's files.
        context: What else belongs to the call.

    Raises:
        ProjectSpecError: The project file is malformed, or there is no such entry point.
        ParameterError: Parameters are missing or not of their type; all of them at once.
        BackendError: The backend is unknown or can't run the project.
        EnvironmentBuildError: The environment manager is unknown or does not fit the project.
    """
    project = load_project(working_copy.directory)
    entry_point = spark_job_entry_point(project, call.entry_point) if call.backend == "databricks" else None
    entry_point = entry_point or find_entry_point(project, call.entry_point)
    parameters = check_parameters(entry_point, call.parameters)
    backend = select_backend(call.backend, project, call.docker_args)
    backend_call = BackendCall(
        project=project,
        entry_point=entry_point,
        parameters=parameters,
        working_copy=working_copy,
        config=context.config,
        tracking_uri=context.tracking_uri,
        docker_args=call.docker_args,
        docker_auth=context.docker_auth,
        build_image=call.build_image,
        env_manager=call.env_manager,
        version=call.version,
        git_credentials=context.git_credentials,
    )
    env_manager: EnvironmentManagerName | None = None
    if isinstance(backend, PreparingBackend):
        if context.config_is_known:
            backend.check(backend_call)
    else:
        env_manager = choose_manager(project, call.env_manager)
    return CheckedCall(project, entry_point, parameters, backend, env_manager, backend_call)


def place_paths(
    checked: CheckedCall, parameters: CheckedParameters, backend: PreparingBackend
) -> tuple[CheckedParameters, dict[str, str]]:
    """Gives ``path`` parameters the values that they have where the command runs.

    Args:
        checked: The checked call.
        parameters: Its values, with what was downloaded.
        backend: The backend that runs it.

    Returns:
        The values for the command, and by each value's name here what the command calls it.

    Raises:
        BackendError: A value can't be reached from where the command runs.
    """
    declared = checked.entry_point.parameters
    here = {name: text for name, text in parameters.declared.items() if declared[name].type == "path"}
    here |= parameters.downloads
    placed = dict(backend.place_paths(checked.backend_call, here)) if here else {}
    return parameters.with_downloads(placed), {here[name]: there for name, there in placed.items()}
