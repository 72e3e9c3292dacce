"""What the four tasks share: they tell the observer how they go, and log to the flow run."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass

from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from prefect_mlprojects._support.progress import progress_goes_to
from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.tasks.progress_artifacts import ProgressArtifacts
from prefect_mlprojects.tasks.session import RunSession, StepEvent, StepName, current_session
from prefect_mlprojects.types import StopSignal


@dataclass
class Step:
    """A step that is under way.

    Attributes:
        session: The run's companion.
        report: Takes lines about the progress, from any thread: for the flow run's log and the observer.
        detail: What to tell people when the step has finished.
    """

    session: RunSession
    report: Callable[[str], None]
    detail: str = ""

    @property
    def stop(self) -> StopSignal:
        """Tells the step to end."""
        return self.session.stop


@asynccontextmanager
async def run_step(name: StepName) -> AsyncIterator[Step]:
    """Tells the observer that the step started, and how it ended."""
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

    told: dict[str, int] = {}

    def progress(what: str, fraction: float) -> None:
        # A download tells each piece of it; people see whole percents.
        percent = int(fraction * 100)
        if told.get(what) != percent:
            told[what] = percent
            artifacts.take(what, fraction)
            session.observer.step(StepEvent(name, "progress", f"{what}: {percent} %"))

    session.set_begun()
    session.observer.step(StepEvent(name, "started"))
    try:
        with progress_goes_to(progress):
            yield step
    except BaseException as error:
        detail = error.message if isinstance(error, ExecutionException) else type(error).__name__
        session.observer.step(StepEvent(name, "failed", detail))
        raise
    finally:
        await artifacts.finish()
    session.observer.step(StepEvent(name, "finished", step.detail))


class PlainErrors(logging.Filter):
    """Logs a project's failure as its message: Prefect would add a traceback through this package, which helps nobody."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites a record about an :class:`ExecutionException`; lets every record pass."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, ExecutionException):
            record.msg, record.args, record.exc_info, record.exc_text = error.message, (), None, None
        return True


def install_plain_errors() -> None:
    """Puts :class:`PlainErrors` on the loggers of Prefect's engines; doing so twice does nothing."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(existing, PlainErrors) for existing in logger.filters):
            logger.addFilter(PlainErrors())
