"""The package's one way to try something again: delays that grow, with jitter, a limit and a stop request."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from prefect_mlprojects.types import StopSignal

_T = TypeVar("_T")

_LONGEST_RETRY_AFTER = 60.0


class Backoff:
    """Delays in seconds that double up to a limit, with jitter so that clients don't return at the same moment."""

    def __init__(self, first: float = 0.25, longest: float = 10.0) -> None:
        """Starts at `first` seconds and ends at `longest`."""
        self._first = self._delay = first
        self._longest = longest

    def next(self, retry_after: float | None = None) -> float:
        """Returns the next delay; at least `retry_after`, up to a minute, when the server asked for it."""
        delay, self._delay = self._delay, min(self._delay * 2, self._longest)
        jitter = random.uniform(0.7, 1.0)  # noqa: S311 - no secret
        return max(delay * jitter, min(retry_after or 0.0, _LONGEST_RETRY_AFTER))

    def reset(self) -> None:
        """Returns to the first delay."""
        self._delay = self._first


def retry(
    work: Callable[[], _T],
    *,
    is_transient: Callable[[Exception], bool],
    attempts: int | None = None,
    seconds: float | None = None,
    stop: StopSignal | None = None,
    backoff: Backoff | None = None,
    on_retry: Callable[[Exception, float], None] | None = None,
) -> _T:
    """Returns what `work` returns; calls it again while it fails with a transient error.

    Args:
        work: The work; it must be idempotent.
        is_transient: Whether an error may go away by itself. Its attribute ``retry_after``, in seconds, is respected.
        attempts: How often `work` is called at most; None: no limit.
        seconds: How long to retry; None: no limit.
        stop: Ends the waiting: the last error is raised at once.
        backoff: The delays; default: a quarter of a second to ten seconds.
        on_retry: Called before each delay with the error and the delay in seconds.

    Raises:
        Exception: The last error of `work`.
    """
    backoff = backoff or Backoff()
    waiter = stop or StopSignal()
    deadline = None if seconds is None else time.monotonic() + seconds
    attempt = 0
    while True:
        attempt += 1
        try:
            return work()
        except Exception as error:
            if attempt == attempts or waiter.requested or not is_transient(error):
                raise
            delay = backoff.next(getattr(error, "retry_after", None))
            if deadline is not None and time.monotonic() + delay > deadline:
                raise
            if on_retry is not None:
                on_retry(error, delay)
            if waiter.wait(delay):
                raise
