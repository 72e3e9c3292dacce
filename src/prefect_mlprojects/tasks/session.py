"""What a flow run needs that is not a flow parameter: secrets, handles and observers of the process that started it.

Flow parameters are stored by Prefect and shown in its UI; what must not be there, or can't be (a stop signal), travels in
memory. A flow run that a worker starts gets a session with the defaults.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.sources.git.credentials import GitCredentialsLookup
from prefect_mlprojects.tracking import TrackedRun, Tracker
from prefect_mlprojects.types import FailureCategory, OutputSink, RunStatus, StopSignal, StreamName

StepName: TypeAlias = Literal["fetch", "resolve-env", "validate-params", "execute"]
STEPS: tuple[StepName, ...] = ("fetch", "resolve-env", "validate-params", "execute")


@dataclass(frozen=True)
class StepEvent:
    """An event in one of the four steps of a run.

    Attributes:
        step: Which step.
        phase: ``started``, ``progress``, ``finished`` or ``failed``.
        detail: What to show ("reused", "uv, Python 3.11.7"); may be empty.
        at: When, in seconds of the monotonic clock.
    """

    step: StepName
    phase: Literal["started", "progress", "finished", "failed"]
    detail: str = ""
    at: float = field(default_factory=time.monotonic)


class RunObserver(Protocol):
    """Watches a run from the process that started it; called on the event loop's thread, so it must be quick."""

    def step(self, event: StepEvent) -> None:
        """Receives an event of a step."""

    def tracked(self, run: TrackedRun) -> None:
        """Receives the MLflow run as soon as it exists."""


class QuietObserver:
    """Ignores everything."""

    def step(self, event: StepEvent) -> None:
        """Ignores it."""

    def tracked(self, run: TrackedRun) -> None:
        """Ignores it."""


class TerminalOutput:
    """Passes a program's output on to this process's own stdout and stderr, at once and byte for byte.

    Where the stream has no byte buffer (a notebook's, a captured one) the text is decoded.
    """

    _lock = threading.Lock()

    def write(self, stream: StreamName, data: bytes) -> None:
        """Writes to the stream of that name; a closed or broken stream is left alone."""
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
            # The reader of our output went away (`| head`); the run and its log continue.
            return


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        run_id: The MLflow run's id; None when the run ended before there was one.
        flow_run_id: The Prefect flow run's id.
        message: Why it ended as it did, in words.
        exit_code: The command's exit code, when it exited by itself and this process knows it.
        experiment_id: The MLflow experiment's id, when there is an MLflow run.
        tracking_uri: The tracking URI, passwords masked, when this process knows it.
        error: The error of a run that failed in this process.
        category: The stable category of a failure; None for a finished run.
        cause: Why the command ended, in a few words ("exit code 3"); may be empty.
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


@dataclass
class RunSession:
    """What holds one run together in the process that started it.

    Attributes:
        stop: The run's stop signal.
        tracker: Keeps the MLflow run.
        tracking_uri: The tracking URI to use; None: as this process finds it.
        parent_run_id: The MLflow run that this one is nested in.
        project_uri: The project's URI, when it holds a secret and the flow run's parameters have it without.
        docker_auth: Registry credentials given to ``run()``.
        backend_secrets: What of the backend's configuration must not be stored with the flow run.
        git_credentials: Finds credentials for git repositories; None leaves that to git.
        output: Where the project's output is shown.
        observer: Watches the steps.
        rebuild_environment: Builds the environment even if it is cached.
    """

    stop: StopSignal = field(default_factory=StopSignal)
    tracker: Tracker = field(default_factory=Tracker)
    tracking_uri: Secret | None = None
    parent_run_id: str | None = None
    project_uri: Secret | None = None
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    backend_secrets: Mapping[str, Any] | None = field(default=None, repr=False)
    git_credentials: GitCredentialsLookup | None = None
    output: OutputSink = field(default_factory=TerminalOutput)
    observer: RunObserver = field(default_factory=QuietObserver)
    rebuild_environment: bool = False

    flow_run_id: str | None = field(default=None, init=False)
    tracked_run: TrackedRun | None = field(default=None, init=False)
    result: RunResult | None = field(default=None, init=False)
    begun: bool = field(default=False, init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)

    def set_flow_run_id(self, flow_run_id: str) -> None:
        """Signals that the flow run was created."""
        with self._changed:
            self.flow_run_id = flow_run_id
            self._changed.notify_all()

    def set_begun(self) -> None:
        """Signals that the first step has begun."""
        with self._changed:
            self.begun = True
            self._changed.notify_all()

    def set_tracked_run(self, run: TrackedRun) -> None:
        """Signals that the MLflow run was created."""
        with self._changed:
            self.tracked_run = run
            self._changed.notify_all()
        self.observer.tracked(run)

    def set_result(self, result: RunResult) -> None:
        """Publishes the run's result to waiters."""
        with self._changed:
            self.result = result
            self._changed.notify_all()

    def wait_until(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits until ``condition`` is true; re-evaluates it on every change of this session.

        Args:
            condition: What to wait for.
            timeout: Longest wait in seconds; None waits without a limit.

        Returns:
            Whether it holds.
        """
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def wake(self) -> None:
        """Wakes the waiters, which re-evaluate their conditions."""
        with self._changed:
            self._changed.notify_all()


_current: ContextVar[RunSession | None] = ContextVar("prefect_mlprojects_session", default=None)


def current_session() -> RunSession:
    """Returns the session of the flow run that this code belongs to, or one with the defaults."""
    return _current.get() or RunSession()


@contextmanager
def shared_session() -> Iterator[RunSession]:
    """Shares the current session with everything in this block: a flow's tasks see the same stop signal and run."""
    session = current_session()
    token = _current.set(session)
    try:
        yield session
    finally:
        _current.reset(token)


def use_session(session: RunSession) -> None:
    """Sets the session of the flow run that starts in this context."""
    _current.set(session)
