"""Retries with exponential back-off, jitter, a limit and a stop request."""

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
    """Calls the idempotent `work` until it succeeds and returns its result; raises its last error.

    It is retried while its error is transient, `attempts` calls and `seconds` at most (None: no limit), and no stop was
    requested. An error's attribute ``retry_after``, in seconds, is respected. `on_retry` receives the error and the delay.
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
