"""What the four tasks share: they report their progress to the observer, and log to the flow run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from rich.console import Console

from prefect_mlprojects._support.progress import send_progress_to
from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.tasks.session import RunSession, StepEvent, StepName, current_session
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.context import TaskRunContext


@dataclass
class Step:
    """A running step.

    Attributes:
        session: The run's session.
        report: Takes lines about the progress, from any thread: for the flow run's log and the observer.
        detail: What to show when the step has finished.
        cancelled: Whether a stop request ended it.
    """

    session: RunSession
    report: Callable[[str], None]
    detail: str = ""
    cancelled: bool = False

    @property
    def stop(self) -> StopSignal:
        """The step's stop signal."""
        return self.session.stop


@asynccontextmanager
async def run_step(name: StepName) -> AsyncIterator[Step]:
    """Reports to the observer that the step started, and how it ended."""
    session = current_session()
    logger = get_run_logger()

    # Prefect keeps in it which server is meant; a thread of a lower layer has none, and would get one started.
    context = copy_context()

    def report(line: str) -> None:
        # A copy each time, since several threads may report at once.
        context.copy().run(logger.info, "%s", line)
        session.observer.step(StepEvent(name, "progress", line))

    step = Step(session, report)
    artifacts = ProgressArtifacts(TaskRunContext.get())

    reported: dict[str, int] = {}

    def progress(what: str, fraction: float) -> None:
        # A download reports each chunk; people see whole percents.
        percent = int(fraction * 100)
        if reported.get(what) != percent:
            reported[what] = percent
            artifacts.take(what, fraction)
            session.observer.step(StepEvent(name, "progress", f"{what}: {percent} %"))

    session.set_begun()
    session.observer.step(StepEvent(name, "started"))
    try:
        with send_progress_to(progress):
            yield step
    except BaseException as error:
        detail = error.message if isinstance(error, ExecutionException) else type(error).__name__
        session.observer.step(StepEvent(name, "cancelled" if session.stop.requested else "failed", detail))
        raise
    finally:
        await artifacts.finish()
    # A command that was stopped ends its step like any other; only the stop tells.
    session.observer.step(StepEvent(name, "cancelled" if step.cancelled else "finished", step.detail))


class PlainErrors(logging.Filter):
    """Logs a project's failure as its message: Prefect would add a traceback through this package."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites a record about an :class:`ExecutionException`; lets every record pass."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, ExecutionException):
            record.msg, record.args, record.exc_info, record.exc_text = error.message, (), None, None
        return True


def configure_logging() -> None:
    """Puts :class:`PlainErrors` on the loggers of Prefect's engines, and keeps broken pipes from ending runs; idempotent.

    rich exits the process when the reader of its console is gone: a worker that died, or `| head`.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(existing, PlainErrors) for existing in logger.filters):
            logger.addFilter(PlainErrors())
    for logger in (logging.getLogger(), logging.getLogger("prefect")):
        for handler in logger.handlers:
            console = getattr(handler, "console", None)
            if isinstance(console, Console):
                console.on_broken_pipe = partial(setattr, console, "quiet", True)  # type: ignore[method-assign]


_logger = logging.getLogger(__name__)

_SHORT_SECONDS = 2.0
"""Shorter work gets no artifact."""
_SECONDS_BETWEEN_UPDATES = 1.0


class ProgressArtifacts:
    """The progress artifacts of one task run: one for each long work, created once the work takes long.

    What can't be written is logged, since the run itself does not depend on it.

    Args:
        context: The task run; None outside of one, where nothing is written.
    """

    def __init__(self, context: TaskRunContext | None) -> None:
        self._task_run = context.task_run if context is not None else None
        self._loop = asyncio.get_running_loop()
        # Prefect keeps in it which server is meant; a thread that reports progress has none, or another's.
        self._context = copy_context()
        self._latest: dict[str, float] = {}
        self._written: dict[str, tuple[UUID, float]] = {}
        self._writer: asyncio.Task[None] | None = None

    def take(self, what: str, fraction: float) -> None:
        """Records the progress of a piece of work; thread-safe."""
        if self._task_run is not None:
            self._loop.call_soon_threadsafe(self._note, what, fraction, context=self._context)

    def _note(self, what: str, fraction: float) -> None:
        self._latest[what] = fraction
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_now_and_then())

    async def _write_now_and_then(self) -> None:
        await asyncio.sleep(_SHORT_SECONDS)
        async with get_client() as client:
            while True:
                await self._write(client)
                await asyncio.sleep(_SECONDS_BETWEEN_UPDATES)

    async def finish(self) -> None:
        """Writes the final progress; call it when the task is over."""
        if self._writer is None:
            return
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        if self._written:
            async with get_client() as client:
                await self._write(client)

    async def _write(self, client: PrefectClient) -> None:
        assert self._task_run is not None
        for what, fraction in self._latest.items():
            artifact, written = self._written.get(what, (None, -1.0))
            if fraction == written:
                continue
            try:
                if artifact is None:
                    made = await client.create_artifact(
                        ArtifactCreate(
                            type="progress",
                            # Without a key it shows with its run only, and not among the artifacts of all.
                            description=what,
                            data=fraction * 100,
                            task_run_id=self._task_run.id,
                            flow_run_id=self._task_run.flow_run_id,
                        )
                    )
                    artifact = made.id
                else:
                    await client.update_artifact(artifact, ArtifactUpdate(data=fraction * 100))
            except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
                _logger.warning("The progress of %r could not be written: %s", what, error)
                continue
            self._written[what] = (artifact, fraction)
