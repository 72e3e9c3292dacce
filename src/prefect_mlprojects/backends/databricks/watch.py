"""Watches a run until it has ended: backs off, and does not lose the run when the workspace is out of reach for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from prefect_mlprojects.backends.databricks.config import NAME, DatabricksConfig
from prefect_mlprojects.backends.databricks.connection import refused
from prefect_mlprojects.backends.databricks.states import Diagnosis, diagnose
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.jobs import Run

_Answer = TypeVar("_Answer")
_GROWTH = 1.5


def is_passing(error: BaseException) -> bool:
    """Whether an error of a call goes away by itself: a rate limit, a server's error, a lost connection."""
    import requests
    from databricks.sdk import errors

    passing = (
        errors.TooManyRequests,
        errors.InternalError,
        errors.TemporarilyUnavailable,
        errors.DeadlineExceeded,
        requests.exceptions.RequestException,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(error, passing) or "Exceeded max retry" in str(error)


def insist(call: Callable[[], _Answer], seconds: float, stop: StopSignal | None, what: str) -> _Answer:
    """Makes an idempotent call, again and again while what goes wrong goes away by itself.

    Args:
        call: The call.
        seconds: For how long; one call is made in any case.
        stop: Gives up when requested; None for a call that must be made although it is.
        what: What could not be done, for the message.

    Raises:
        BackendError: The workspace refused it, or was out of reach for too long.
    """
    deadline, pause = time.monotonic() + seconds, 1.0
    while True:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - what passes is told apart below
            if not is_passing(error) or time.monotonic() + pause > deadline or (stop is not None and stop.requested):
                raise refused(what, error) from None
        if stop is None:
            time.sleep(pause)
        else:
            stop.wait(pause)
        pause = min(pause * _GROWTH, 20.0)


def watch(
    client: WorkspaceClient,
    run_id: int,
    config: DatabricksConfig,
    stop: StopSignal,
    deadline: float | None,
    on_look: Callable[[Run, Diagnosis], bool],
) -> tuple[Run, Diagnosis, str]:
    """Looks at a run until it has ended, was told to, or the time is up.

    Args:
        client: The workspace.
        run_id: The run.
        config: Says how often to look, and how long the workspace may be out of reach.
        stop: Asks for the end; wakes it.
        deadline: When the time is up, by ``time.monotonic``; None for never.
        on_look: Called at every look; returns whether something happened, so that the next look comes soon.

    Returns:
        The run, its diagnosis, and why the watching ended: ``ended``, ``stopped`` or ``timed-out``.

    Raises:
        BackendError: The workspace was out of reach for too long, or does not know the run.
    """
    pause, phase = config.poll_interval, ""
    while True:
        run = insist(
            lambda: client.jobs.get_run(run_id),
            config.network_timeout,
            stop,
            f"The Databricks run {run_id} can't be watched (it may go on)",
        )
        found = diagnose(run)
        lively = on_look(run, found)
        if found.ended:
            return run, found, "ended"
        pause = (
            config.poll_interval if lively or found.phase != phase else min(pause * _GROWTH, config.max_poll_interval)
        )
        phase = found.phase
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return run, found, "timed-out"
        if stop.wait(pause if left is None else min(pause, left)):
            return run, found, "stopped"


def cancel(client: WorkspaceClient, run_id: int, config: DatabricksConfig) -> tuple[Run, Diagnosis]:
    """Cancels a run and waits until it has ended; does no harm to one that has.

    Raises:
        BackendError: The workspace was out of reach for too long.
    """
    what = f"The Databricks run {run_id} could not be cancelled; cancel it in the workspace, it may cost money"

    def ask() -> Any:
        from databricks.sdk.errors import BadRequest

        try:
            return client.jobs.cancel_run(run_id)
        except BadRequest:
            # It has ended already.
            return None

    insist(ask, config.network_timeout, None, what)
    pause, deadline = 0.2, time.monotonic() + max(config.network_timeout, 60.0)
    while True:
        run = insist(lambda: client.jobs.get_run(run_id), config.network_timeout, None, what)
        found = diagnose(run)
        if found.ended:
            return run, found
        if time.monotonic() > deadline:
            raise BackendError(f"{what}: it is still {found.phase}.", backend=NAME)
        time.sleep(pause)
        pause = min(pause * _GROWTH, 10.0)
