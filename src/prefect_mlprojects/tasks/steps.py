"""Reports the progress of steps to the observer, the flow run's log and progress artifacts."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from rich.console import Console

from prefect_mlprojects._support.progress import send_progress_to
from prefect_mlprojects._support.redaction import redact, redact_error
from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.request import FLOW_NAME
from prefect_mlprojects.tasks.session import RunSession, StepEvent, StepName, current_session, quiet_on_broken_pipe
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient

_logger = logging.getLogger(__name__)


@dataclass
class Step:
    """A running step: `report` takes progress lines, from any thread; `detail` is shown when the step has finished."""

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
    """Reports the step's start, progress and end."""
    session = current_session()
    logger = get_run_logger()
    # It holds Prefect's settings; in a thread without them Prefect would start another server.
    context = copy_context()
    artifacts = _ProgressArtifacts(TaskRunContext.get())
    reported: dict[str, int] = {}
    announced, held = False, list[str]()

    def report(line: str) -> None:
        nonlocal announced
        line = redact(line)
        # Consoles get the first line of a build; of the others only warnings, unless it fails. The log gets them all.
        quiet = name == "resolve-env" and announced and not line.startswith("Warning:")
        if quiet:
            held.append(line)
        announced = announced or not line.startswith("Warning:")
        # A copy each time: a context can't be entered by two threads at once.
        context.copy().run(logger.info, "%s", line, extra={_QUIET: quiet})
        session.observer.step(StepEvent(name, "progress", line, quiet=quiet))

    def progress(description: str, fraction: float) -> None:
        # A download reports each chunk; users see whole percents.
        percent = int(fraction * 100)
        if reported.get(description) != percent:
            reported[description] = percent
            artifacts.add(description, fraction)
            session.observer.step(StepEvent(name, "progress", f"{description}: {percent} %"))

    step = Step(session, report)

    session.set_begun()
    session.observer.step(StepEvent(name, "started"))
    try:
        with send_progress_to(progress):
            yield step
    except BaseException as error:
        # Prefect is about to store it with the task run.
        redact_error(error)
        detail = error.message if isinstance(error, ExecutionException) else type(error).__name__
        if session.stop.requested:
            session.observer.step(StepEvent(name, "cancelled", detail))
            raise
        # The error's message has the last lines.
        output = tuple(line for line in held if line not in getattr(error, "output_tail", ()))
        for line in output:
            logger.info("%s", line, extra={"send_to_api": False})
        session.observer.step(StepEvent(name, "failed", detail, output=output))
        raise
    finally:
        await artifacts.finish()
    # A command that was stopped ends its step like any other; only the stop tells.
    session.observer.step(StepEvent(name, "cancelled" if step.cancelled else "finished", redact(step.detail)))


class _ReportErrorsOnce(logging.Filter):
    """Keeps Prefect's engines from repeating an error that the flow logs, with a traceback through this package."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], ExecutionException):
            return False
        if getattr(record, "flow_name", None) == FLOW_NAME and isinstance(record.msg, str):
            record.msg = re.sub(r"(?s)^(Finished in state \w+)\(.+\)$", r"\1()", record.msg)
        return True


_QUIET = "mlprojects_quiet"


def _is_loud(record: logging.LogRecord) -> bool:
    return not getattr(record, _QUIET, False)


def configure_logging() -> None:
    """Makes Prefect log this package's errors once and builds quietly, and runs survive broken pipes; idempotent."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(existing, _ReportErrorsOnce) for existing in logger.filters):
            logger.addFilter(_ReportErrorsOnce())
    for logger in (logging.getLogger(), logging.getLogger("prefect")):
        for handler in logger.handlers:
            console = getattr(handler, "console", None)
            if isinstance(console, Console):
                quiet_on_broken_pipe(console)
                handler.addFilter(_is_loud)


_SHORT_SECONDS = 2.0  # shorter operations get no artifact
_SECONDS_BETWEEN_UPDATES = 1.0


class _ProgressArtifacts:
    """The progress artifacts of one task run, one per long operation; none outside of a task run."""

    def __init__(self, context: TaskRunContext | None) -> None:
        self._task_run = context.task_run if context is not None else None
        self._loop = asyncio.get_running_loop()
        # It holds Prefect's settings; a thread that reports progress has none, or another's.
        self._context = copy_context()
        self._latest: dict[str, float] = {}
        self._written: dict[str, tuple[UUID, float]] = {}
        self._writer: asyncio.Task[None] | None = None

    def add(self, description: str, fraction: float) -> None:
        """Records the progress of an operation; thread-safe."""
        if self._task_run is not None:
            self._loop.call_soon_threadsafe(self._record, description, fraction, context=self._context)

    def _record(self, description: str, fraction: float) -> None:
        self._latest[description] = fraction
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_regularly())

    async def _write_regularly(self) -> None:
        await asyncio.sleep(_SHORT_SECONDS)
        async with get_client() as client:
            while True:
                await self._write(client)
                await asyncio.sleep(_SECONDS_BETWEEN_UPDATES)

    async def finish(self) -> None:
        """Writes the final progress."""
        if self._writer is None:
            return
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        if self._written:
            async with get_client() as client:
                await self._write(client)

    async def _write(self, client: PrefectClient) -> None:
        assert self._task_run is not None
        for description, fraction in self._latest.items():
            artifact, written = self._written.get(description, (None, -1.0))
            if fraction == written:
                continue
            try:
                if artifact is None:
                    # Without a key it is shown with its run only, not on the page of all artifacts.
                    new = ArtifactCreate(
                        type="progress",
                        description=description,
                        data=fraction * 100,
                        task_run_id=self._task_run.id,
                        flow_run_id=self._task_run.flow_run_id,
                    )
                    artifact = (await client.create_artifact(new)).id
                else:
                    await client.update_artifact(artifact, ArtifactUpdate(data=fraction * 100))
            except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
                _logger.warning("The progress of %r could not be written: %s", description, error)
                continue
            self._written[description] = (artifact, fraction)
