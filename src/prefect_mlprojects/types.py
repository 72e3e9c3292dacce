"""The typing names that users annotate with, and small values that every layer shares."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Protocol, TypeAlias

RunStatus: TypeAlias = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
"""What ``SubmittedRun.get_status()`` answers; the names are MLflow's."""

EnvironmentManagerName: TypeAlias = Literal["local", "virtualenv", "uv", "conda"]
"""The environment managers, as ``--env-manager`` names them."""

StreamName: TypeAlias = Literal["stdout", "stderr"]

DockerArgs: TypeAlias = Mapping[str, Any]
"""Arguments for the container, in MLflow's flag form or as a mapping."""

BackendConfig: TypeAlias = Mapping[str, Any]
"""A backend's configuration as users write it."""


class FailureCategory(str, Enum):
    """Why a run did not finish, as a stable word: on `RunFailed.category`, in MLflow's tag ``mlprojects.failure.category``.

    Attributes:
        USER_CODE: The project's code, its files or the request's values are wrong: a non-zero exit code, a crash, a missing
            parameter.
        OUT_OF_MEMORY: The command exceeded its memory limit.
        IMAGE: The image or environment could not be found, pulled, built or started.
        SCHEDULING: No machine could be found for the command.
        PREEMPTED: The machine was taken away: eviction, a spot instance, a drained node.
        INFRASTRUCTURE: A service that the run needs failed or refused it.
        TIMEOUT: The run exceeded its time-out.
        CANCELLED: Its user cancelled it.
        LOST: Its end could not be observed.
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
        """Receives the next bytes of a stream, unchanged; may block for a while to slow the program down."""


class StopSignal:
    """Carries the request to end one run; thread-safe, idempotent.

    The first request wins: its reason stays. Callbacks run once, in the requesting thread (at once when the request
    was made already), so they must be quick and must not raise.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._reason: str | None = None

    @property
    def requested(self) -> bool:
        """True once a stop was requested."""
        return self._event.is_set()

    @property
    def reason(self) -> str | None:
        """Who or what requested the stop, for people to read; None before a request."""
        return self._reason

    def request(self, reason: str) -> None:
        """Requests a stop.

        Args:
            reason: Who or what requests it, for people to read.
        """
        with self._lock:
            if self._event.is_set():
                return
            self._reason = reason
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for a stop request.

        Args:
            timeout: Longest wait in seconds; None waits without a limit.

        Returns:
            Whether the request has come.
        """
        return self._event.wait(timeout)

    def on_request(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls ``callback`` once when the request comes, or now when it has come.

        Returns:
            A function that removes the callback; idempotent.
        """
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
