"""Watches a run until it has ended: backs off, and does not lose the run when the workspace is out of reach for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prefect_mlprojects.backends.databricks.config import NAME, DatabricksConfig
from prefect_mlprojects.backends.databricks.network import insist
from prefect_mlprojects.backends.databricks.states import Diagnosis, diagnose
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.jobs import Run

WatchEnd: TypeAlias = Literal["ended", "stopped", "timed-out"]
_GROWTH = 1.5
_FIRST_CANCEL_PAUSE, _LONGEST_CANCEL_PAUSE = 0.2, 10.0
_SHORTEST_CANCEL_WAIT = 60.0


def watch(
    client: WorkspaceClient,
    run_id: int,
    config: DatabricksConfig,
    stop: StopSignal,
    deadline: float | None,
    on_look: Callable[[Run, Diagnosis], bool],
) -> tuple[Run | None, Diagnosis | None, WatchEnd]:
    """Looks at a run until it has ended, was told to, or the time is up.

    Args:
        client: The workspace.
        run_id: The run.
        config: Says how often to look, and how long the workspace may be out of reach.
        stop: Asks for the end; wakes it.
        deadline: When the time is up, by ``time.monotonic``; None for never.
        on_look: Called at every look; returns whether something happened, so that the next look comes soon.

    Returns:
        The run, its diagnosis, and why the watching ended; the first two are None when a stop came before the first look.

    Raises:
        BackendError: The workspace was out of reach for too long, or does not know the run.
    """
    pause, phase = config.poll_interval, ""
    run, found = None, None
    while True:
        try:
            run = insist(
                lambda: client.jobs.get_run(run_id),
                config.network_timeout,
                stop,
                f"The Databricks run {run_id} can't be watched (it may go on)",
            )
        except BackendError:
            if stop.requested:
                # It was out of reach when the stop came; the cancelling insists.
                return run, found, "stopped"
            raise
        found = diagnose(run)
        lively = on_look(run, found)
        if found.ended:
            return run, found, "ended"
        quiet = not lively and found.phase == phase
        pause = min(pause * _GROWTH, config.max_poll_interval) if quiet else config.poll_interval
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
    pause, deadline = _FIRST_CANCEL_PAUSE, time.monotonic() + max(config.network_timeout, _SHORTEST_CANCEL_WAIT)
    while True:
        run = insist(lambda: client.jobs.get_run(run_id), config.network_timeout, None, what)
        found = diagnose(run)
        if found.ended:
            return run, found
        if time.monotonic() > deadline:
            raise BackendError(f"{what}: it is still {found.phase}.", backend=NAME)
        time.sleep(pause)
        pause = min(pause * _GROWTH, _LONGEST_CANCEL_PAUSE)
