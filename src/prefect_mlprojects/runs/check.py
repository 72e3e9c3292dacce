"""Checks a run request against its project: everything that can be known before something is built or sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_mlprojects.backends import select_backend
from prefect_mlprojects.backends.contract import Backend, BackendCall, PreparingBackend
from prefect_mlprojects.environments.detection import choose_manager
from prefect_mlprojects.runs.request import RunRequest
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
