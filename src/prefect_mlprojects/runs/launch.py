"""Starts flow runs of ``run_project`` in this process: on its event loop, so many at a time, and never left behind at exit."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from prefect_mlprojects._support.event_loop import background_loop, call_before_exit
from prefect_mlprojects.exceptions import ExecutionException, PrefectServerError, RunCancelled
from prefect_mlprojects.runs.handles import LocalSubmittedRun, run_status
from prefect_mlprojects.runs.request import RunRequest
from prefect_mlprojects.server.api import flow_run_url, use_api
from prefect_mlprojects.settings import max_concurrent_runs
from prefect_mlprojects.tasks.session import RunResult, RunSession, use_session

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

_logger = logging.getLogger(__name__)

_running: WeakSet[LocalSubmittedRun] = WeakSet()
_running_lock = threading.Lock()
_exit_hook_installed = False
_pool: asyncio.Semaphore | None = None


def launch(
    call: RunRequest, session: RunSession, *, api_url: str, ui_url: str | None, name: str | None
) -> LocalSubmittedRun:
    """Starts a run and returns as soon as its flow run exists.

    Inside a Prefect flow or task the flow run is a child of it.

    Args:
        call: The project call.
        session: The run's session.
        api_url: The Prefect API's address.
        ui_url: The Prefect UI's address, when it is known.
        name: The flow run's name; None leaves it to the flow.

    Raises:
        PrefectServerError: The Prefect server refused or could not be reached.
    """
    # The loop runs the coroutine in the context of this thread, and so it sees the parent flow run.
    future = background_loop().submit(_run_flow(call, session, api_url, name))
    future.add_done_callback(lambda _: session.wake())
    session.wait_until(lambda: session.flow_run_id is not None or future.done())
    if session.flow_run_id is None:
        future.result()
    run = LocalSubmittedRun(session, future, flow_run_url(ui_url, session.flow_run_id or ""))
    _remember(run, future)
    return run


async def _run_flow(call: RunRequest, session: RunSession, api_url: str, name: str | None) -> None:
    from prefect.context import FlowRunContext
    from prefect.states import Pending

    from prefect_mlprojects.flows.run_project import run_project
    from prefect_mlprojects.server.compat import client_context, run_flow

    with use_api(api_url):
        use_session(session)
        async with _errors_of(api_url, session), client_context() as context:
            if FlowRunContext.get() is not None:
                # The engine itself ties a child run to its parent; it makes the flow run when it starts.
                async with _pool_place():
                    state = await run_flow(run_project, call.flow_parameters())
            else:
                parameters = call.flow_parameters()
                flow_run = await context.client.create_flow_run(
                    run_project, name=name, parameters=parameters, state=Pending()
                )
                session.set_flow_run_id(str(flow_run.id))
                async with _pool_place():
                    if session.stop.requested:
                        await _cancel_before_start(context.client, session)
                        return
                    state = await run_flow(run_project, parameters, flow_run)
            _settle(session, state)


def _settle(session: RunSession, state: Any) -> None:
    """Leaves a result also where the flow's own code could not: it never began, or the server had the last word."""
    status = run_status(state)
    result = session.result
    if result is not None and (result.status == status or status == "RUNNING"):
        return
    tracked = session.tracked_run
    session.set_result(
        RunResult(
            status=status if status != "RUNNING" else "FAILED",
            run_id=tracked.run_id if tracked else None,
            flow_run_id=session.flow_run_id or "",
            message=(state.message if state is not None else None) or f"The flow run ended in state {state}.",
            error=result.error if result else None,
        )
    )


async def _cancel_before_start(client: Any, session: RunSession) -> None:
    from prefect.states import Cancelled

    error = RunCancelled(
        f"The run was cancelled before it started: {session.stop.reason}.", flow_run_id=session.flow_run_id
    )
    state: State[Any] = Cancelled(message=error.message)
    await client.set_flow_run_state(session.flow_run_id, state, force=True)
    session.set_result(
        RunResult("KILLED", run_id=None, flow_run_id=session.flow_run_id or "", message=error.message, error=error)
    )


@asynccontextmanager
async def _errors_of(api_url: str, session: RunSession) -> AsyncIterator[None]:
    """Turns errors around the flow run into a result, or re-raises them while no flow run exists."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # A SystemExit (of a logging handler, of the caller's own callbacks) would end the event loop for all runs.
        if isinstance(error, ExecutionException):
            failure = error
        else:
            failure = PrefectServerError(
                f"The flow run on the Prefect server at {api_url} ended early: {type(error).__name__}: {error}",
                api_url=api_url,
            )
        if session.flow_run_id is None:
            raise failure from error
        _logger.debug("The flow run ended early", exc_info=error)
        tracked = session.tracked_run
        if session.result is None:
            session.set_result(
                RunResult(
                    status="FAILED",
                    run_id=tracked.run_id if tracked else None,
                    flow_run_id=session.flow_run_id,
                    message=failure.message,
                    error=failure,
                )
            )


@asynccontextmanager
async def _pool_place() -> AsyncIterator[None]:
    """Waits for one of the places for runs in this process."""
    global _pool
    if _pool is None:
        _pool = asyncio.Semaphore(max_concurrent_runs())
    async with _pool:
        yield


def wait_interruptibly(run: LocalSubmittedRun, *, reraise: bool = True) -> RunResult:
    """Waits for a run and returns its result; Ctrl-C or SIGTERM cancels it and waits for its end.

    Then the signal takes its usual course, unless `reraise` is False.
    """
    with _sigterm_stops([run.session], reraise=reraise):
        try:
            return run.result()
        except BaseException as interruption:
            run.session.stop.request(f"it was interrupted ({type(interruption).__name__})")
            result = run.result()
            if reraise or not isinstance(interruption, KeyboardInterrupt):
                raise
            return result


@contextmanager
def _sigterm_stops(sessions: list[RunSession], *, reraise: bool = True) -> Iterator[None]:
    """While it lasts, SIGTERM stops the runs; the process ends by it afterwards, unless `reraise` is False.

    Only the main thread may set signal handlers, and a handler set by other code is kept.
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


def _remember(run: LocalSubmittedRun, future: concurrent.futures.Future[None]) -> None:
    global _exit_hook_installed
    with _running_lock:
        _running.add(run)
        if not _exit_hook_installed:
            _exit_hook_installed = True
            # Prefect's own services register their ends when they start, and exit hooks run in reverse order: ours must come
            # after theirs, else task runs and logs of the last moments would be lost.
            run.session.wait_until(lambda: run.session.begun or future.done())
            call_before_exit(_end_runs_at_exit)
    future.add_done_callback(lambda _: _running.discard(run))


def _end_runs_at_exit() -> None:
    """Waits for the runs that are still active; an interrupt, earlier or now, cancels them."""
    with _running_lock:
        runs = list(_running)
    if not runs:
        return
    sessions = [run.session for run in runs]
    interrupted = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)
    with _sigterm_stops(sessions):
        try:
            if interrupted:
                raise KeyboardInterrupt
            for run in runs:
                run.result()
        except KeyboardInterrupt:
            for session in sessions:
                session.stop.request("the process was interrupted")
            for run in runs:
                run.result()
