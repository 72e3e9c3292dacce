"""Checks a run request against its project, before anything is built or sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefect_mlprojects._support.redaction import SECRET_NAME
from prefect_mlprojects._support.secrets import MASK, Secret, Withheld, reveal, secrets_in
from prefect_mlprojects.backends import get_backend, select_backend
from prefect_mlprojects.backends.contract import AnyBackend, AnyRequest, BackendRequest
from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.request.policy import Policy
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.sources.git import GitCredentialsLookup
from prefect_mlprojects.spec import (
    CheckedParameters,
    EntryPoint,
    Project,
    check_call,
)
from prefect_mlprojects.spec.secrets import REFERENCE_HELP, databricks_place

# Run options for backends that create the MLflow run themselves.
_PASSED_ON = ("experiment_name", "experiment_id", "run_name", "storage_dir")


@dataclass(frozen=True)
class RunSecrets:
    """The secret arguments of a run, which stay in memory.

    Attributes:
        uri: The project's URI if it holds a secret, which the flow run's parameters have without.
        backend_config: The secret keys of the backend's configuration.
        docker_args: The container arguments that hold secrets, in place of the request's.
        parameters: Parameter values that may not be stored, in place of the request's: `Withheld` ones are secret only if the
            project declares so.
    """

    uri: Secret | None = None
    backend_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    docker_args: Mapping[str, Any] = field(default_factory=dict, repr=False)
    parameters: Mapping[str, Secret] = field(default_factory=dict, repr=False)

    def known(self) -> list[Secret]:
        """Returns those that are redacted in texts: not the user's name in `docker_auth`."""
        auth = {name: each for name, each in (self.docker_auth or {}).items() if SECRET_NAME.search(name)}
        variables = [
            type(each)(reveal(each).partition("=")[2] or reveal(each)) for each in secrets_in(dict(self.docker_args))
        ]
        return [*secrets_in([self.uri, self.backend_config, auth, self.parameters]), *variables]

    def missing(self, request: RunRequest) -> list[str]:
        """Returns the request's values that were kept in memory by the process that started it, and are not here."""
        stored = {
            "uri": (request.uri, self.uri is not None),
            **{
                f"parameters: {name}": (value, name in self.parameters)
                for name, value in (request.parameters or {}).items()
            },
            **{
                f"docker_args: {name}": (value, name in self.docker_args)
                for name, value in (request.docker_args or {}).items()
            },
        }
        if isinstance(request.backend_config, Mapping):
            stored |= {
                f"backend_config: {name}": (value, name in self.backend_config)
                for name, value in request.backend_config.items()
            }
        return [name for name, (value, known) in stored.items() if not known and _has_mask(value)]


def _has_mask(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_mask, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_mask, value))
    return isinstance(value, str) and MASK in value


@dataclass(frozen=True)
class RunContext:
    """Data of a run that is never stored with the flow run; `config` is None until its block is read."""

    config: BaseModel | None = field(default=None, repr=False)
    tracking_uri: Secret = field(default=Secret(""), repr=False)
    secrets: RunSecrets = field(default_factory=RunSecrets, repr=False)
    git_credentials: GitCredentialsLookup | None = field(default=None, repr=False, compare=False)
    rebuild_environment: bool = False
    policies: tuple[Policy, ...] = ()
    resolve_secret: Callable[[str, Secret], Secret] = field(default=lambda _, value: value, repr=False, compare=False)


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
    kept = context.secrets.parameters
    project, entry_point, parameters = check_call(
        working_copy.directory,
        request.entry_point,
        {**(request.parameters or {}), **{name: reveal(value) for name, value in kept.items()}},
        working_copy.uri,
        spark_job=request.backend == "databricks",
        root=working_copy.root,
        hidden=[name for name, value in kept.items() if not isinstance(value, Withheld)],
    )
    if request.backend != "databricks":
        refuse_foreign_references(parameters.secrets)
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
    _check_defaults(checked, request.parameters or {})
    if config is not None:
        backend.check(backend_request)
    else:
        # Also fails for an environment manager that does not fit.
        backend.environment_kind(backend_request)
    for policy in context.policies:
        in_container = backend.name == "local" and checked.environment_kind == "docker"
        policy.check_demands("docker" if in_container else request.backend, backend.demands(backend_request))
    return checked


# fsspec's protocols that read files of this machine; "::" chains protocols.
_LOCAL_PROTOCOLS = ("local:", "git:", "memory:", "reference:")


def _may_be_sent(checked: CheckedRun, name: str, text: str) -> bool:
    if name in checked.parameters.downloads:
        is_local = text.lower().startswith(_LOCAL_PROTOCOLS) or "::" in text
        return not is_local or checked.project.root is None
    return checked.project.allows(Path(text))


def _check_defaults(checked: CheckedRun, given: Mapping[str, Any]) -> None:
    """Raises a `ParameterError` for defaults by which a fetched project would get this machine's files sent or mounted."""
    if checked.backend.runs_here:
        return
    problems = [
        Problem(
            f"the default of parameter {name!r}, {text!r}, is outside of the project's files",
            file=checked.project.file,
            line=checked.entry_point.parameters[name].line,
            fix=f"give {name}=VALUE",
            parameter=name,
        )
        for name, text in checked.parameters.declared.items()
        if given.get(name) is None
        and checked.entry_point.parameters[name].type == "path"
        and not _may_be_sent(checked, name, text)
    ]
    if problems:
        raise ParameterError(f"Parameters of entry point '{checked.entry_point.name}' do not fit", problems)


def refuse_foreign_references(secrets: Mapping[str, Secret]) -> None:
    """Raises `ParameterError` for references to Databricks secrets, which no other backend can read."""
    problem = "parameter '{}' refers to a Databricks secret, which only the databricks backend reads"
    if names := [name for name, value in secrets.items() if databricks_place(reveal(value))]:
        fix = f"give {REFERENCE_HELP}"
        problems = [Problem(problem.format(name), parameter=name, fix=fix) for name in names]
        raise ParameterError("Secret parameters do not fit the backend", problems)


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
