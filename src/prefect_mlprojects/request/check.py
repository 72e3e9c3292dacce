"""Checks a run request against its project, before anything is built or sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends import get_backend, select_backend
from prefect_mlprojects.backends.contract import AnyBackend, AnyRequest, BackendRequest
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.sources.git import GitCredentialsLookup
from prefect_mlprojects.spec import (
    CheckedParameters,
    EntryPoint,
    Project,
    check_call,
)

# Run options for backends that create the MLflow run themselves.
_PASSED_ON = ("experiment_name", "experiment_id", "run_name", "storage_dir")


@dataclass(frozen=True)
class RunSecrets:
    """The secret arguments of a run, which stay in memory.

    Attributes:
        uri: The project's URI if it holds a secret, which the flow run's parameters have without.
        backend_config: The secret keys of the backend's configuration.
        docker_args: The container arguments that hold secrets, in place of the request's.
    """

    uri: Secret | None = None
    backend_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    docker_args: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def names(self) -> list[str]:
        """Returns the run options that hold them, with the keys."""
        return [
            *(["uri"] if self.uri is not None else []),
            *(f"backend_config {key}" for key in self.backend_config),
            *(f"docker_args {key}" for key in self.docker_args),
            *(["docker_auth"] if self.docker_auth else []),
        ]


@dataclass(frozen=True)
class RunContext:
    """Data of a run that is never stored with the flow run; `config` is None until its block is read."""

    config: BaseModel | None = field(default=None, repr=False)
    tracking_uri: Secret = field(default=Secret(""), repr=False)
    secrets: RunSecrets = field(default_factory=RunSecrets, repr=False)
    git_credentials: GitCredentialsLookup | None = field(default=None, repr=False, compare=False)
    rebuild_environment: bool = False


def context_before_run(request: RunRequest, tracking_uri: Secret, secrets: RunSecrets) -> RunContext:
    """Returns the context of a run without a flow run: blocks are not read.

    Raises:
        BackendError: The backend is unknown, or its configuration is malformed.
    """
    config = request.backend_config
    if isinstance(config, str):
        return RunContext(None, tracking_uri, secrets)
    parsed = get_backend(request.backend).parse_config({**(config or {}), **secrets.backend_config})
    return RunContext(parsed, tracking_uri, secrets)


@dataclass(frozen=True)
class CheckedRun:
    """A run request whose project, entry point, parameters, backend and environment fit together."""

    project: Project
    entry_point: EntryPoint
    parameters: CheckedParameters
    backend: AnyBackend
    backend_request: AnyRequest

    @property
    def name(self) -> str:
        """The flow run's name: ``<project>/<entry_point>``."""
        return f"{self.project.display_name}/{self.entry_point.name}"

    @property
    def environment_kind(self) -> str:
        """The value of MLflow's tag ``mlflow.project.env``."""
        return self.backend.environment_kind(self.backend_request)


def check_request(request: RunRequest, working_copy: WorkingCopy, context: RunContext) -> CheckedRun:
    """Checks a run request against its project; only reads files.

    Raises:
        ProjectSpecError: The project file or the entry point is missing or malformed; with the problems of the parameters.
        ParameterError: Parameters are missing or of the wrong type.
        BackendError: The backend is unknown or can't run the project.
        EnvironmentBuildError: The environment manager is unknown or does not fit the project.
    """
    project, entry_point, parameters = check_call(
        working_copy.directory,
        request.entry_point,
        request.parameters,
        working_copy.uri,
        spark_job=request.backend == "databricks",
    )
    project = replace(project, temporary=working_copy.temporary)
    docker_args = {**(request.docker_args or {}), **context.secrets.docker_args} or None
    backend = select_backend(request.backend, project, docker_args)
    config = context.config
    backend_request: AnyRequest = BackendRequest(
        project=project,
        entry_point=entry_point,
        parameters=parameters,
        working_copy=working_copy,
        config=config if config is not None else backend.config_model.model_construct(),
        tracking_uri=context.tracking_uri,
        docker_args=docker_args,
        docker_auth=context.secrets.docker_auth,
        build_image=request.build_image,
        env_manager=request.env_manager,
        rebuild_environment=context.rebuild_environment,
        version=request.version,
        git_credentials=context.git_credentials,
        run_options={name: getattr(request, name) for name in _PASSED_ON},
    )
    checked = CheckedRun(project, entry_point, parameters, backend, backend_request)
    if config is not None:
        backend.check(backend_request)
    else:
        # Also fails for an environment manager that does not fit.
        backend.environment_kind(backend_request)
    return checked


def map_paths(checked: CheckedRun, parameters: CheckedParameters) -> tuple[CheckedParameters, dict[str, str]]:
    """Returns the parameters with ``path`` values as the backend's command sees them, and those paths by their local ones.

    Raises:
        BackendError: The command can't reach a path.
    """
    declared = checked.entry_point.parameters
    here = {name: text for name, text in parameters.declared.items() if declared[name].type == "path"}
    here |= parameters.downloads
    there = dict(checked.backend.map_paths(checked.backend_request, here)) if here else {}
    return parameters.with_downloads(there), {here[name]: path for name, path in there.items()}
