"""The session of a run: secrets, stop signal, output and observer, which are passed in memory.

Prefect stores flow parameters and shows them in its UI. A flow run that a worker starts gets a session with the defaults.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prefect_mlprojects._support.event_loop import SIGNAL_SECONDS
from prefect_mlprojects._support.known_secrets import KnownSecrets
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.request.check import RunSecrets
from prefect_mlprojects.settings import output_artifact_bytes
from prefect_mlprojects.tasks.output_copy import OutputCopy
from prefect_mlprojects.tracking import TrackedRun, Tracker
from prefect_mlprojects.types import FailureCategory, OutputSink, RunStatus, StopSignal, StreamName

if TYPE_CHECKING:
    from rich.console import Console

_logger = logging.getLogger(__name__)

StepName: TypeAlias = Literal["fetch", "resolve-env", "validate-params", "execute"]
STEPS: tuple[StepName, ...] = ("fetch", "resolve-env", "validate-params", "execute")


@dataclass(frozen=True)
class StepEvent:
    """An event in one of a run's steps; the detail is shown to users, the time is of the monotonic clock.

    A `quiet` detail is a line of a build's output, which is only shown while it is the latest; a failed step has them all
    in `output`.
    """

    step: StepName
    phase: Literal["started", "progress", "finished", "failed", "cancelled"]
    detail: str = ""
    at: float = field(default_factory=time.monotonic)
    quiet: bool = False
    output: tuple[str, ...] = ()


class RunObserver:
    """Receives a run's events in the process that started it, on the event loop's thread: it must be quick.

    This one ignores them.
    """

    def step(self, event: StepEvent) -> None:
        """Receives an event of a step."""

    def tracked(self, run: TrackedRun) -> None:
        """Receives the MLflow run once it exists."""


class TerminalOutput:
    """Forwards a program's output to this process's stdout and stderr, unbuffered and byte for byte.

    Streams without a byte buffer, as in a notebook, get decoded text.
    """

    _lock = threading.Lock()

    def write(self, stream: StreamName, data: bytes) -> None:
        """Writes to the stream of that name; ignores errors of a closed or broken one."""
        target = sys.stdout if stream == "stdout" else sys.stderr
        if target is None:
            return
        try:
            with self._lock:
                buffer = getattr(target, "buffer", None)
                if buffer is None:
                    target.write(data.decode("utf-8", "replace"))
                else:
                    target.flush()
                    buffer.write(data)
                target.flush()
        except (OSError, ValueError):
            # The reader of our output exited (`| head`); the run and its log continue.
            return


def quiet_on_broken_pipe(console: Console) -> None:
    """Lets a console go quiet when its reader is gone (`| head`, a worker that died); rich would exit the process."""
    console.on_broken_pipe = partial(setattr, console, "quiet", True)  # type: ignore[method-assign]


class _GuardedObserver(RunObserver):
    """Passes events on to an observer, whose failures never reach the run."""

    def __init__(self, observer: RunObserver) -> None:
        self._observer = observer

    def step(self, event: StepEvent) -> None:
        self._call(self._observer.step, event)

    def tracked(self, run: TrackedRun) -> None:
        self._call(self._observer.tracked, run)

    def _call(self, method: Callable[[Any], None], argument: Any) -> None:
        try:
            method(argument)
        except (Exception, SystemExit) as error:
            _logger.debug("An observer of the run failed", exc_info=error)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        run_id: The MLflow run's id; None when the run ended before there was one.
        flow_run_id: The Prefect flow run's id.
        message: Why it ended so; empty for a finished run.
        exit_code: The command's exit code, when it exited by itself and this process knows it.
        experiment_id: The MLflow experiment's id, when there is an MLflow run.
        tracking_uri: The tracking URI, redacted, when this process knows it.
        error: The error of a run that failed in this process.
        category: The stable category of a failure; None for a finished run.
        cause: Why the command ended, in a few words ("exit code 3"); may be empty.
        metrics: The last values of a finished run's metrics, if this process knows them.
    """

    status: RunStatus
    run_id: str | None
    flow_run_id: str
    message: str = ""
    exit_code: int | None = None
    experiment_id: str | None = None
    tracking_uri: str | None = None
    error: ExecutionException | None = None
    category: FailureCategory | None = None
    cause: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class RunSession:
    """The state of one run in the process that started it; waiters are notified of changes.

    Attributes:
        tracking_uri: The tracking URI; None for the one that this process resolves.
        name: ``project/entry_point``; empty until it is known.
        parent_run_id: The MLflow run that this one is nested in.
        tags: Tags of the flow run that this process starts.
        begun: True once the first step has started.
        started_here: False if no caller in this process started the run: a worker's policy applies to it.
        downloads: The folder of downloaded parameters to remove with the run.
        output_copy: The end of the command's output, for the MLflow run's artifacts.
        server_lost: True once the run, after a stop request, no longer waits for its Prefect server.
    """

    stop: StopSignal = field(default_factory=StopSignal)
    tracker: Tracker = field(default_factory=Tracker)
    tracking_uri: Secret | None = None
    parent_run_id: str | None = None
    secrets: RunSecrets = field(default_factory=RunSecrets, repr=False)
    output: OutputSink = field(default_factory=TerminalOutput)
    observer: RunObserver = field(default_factory=RunObserver)
    rebuild_environment: bool = False
    started_here: bool = True
    name: str = ""
    tags: tuple[str, ...] = ()

    flow_run_id: str | None = field(default=None, init=False)
    tracked_run: TrackedRun | None = field(default=None, init=False)
    downloads: Path | None = field(default=None, init=False)
    output_copy: OutputCopy = field(default_factory=lambda: OutputCopy(output_artifact_bytes()), init=False)
    result: RunResult | None = field(default=None, init=False)
    begun: bool = field(default=False, init=False)
    server_lost: bool = field(default=False, init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)

    known_secrets: KnownSecrets = field(default_factory=KnownSecrets, init=False, repr=False)

    def __post_init__(self) -> None:
        """Guards the run against its observer."""
        self.observer = _GuardedObserver(self.observer)

    def set_flow_run_id(self, flow_run_id: str) -> None:
        """Signals that the flow run was created."""
        self.flow_run_id = flow_run_id
        self.wake()

    def set_begun(self) -> None:
        """Signals that the first step has started."""
        self.begun = True
        self.wake()

    def set_tracked_run(self, run: TrackedRun) -> None:
        """Signals that the MLflow run was created."""
        self.tracked_run = run
        self.wake()
        self.observer.tracked(run)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the MLflow run, redacted; a no-op without one, or without tags."""
        if self.tracked_run is not None and tags:
            self.tracker.set_tags(self.tracked_run, {name: redact(value) for name, value in tags.items()})

    def set_result(self, result: RunResult) -> None:
        """Publishes the run's result to waiters."""
        self.result = result
        self.wake()

    def wait_until(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits until `condition` is true, re-evaluated on every change of this session, or for `timeout` seconds."""
        with self._changed:
            if timeout is not None:
                return self._changed.wait_for(condition, timeout)
            # The system may deliver Ctrl-C to another thread, which does not wake this one.
            while not self._changed.wait_for(condition, SIGNAL_SECONDS):
                pass
            return True

    def wake(self) -> None:
        """Wakes the waiters, so that they re-evaluate their conditions."""
        with self._changed:
            self._changed.notify_all()


_current: ContextVar[RunSession | None] = ContextVar("prefect_mlprojects_session", default=None)


def current_session() -> RunSession:
    """Returns the session of the current flow run, or one with the defaults: a worker or ``serve`` started it."""
    return _current.get() or RunSession(started_here=False)


@contextmanager
def shared_session() -> Iterator[RunSession]:
    """Sets the current session for the block, so that all tasks of a flow run share it."""
    session = current_session()
    token = _current.set(session)
    try:
        yield session
    finally:
        _current.reset(token)


def use_session(session: RunSession) -> None:
    """Sets the session of the flow run that will start in this context."""
    _current.set(session)
