from __future__ import annotations

import threading

import pytest

from prefect_mlprojects._support.retry import Backoff, retry
from prefect_mlprojects.types import StopSignal


class Work:
    def __init__(self, failures: int, error: Exception) -> None:
        self.calls, self._failures, self._error = 0, failures, error

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return "done"


def test_delays_double_up_to_the_limit_and_restart_after_a_reset() -> None:
    backoff = Backoff(first=1, longest=4)
    delays = [backoff.next() for _ in range(4)]
    for delay, nominal in zip(delays, [1, 2, 4, 4], strict=True):
        assert 0.7 * nominal <= delay <= nominal
    backoff.reset()
    assert backoff.next() <= 1


def test_retry_after_is_respected_up_to_a_minute() -> None:
    assert Backoff().next(retry_after=7) == 7
    assert Backoff().next(retry_after=7000) == 60


def test_transient_error_is_retried_and_reported() -> None:
    work, seen = Work(2, ConnectionError("away")), list[str]()
    result = retry(
        work,
        is_transient=lambda error: isinstance(error, ConnectionError),
        attempts=3,
        backoff=Backoff(first=0.001),
        on_retry=lambda error, _: seen.append(str(error)),
    )
    assert (result, work.calls, seen) == ("done", 3, ["away", "away"])


def test_last_error_and_permanent_error_are_raised() -> None:
    work = Work(9, ConnectionError("away"))
    with pytest.raises(ConnectionError):
        retry(work, is_transient=lambda _: True, attempts=2, backoff=Backoff(first=0.001))
    assert work.calls == 2
    work = Work(9, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        retry(work, is_transient=lambda error: isinstance(error, OSError), attempts=5)
    assert work.calls == 1


def test_stop_request_ends_retries() -> None:
    stop, work = StopSignal(), Work(9, ConnectionError("away"))
    threading.Timer(0.05, lambda: stop.request("test")).start()
    with pytest.raises(ConnectionError):
        retry(work, is_transient=lambda _: True, attempts=5, stop=stop, backoff=Backoff(first=300, longest=300))
    assert work.calls == 1
