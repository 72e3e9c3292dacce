"""Type aliases for users' annotations, and small types that all layers share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Protocol, TypeAlias

RunStatus: TypeAlias = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
"""MLflow's run status, as ``SubmittedRun.get_status()`` returns it."""

EnvironmentManagerName: TypeAlias = Literal["local", "virtualenv", "uv", "conda"]
"""The environment managers, as ``--env-manager`` names them."""

WorkerStop: TypeAlias = Literal["cancel", "wait"]
"""What a worker does with the runs that it executes when it is stopped."""

StreamName: TypeAlias = Literal["stdout", "stderr"]

DockerArgs: TypeAlias = Mapping[str, Any]
"""Arguments for the container, by their names in ``docker run``."""

BackendConfig: TypeAlias = Mapping[str, Any]
"""A backend's configuration as users write it."""


class FailureCategory(str, Enum):
    """The stable category of a failure: in `RunFailed.category` and MLflow's tag ``mlprojects.failure.category``.

    Attributes:
        USER_CODE: The command failed, or the project's files or the run request are invalid.
        OUT_OF_MEMORY: The command exceeded its memory limit.
        IMAGE: The image or environment could not be found, pulled, built or started.
        SCHEDULING: No machine was available for the command.
        PREEMPTED: The machine was withdrawn: eviction, spot instance, drained node.
        INFRASTRUCTURE: A service that the run needs failed or refused it.
        TIMEOUT: The run exceeded its time-out.
        CANCELLED: The user cancelled the run.
        LOST: The end of the run could not be observed.
    """

    USER_CODE = "user-code"
    OUT_OF_MEMORY = "out-of-memory"
    IMAGE = "image"
    SCHEDULING = "scheduling"
    PREEMPTED = "preempted"
    INFRASTRUCTURE = "infrastructure"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    LOST = "lost"

    def __str__(self) -> str:
        return self.value


class OutputSink(Protocol):
    """Receives a program's output as it is printed."""

    def write(self, stream: StreamName, data: bytes) -> None:
        """Receives the next bytes of a stream; may block to slow the program down."""


class StopSignal:
    """The stop request of one run; thread-safe and idempotent: the first request's reason is kept.

    Callbacks run once, in the requesting thread, so they must be quick and must not raise.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._reason: str | None = None
        self._interrupted = False

    @property
    def interrupted(self) -> bool:
        """True if the stop was requested by Ctrl-C: processes then get SIGINT first, as from a terminal."""
        return self._interrupted

    @property
    def requested(self) -> bool:
        """True once a stop was requested."""
        return self._event.is_set()

    @property
    def reason(self) -> str | None:
        """Why the stop was requested, for users; None before a request."""
        return self._reason

    def request(self, reason: str, *, interrupted: bool = False) -> None:
        """Requests a stop for a reason that is shown to users."""
        with self._lock:
            if self._event.is_set():
                return
            self._reason, self._interrupted = reason, interrupted
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits up to `timeout` seconds (None: without a limit) and returns whether a stop was requested."""
        return self._event.wait(timeout)

    def on_request(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Registers a callback, called at once if a stop was requested; returns an idempotent function that removes it."""
        with self._lock:
            if not self._event.is_set():
                self._callbacks.append(callback)
                return lambda: self._forget(callback)
        callback()
        return lambda: None

    def _forget(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)
