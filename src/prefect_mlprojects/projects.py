"""``run()``, as ``mlflow.projects`` has it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends import get_backend
from prefect_mlprojects.backends.configuration import is_block_reference, load_backend_config, split_config
from prefect_mlprojects.exceptions import BackendError, ExecutionException, ParameterError, Problem, RunFailed
from prefect_mlprojects.runs.check import RunContext, check_request
from prefect_mlprojects.runs.handles import LocalSubmittedRun, SubmittedRun
from prefect_mlprojects.runs.request import PROJECT_SCHEME, RunRequest
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.types import StopSignal


def run(
    uri: str | Path,
    entry_point: str = "main",
    version: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    docker_args: Mapping[str, Any] | None = None,
    experiment_name: str | None = None,
    experiment_id: str | int | None = None,
    backend: str = "local",
    backend_config: Mapping[str, Any] | str | None = None,
    storage_dir: str | Path | None = None,
    synchronous: bool = True,
    run_id: str | None = None,
    run_name: str | None = None,
    env_manager: str | None = None,
    build_image: bool = False,
    docker_auth: Mapping[str, Any] | None = None,
    *,
    timeout: float | None = None,
    retries: int = 0,
    git_credentials: str | None = None,
    tracking: str | None = None,
) -> SubmittedRun:
    """Runs an MLflow-Projects project as a Prefect flow; a drop-in for ``mlflow.projects.run``.

    Called inside a Prefect flow it becomes a child run of it; inside an active MLflow run, a nested one.

    Args:
        uri: The project's folder or URI, with an optional ``#sub/directory``.
        entry_point: The entry point's name; one that the project does not declare runs the ``.py``, ``.sh`` or ``.R``
            file of that name.
        version: The version of a git project: a branch, a tag or a commit.
        parameters: Values by parameter name; undeclared ones are appended to the command as ``--name value``.
        docker_args: Arguments for the container of a Docker project.
        experiment_name: The MLflow experiment by name; created when it is missing.
        experiment_id: The MLflow experiment by id; not together with ``experiment_name``.
        backend: Where the command runs: ``local`` or a backend that an installed package adds.
        backend_config: The backend's configuration: a mapping, or the path of a JSON or YAML file that holds one.
        storage_dir: Where remote ``path`` parameters are downloaded to.
        synchronous: Whether to wait for the run's end. When False the run goes on in this process, which waits for it
            at exit.
        run_id: The MLflow run to go on with; None makes a new one.
        run_name: The MLflow run's name.
        env_manager: ``local``, ``virtualenv``, ``uv`` or ``conda``; None chooses by the project's files.
        build_image: Whether an image is built for a Docker project.
        docker_auth: Credentials for the image registry; they stay in memory.
        timeout: Seconds that the command may take; None for no limit.
        retries: How often a failed command is tried again.
        git_credentials: The name of a git-credentials block; None looks for one by the repository's host.
        tracking: The name of an mlflow-tracking-server block; None tracks as MLflow does in this process.

    Returns:
        A handle on the run: finished when ``synchronous``, else under way.

    Raises:
        ExecutionException: The call is wrong, or (when ``synchronous``) the run did not finish successfully. The subclass
            says which.
    """
    from prefect_mlprojects.tracking import active_experiment_id

    if experiment_name is None and experiment_id is None and run_id is None:
        # As MLflow does: what mlflow.set_experiment() chose in this process.
        experiment_id = active_experiment_id()
    # Secrets of the configuration stay in memory; Prefect stores the rest.
    secrets: dict[str, Any] = {}
    call = make_call(
        uri,
        entry_point,
        version,
        parameters,
        docker_args,
        experiment_name,
        experiment_id,
        backend,
        backend_config,
        storage_dir,
        run_id,
        run_name,
        env_manager,
        build_image,
        timeout=timeout,
        retries=retries,
        git_credentials=git_credentials,
        tracking=tracking,
        config_secrets=secrets,
    )
    name = preflight(call, secrets)

    from prefect_mlprojects.tasks.session import RunSession
    from prefect_mlprojects.tracking import active_run_id, resolve_tracking_uri

    session = RunSession(
        tracking_uri=resolve_tracking_uri(),
        parent_run_id=None if run_id else active_run_id(),
        docker_auth=docker_auth,
        backend_secrets=secrets,
    )
    handle = submit(call, session, name)
    if synchronous:
        wait_and_raise(handle)
    return handle


def make_call(
    uri: str | Path,
    entry_point: str = "main",
    version: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    docker_args: Mapping[str, Any] | None = None,
    experiment_name: str | None = None,
    experiment_id: str | int | None = None,
    backend: str = "local",
    backend_config: Mapping[str, Any] | str | None = None,
    storage_dir: str | Path | None = None,
    run_id: str | None = None,
    run_name: str | None = None,
    env_manager: str | None = None,
    build_image: bool = False,
    *,
    timeout: float | None = None,
    retries: int = 0,
    git_credentials: str | None = None,
    tracking: str | None = None,
    config_secrets: dict[str, Any] | None = None,
) -> RunRequest:
    """Checks the options of a call that need no project, and returns the call as plain JSON values.

    Raises:
        ParameterError: Options contradict each other or are not of their kind; all of them at once.
        BackendError: The backend is unknown, or its configuration is malformed.
    """
    problems = []
    if experiment_name and experiment_id is not None:
        problems.append(Problem("give only one of experiment_name and experiment_id", parameter="experiment_id"))
    if timeout is not None and not 0 < timeout < float("inf"):
        problems.append(Problem(f"timeout must be a positive number of seconds, not {timeout!r}", parameter="timeout"))
    if retries < 0:
        problems.append(Problem(f"retries must be 0 or more, not {retries!r}", parameter="retries"))
    if not str(uri).strip():
        problems.append(Problem("the project's URI is empty", parameter="uri"))
    if problems:
        raise ParameterError("The call can't be made", problems)
    config = stored_config(backend, backend_config, config_secrets)
    return RunRequest(
        uri=str(uri),
        entry_point=entry_point,
        version=version,
        # What Prefect stores is what a form could have sent: numbers and text; a path becomes text here.
        parameters={str(key): _plain(value) for key, value in (parameters or {}).items()},
        docker_args=dict(docker_args) if docker_args else None,
        experiment_name=experiment_name,
        experiment_id=None if experiment_id is None else str(experiment_id),
        backend=backend,
        backend_config=config,
        storage_dir=None if storage_dir is None else str(Path(storage_dir).expanduser().absolute()),
        run_id=run_id,
        run_name=run_name,
        env_manager=env_manager,
        build_image=build_image,
        timeout=timeout,
        retries=retries,
        git_credentials=git_credentials,
        tracking=tracking,
    )


def stored_config(
    backend: str, config: Mapping[str, Any] | str | None, secrets: dict[str, Any] | None = None
) -> dict[str, Any] | str:
    """Returns a backend's configuration as it is stored: the name of a block, or plain JSON data without secrets.

    Args:
        backend: The backend's name.
        config: A mapping, a file, a JSON text, or the name of a block, which is read when the flow runs; None for none.
        secrets: Receives the keys that hold secrets, for use in memory; None: they are refused.

    Raises:
        BackendError: The backend is unknown, or the configuration is malformed or holds secrets that are refused.
    """
    chosen = get_backend(backend)
    if isinstance(config, str) and is_block_reference(config):
        return config
    in_memory = isinstance(config, Mapping) and secrets is not None
    public, secret = split_config(chosen.parse_config(load_backend_config(config, backend=backend)))
    if secret and not in_memory:
        raise BackendError(
            f"The configuration of the {backend} backend holds secrets ({', '.join(secret)}), which would be stored with the flow "
            "run. Keep them in a block and give its name here, or give the configuration to run() as a dictionary.",
            backend=backend,
        )
    if secrets is not None:
        secrets.update(secret)
    return public


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def context_before_run(
    call: RunRequest, tracking_uri: str, config_secrets: Mapping[str, Any] | None = None
) -> RunContext:
    """Returns what belongs to a run before its flow run exists; no block has been read yet."""
    config = call.backend_config
    if isinstance(config, str):
        return RunContext(None, Secret(tracking_uri))
    parsed = get_backend(call.backend).parse_config({**(config or {}), **(config_secrets or {})})
    return RunContext(parsed, Secret(tracking_uri))


def preflight(call: RunRequest, config_secrets: Mapping[str, Any] | None = None) -> str | None:
    """Finds a call's mistakes before a flow run exists, where that needs no network: for a project in a folder.

    Args:
        call: The run request.
        config_secrets: Keys of the backend's configuration that are not in `call`.

    Returns:
        The flow run's name, or None when the project has to be fetched to know it.

    Raises:
        ExecutionException: The project, the entry point, the parameters or the environment manager do not fit.
    """
    if call.uri.startswith(PROJECT_SCHEME):
        return None
    source = detect_source(call.uri, call.version)
    if source.kind != "local":
        return None
    copy = source.fetch(StopSignal(), lambda _: None)
    from prefect_mlprojects.tracking import resolve_tracking_uri

    return check_request(call, copy, context_before_run(call, resolve_tracking_uri(), config_secrets)).name


def submit(
    call: RunRequest, session: Any, name: str | None, announce: Callable[[str], None] | None = None
) -> LocalSubmittedRun:
    """Starts a call's flow run in this process, on the Prefect server of the enclosing flow, or the configured or embedded one.

    Args:
        call: The call.
        session: Its companion, a ``RunSession``.
        name: The flow run's name, when it is known.
        announce: Takes lines about a server that is being started; None prints them to stderr.

    Raises:
        PrefectServerError: No Prefect server could be reached or started.
    """
    from prefect_mlprojects.runs.launch import launch

    api_url, ui_url = _enclosing_api() or (None, None)
    if api_url is None:
        from prefect_mlprojects.server.process import resolve_api

        address = resolve_api(announce)
        api_url, ui_url = address.api_url, address.ui_url
    return launch(call, session, api_url=api_url, ui_url=ui_url, name=name)


def _enclosing_api() -> tuple[str, str | None] | None:
    """The Prefect API of the flow run that this code runs in, if it does."""
    if "prefect.context" not in sys.modules:
        return None
    from prefect.context import FlowRunContext
    from prefect.settings import PREFECT_UI_URL

    context = FlowRunContext.get()
    if context is None:
        return None
    return str(context.client.api_url), PREFECT_UI_URL.value()


def wait_and_raise(handle: LocalSubmittedRun) -> None:
    """Waits for a run; Ctrl-C or SIGTERM cancels it first.

    Raises:
        ExecutionException: The run did not finish successfully.
    """
    from prefect_mlprojects.runs.launch import wait_interruptibly

    result = wait_interruptibly(handle)
    if result.status == "FINISHED":
        return
    if result.error is not None:
        raise result.error
    error: ExecutionException = RunFailed(
        f"Run (ID '{result.run_id}') failed: {result.message}", run_id=result.run_id, flow_run_id=result.flow_run_id
    )
    raise error
