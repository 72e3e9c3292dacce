"""The stop signal."""

from __future__ import annotations

from prefect_mlprojects.types import StopSignal


def test_stop_signal_keeps_first_reason_and_runs_callbacks_once() -> None:
    stop, calls = StopSignal(), []
    stop.on_request(lambda: calls.append("kept"))
    forget = stop.on_request(lambda: calls.append("forgotten"))
    forget()
    forget()
    assert not stop.requested
    assert not stop.wait(0)
    stop.request("first")
    stop.request("second")
    assert (stop.requested, stop.reason, calls) == (True, "first", ["kept"])
    stop.on_request(lambda: calls.append("late"))
    assert calls == ["kept", "late"]
    assert stop.wait()
