"""Starts a run: ``run()`` and ``mlprojects run`` share this way, and differ in what they show."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.redaction import holds_secret, strip_user_info
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends import get_backend
from prefect_mlprojects.backends.configuration import is_block_reference, load_backend_config, split_config
from prefect_mlprojects.exceptions import BackendError, ParameterError, Problem
from prefect_mlprojects.runs.check import check_request, context_before_run
from prefect_mlprojects.runs.request import (
    OPTIONS,
    PROJECT_SCHEME,
    RunRequest,
    holds_secret_url,
)
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from prefect_mlprojects.runs.handles import LocalSubmittedRun
    from prefect_mlprojects.tasks.session import RunSession


@dataclass(frozen=True)
class RunSecrets:
    """What of a caller's arguments is secret: it stays in memory, apart from the request that Prefect stores.

    Attributes:
        uri: The project's URI when it holds a password or token.
        backend_config: The keys of the backend's configuration that hold secrets.
        docker_auth: Credentials for the image registry.
    """

    uri: Secret | None = None
    backend_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)


def make_request(arguments: Mapping[str, Any]) -> tuple[RunRequest, RunSecrets]:
    """Checks run options without looking at the project, and separates what may be stored from what is secret.

    Args:
        arguments: Values by the names of ``run()``; missing ones have their defaults, unknown ones are ignored.

    Raises:
        ParameterError: Options contradict each other or are out of bounds; all of them at once.
        BackendError: The backend is unknown, or its configuration is malformed.
    """
    given = {name: arguments.get(name, option.default) for name, option in OPTIONS.items()}
    problems = [problem for name, option in OPTIONS.items() if (problem := option.problem(given[name]))]
    if given["experiment_name"] and given["experiment_id"] is not None:
        problems.insert(0, Problem("give only one of experiment_name and experiment_id", parameter="experiment_id"))
    uri = str(given["uri"])
    if not uri.strip():
        problems.append(Problem("the project's URI is empty", parameter="uri"))
    if problems:
        raise ParameterError("The run options are not valid", problems)
    config, config_secrets = separate_config(given["backend"], given["backend_config"])
    secret_uri = Secret(uri) if holds_secret(uri) else None
    given |= {
        "uri": strip_user_info(uri) if secret_uri else uri,
        # What Prefect stores is what a form could have sent: numbers and text; a path becomes text here.
        "parameters": {str(key): _plain(value) for key, value in (given["parameters"] or {}).items()},
        "docker_args": dict(given["docker_args"]) if given["docker_args"] else None,
        "experiment_id": None if given["experiment_id"] is None else str(given["experiment_id"]),
        "backend_config": config,
        "storage_dir": _absolute(given["storage_dir"]),
    }
    auth = arguments.get("docker_auth")
    docker_auth = (
        {str(key): Secret(value) if isinstance(value, str) else value for key, value in auth.items()} if auth else None
    )
    return RunRequest(**given), RunSecrets(secret_uri, config_secrets, docker_auth)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _absolute(folder: str | Path | None) -> str | None:
    return None if folder is None else str(Path(folder).expanduser().absolute())


def separate_config(
    backend: str, config: Mapping[str, Any] | str | None
) -> tuple[Mapping[str, Any] | str, Mapping[str, Any]]:
    """Divides a backend's configuration into what may be stored with a flow run and what must stay in memory.

    The name of a block is returned as it is: the block is read when the flow runs.

    Raises:
        BackendError: The backend is unknown, the configuration is malformed, or a file or text holds secrets.
    """
    chosen = get_backend(backend)
    if isinstance(config, str) and is_block_reference(config):
        return config, {}
    loaded = load_backend_config(config, backend=backend)
    public, secrets = split_config(chosen.parse_config(loaded))
    secrets |= {name: value for name, value in public.items() if holds_secret_url(value)}
    if secrets and not isinstance(config, Mapping):
        raise stored_secrets(backend, secrets)
    return {name: value for name, value in public.items() if name not in secrets}, secrets


def stored_secrets(backend: str, names: Mapping[str, Any]) -> BackendError:
    """Returns the error for a configuration whose secrets would be stored on the Prefect server."""
    return BackendError(
        f"The configuration of the {backend} backend holds secrets ({', '.join(names)}), which would be stored on the Prefect "
        "server. Keep them in a block and give its name here, or give the configuration to run() as a dictionary.",
        backend=backend,
    )


def preflight(request: RunRequest, secrets: RunSecrets) -> str | None:
    """Checks a request before a flow run exists, where that needs no network: for a project in a folder.

    Returns:
        The flow run's name; None when the project has to be fetched to know it.

    Raises:
        ExecutionException: The project, the entry point, the parameters or the environment manager do not fit.
    """
    if request.uri.startswith(PROJECT_SCHEME):
        return None
    source = detect_source(request.uri, request.version)
    if source.kind != "local":
        return None
    copy = source.fetch(StopSignal(), lambda _: None)
    from prefect_mlprojects.tracking import resolve_tracking_uri

    context = context_before_run(request, resolve_tracking_uri(), secrets.backend_config)
    return check_request(request, copy, context).name


def start(
    request: RunRequest,
    secrets: RunSecrets,
    session: RunSession,
    name: str | None,
    *,
    announce: Callable[[str], None] | None = None,
    own_process: bool = False,
) -> LocalSubmittedRun:
    """Starts a request's flow run in this process, on the server of the enclosing flow, or the configured or embedded one.

    Args:
        request: The request.
        secrets: Its secrets.
        session: What the caller shows the run with; receives all else that the run needs in memory.
        name: The flow run's name, when it is known.
        announce: Receives lines about a server that is being started; None prints them to stderr.
        own_process: Whether this process serves this run only: Prefect's settings and console may be changed.

    Raises:
        PrefectServerError: No Prefect server could be reached or started.
    """
    from prefect_mlprojects.tracking import active_run_id, resolve_tracking_uri

    session.tracking_uri = resolve_tracking_uri()
    session.parent_run_id = None if request.run_id else active_run_id()
    session.project_uri = secrets.uri
    session.docker_auth = secrets.docker_auth
    session.backend_secrets = secrets.backend_config
    api_url, ui_url = _enclosing_api() or (None, None)
    if api_url is None:
        from prefect_mlprojects.server.process import resolve_api

        address = resolve_api(announce)
        api_url, ui_url = address.api_url, address.ui_url
    if own_process:
        configure_prefect(api_url)
    from prefect_mlprojects.runs.launch import launch

    return launch(request, session, api_url=api_url, ui_url=ui_url, name=name)


def _enclosing_api() -> tuple[str, str | None] | None:
    """Returns the Prefect API of the flow run that this code runs in; None outside a flow."""
    if "prefect.context" not in sys.modules:
        return None
    from prefect.context import FlowRunContext
    from prefect.settings import PREFECT_UI_URL

    context = FlowRunContext.get()
    if context is None:
        return None
    return str(context.client.api_url), PREFECT_UI_URL.value()


def configure_prefect(api_url: str) -> None:
    """Makes ``api_url`` this process's Prefect API and silences Prefect's console lines; call it before importing Prefect."""
    if os.environ.get("PREFECT_API_URL") != api_url:
        os.environ["PREFECT_API_URL"] = api_url
        os.environ.setdefault("PREFECT_CLIENT_CSRF_SUPPORT_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
