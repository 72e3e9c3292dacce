"""Makes, checks and starts run requests for ``run()`` and ``mlprojects run``.

Flow runs are executed on this process's event loop; an exit of the process waits for them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from prefect_mlprojects._support.event_loop import background_loop, call_before_exit
from prefect_mlprojects._support.redaction import holds_secret, redact, strip_user_info
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.docker.arguments import split_arguments
from prefect_mlprojects.exceptions import (
    ExecutionException,
    ParameterError,
    PrefectServerError,
    Problem,
    ProjectSpecError,
    RunCancelled,
)
from prefect_mlprojects.request import OPTIONS, PROJECT_SCHEME, RunRequest
from prefect_mlprojects.request.check import CheckedRun, RunSecrets, check_request, context_before_run
from prefect_mlprojects.request.secrets import separate_config, split_parameters, withhold
from prefect_mlprojects.request.tags import automatic_tags
from prefect_mlprojects.runs.handles import LocalSubmittedRun, run_status
from prefect_mlprojects.server.access import password_for
from prefect_mlprojects.server.api import use_api
from prefect_mlprojects.settings import OWN_VARIABLES, max_concurrent_runs
from prefect_mlprojects.sources import absolute_uri, detect_source
from prefect_mlprojects.tasks.session import RunResult, RunSession, use_session
from prefect_mlprojects.types import RunStatus, StopSignal

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

_logger = logging.getLogger(__name__)

_running: WeakSet[LocalSubmittedRun] = WeakSet()
_running_lock = threading.Lock()
_exit_hook_installed = False
_run_semaphore: asyncio.Semaphore | None = None


def make_request(arguments: Mapping[str, Any]) -> tuple[RunRequest, RunSecrets]:
    """Checks the arguments of ``run()`` without the project, and separates secrets from the request that Prefect stores.

    Missing arguments have their defaults; unknown ones are ignored.

    Raises:
        ParameterError: Options contradict each other or are out of bounds; all mistakes at once, the project's too.
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
        raise ParameterError("The run options are not valid", [*problems, *_project_problems(arguments, problems)])
    config, config_secrets = separate_config(given["backend"], given["backend_config"])
    docker_args, secret_docker_args = split_arguments(given["docker_args"] or {})
    parameters, secret_parameters = split_parameters(given["parameters"] or {})
    secret_uri = Secret(uri) if holds_secret(uri) else None
    given |= {
        "uri": strip_user_info(uri) if secret_uri else absolute_uri(uri),
        "parameters": parameters,
        "run_name": given["run_name"] and redact(str(given["run_name"])),
        "docker_args": docker_args or None,
        "experiment_id": None if given["experiment_id"] is None else str(given["experiment_id"]),
        "backend_config": config,
        "storage_dir": _absolute(given["storage_dir"]),
    }
    auth = arguments.get("docker_auth")
    docker_auth = (
        {str(key): Secret(value) if isinstance(value, str) else value for key, value in auth.items()} if auth else None
    )
    secrets = RunSecrets(secret_uri, config_secrets, docker_auth, secret_docker_args, secret_parameters)
    return RunRequest(**given), secrets


def _project_problems(arguments: Mapping[str, Any], known: list[Problem]) -> tuple[Problem, ...]:
    """Returns the problems of a project in a folder, and of the parameter values, beside the known ones."""
    wrong = {problem.parameter for problem in known}
    try:
        if "uri" not in wrong:
            preflight(*make_request({name: value for name, value in arguments.items() if name not in wrong}))
    except (ParameterError, ProjectSpecError) as error:
        return error.problems
    except ExecutionException:
        pass
    return ()


def _absolute(folder: str | Path | None) -> str | None:
    return None if folder is None else str(Path(folder).expanduser().absolute())


def preflight(request: RunRequest, secrets: RunSecrets) -> CheckedRun | None:
    """Checks a request for a project in a folder, and returns the checked run; None for other projects.

    Raises:
        ExecutionException: As `check_request`.
    """
    if request.uri.startswith(PROJECT_SCHEME):
        return None
    source = detect_source(request.uri, request.version)
    if source.kind != "local":
        return None
    copy = source.fetch(StopSignal(), lambda _: None)
    from prefect_mlprojects.tracking import resolve_tracking_uri

    context = context_before_run(request, resolve_tracking_uri(), secrets)
    return check_request(request, copy, context)


def start(
    request: RunRequest,
    secrets: RunSecrets,
    session: RunSession,
    checked: CheckedRun | None,
    *,
    announce: Callable[[str], None] | None = None,
    own_process: bool = False,
) -> LocalSubmittedRun:
    """Starts a flow run in this process, a child of the current one if any, and returns once it exists.

    `session` has the caller's output and observer; `checked` is what `preflight` returned. `announce` receives lines about
    a server that is being started; None prints them to stderr. `own_process` allows changes of Prefect's settings here.

    Raises:
        PrefectServerError: No Prefect server could be reached or started, or it refused the request.
    """
    from prefect_mlprojects.tracking import active_run_id, resolve_tracking_uri

    session.tracking_uri = resolve_tracking_uri()
    session.parent_run_id = None if request.run_id else active_run_id()
    request, session.secrets = withhold(request, secrets, checked.entry_point.parameters if checked else None)
    name = checked.name if checked else None
    session.name = name or ""
    of_project = (
        automatic_tags(checked.project.display_name, checked.entry_point.name, request.backend) if checked else ()
    )
    session.tags = (*session.tags, *of_project)
    api_url, ui_url = _find_api(announce)
    if own_process:
        configure_prefect(api_url)
    # The coroutine runs in the context of this thread, which has the parent flow run.
    future = background_loop().submit(_run_flow(request, session, api_url, name))
    future.add_done_callback(lambda _: session.wake())
    session.wait_until(lambda: session.flow_run_id is not None or future.done())
    if session.flow_run_id is None:
        future.result()
    run = LocalSubmittedRun(session, future, api_url, ui_url, request.parameters)
    _register(run, future)
    return run


def _find_api(announce: Callable[[str], None] | None) -> tuple[str, str | None]:
    """Returns the API's and UI's addresses of the enclosing flow run, else of the configured or embedded server."""
    if "prefect.context" in sys.modules:
        from prefect.context import FlowRunContext
        from prefect.settings import PREFECT_UI_URL

        if context := FlowRunContext.get():
            return str(context.client.api_url), PREFECT_UI_URL.value()
    from prefect_mlprojects.server.process import resolve_api

    address = resolve_api(announce)
    return address.api_url, address.ui_url


def configure_prefect(api_url: str) -> None:
    """Sets this process's Prefect API and silences Prefect's console output; must precede Prefect's import."""
    own = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL"}
    # Prefect's log handler would print the errors of a server that is gone to stderr.
    logging.raiseExceptions = False
    if os.environ.get("PREFECT_API_URL") != api_url:
        os.environ["PREFECT_API_URL"] = api_url
        own["PREFECT_CLIENT_CSRF_SUPPORT_ENABLED"] = "false"
    configured = os.environ.pop("PREFECT_API_AUTH_STRING", None)
    if (password := password_for(api_url, configured)) is not None:
        os.environ["PREFECT_API_AUTH_STRING"] = password
    added = {name: value for name, value in own.items() if name not in os.environ}
    os.environ.update(added)
    if added:
        os.environ[OWN_VARIABLES] = " ".join([*os.environ.get(OWN_VARIABLES, "").split(), *added])


async def _run_flow(request: RunRequest, session: RunSession, api_url: str, name: str | None) -> None:
    from prefect.context import FlowRunContext
    from prefect.states import Pending

    from prefect_mlprojects.flows.run_project import run_project
    from prefect_mlprojects.server.compat import client_context, run_flow

    parameters = request.flow_parameters()
    with use_api(api_url):
        use_session(session)
        async with _errors_as_result(api_url, session), client_context() as context:
            if FlowRunContext.get() is not None:
                # Prefect's engine creates a child run itself when it starts, to link it to its parent.
                async with _semaphore():
                    state = await run_flow(run_project, parameters)
            else:
                flow_run = await context.client.create_flow_run(
                    run_project, name=name, parameters=parameters, tags=session.tags, state=Pending()
                )
                session.set_flow_run_id(str(flow_run.id))
                async with _semaphore():
                    if session.stop.requested:
                        await _cancel_before_start(context.client, session)
                        return
                    state = await run_flow(run_project, parameters, flow_run)
            _ensure_result(session, state)


def _ensure_result(session: RunSession, state: Any) -> None:
    """Sets the result where the flow's code did not: it never started, or the server decided on another final state."""
    status, result = run_status(state), session.result
    if result is not None and (result.status == status or status == "RUNNING"):
        return
    message = (state.message if state is not None else None) or f"The flow run ended in state {state}."
    _set_result(session, "FAILED" if status == "RUNNING" else status, message, result.error if result else None)


def _set_result(session: RunSession, status: RunStatus, message: str, error: ExecutionException | None) -> None:
    run_id = session.tracked_run.run_id if session.tracked_run else None
    session.set_result(RunResult(status, run_id, session.flow_run_id or "", message, error=error))


async def _cancel_before_start(client: Any, session: RunSession) -> None:
    from prefect.states import Cancelled

    error = RunCancelled(
        f"The run was cancelled before it started: {session.stop.reason}.", flow_run_id=session.flow_run_id
    )
    state: State[Any] = Cancelled(message=error.message)
    await client.set_flow_run_state(session.flow_run_id, state, force=True)
    _set_result(session, "KILLED", error.message, error)


@asynccontextmanager
async def _errors_as_result(api_url: str, session: RunSession) -> AsyncIterator[None]:
    """Turns errors of the flow run into a result; raises them if no flow run exists."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # A SystemExit (of a logging handler, of the caller's own callbacks) would end the event loop for all runs.
        message = redact(
            f"The flow run on the Prefect server at {api_url} ended early: {type(error).__name__}: {error}"
        )
        failure = error if isinstance(error, ExecutionException) else PrefectServerError(message, api_url=api_url)
        if session.flow_run_id is None:
            raise failure from error
        _logger.debug("The flow run ended early", exc_info=error)
        if session.result is None:
            _set_result(session, "FAILED", failure.message, failure)


def _semaphore() -> asyncio.Semaphore:
    """Returns the semaphore that limits the concurrent runs of this process."""
    global _run_semaphore
    if _run_semaphore is None:
        _run_semaphore = asyncio.Semaphore(max_concurrent_runs())
    return _run_semaphore


def wait_interruptibly(run: LocalSubmittedRun, *, reraise: bool = True) -> RunResult:
    """Returns a run's result; Ctrl-C or SIGTERM cancels the run, and is raised again after its end unless `reraise` is False."""
    with _stop_on_sigterm([run.session], reraise=reraise):
        try:
            return run.result()
        except BaseException as interruption:
            by_user = isinstance(interruption, KeyboardInterrupt)
            reason = (
                "it was interrupted by Ctrl-C" if by_user else f"it was interrupted ({type(interruption).__name__})"
            )
            run.session.stop.request(reason, interrupted=by_user)
            result = run.result()
            if reraise or not by_user:
                raise
            return result


@contextmanager
def _stop_on_sigterm(sessions: list[RunSession], *, reraise: bool = True) -> Iterator[None]:
    """During the block, SIGTERM stops the runs; after it, the signal is raised again unless `reraise` is False.

    Only the main thread can set signal handlers; another handler than the default is kept.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    received = False

    def on_sigterm(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a handler
        nonlocal received
        received = True
        for session in sessions:
            session.stop.request("the process got SIGTERM")

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if received and reraise:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGTERM)


def _register(run: LocalSubmittedRun, future: concurrent.futures.Future[None]) -> None:
    global _exit_hook_installed
    with _running_lock:
        _running.add(run)
        if not _exit_hook_installed:
            _exit_hook_installed = True
            # Prefect's services register exit hooks when they start, and hooks run in reverse order: ours must be registered
            # after theirs, or the last task runs and logs would be lost.
            run.session.wait_until(lambda: run.session.begun or future.done())
            call_before_exit(_wait_for_runs)
    future.add_done_callback(lambda _: _running.discard(run))


def _wait_for_runs() -> None:
    """Waits for active runs; an earlier or new interrupt cancels them."""
    with _running_lock:
        runs = list(_running)
    if not runs:
        return
    sessions = [run.session for run in runs]
    interrupted = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)
    with _stop_on_sigterm(sessions):
        try:
            if interrupted:
                raise KeyboardInterrupt
            for run in runs:
                run.result()
        except KeyboardInterrupt:
            for session in sessions:
                session.stop.request("the process was interrupted", interrupted=True)
            for run in runs:
                run.result()
