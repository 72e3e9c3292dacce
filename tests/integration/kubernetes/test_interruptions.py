"""A run survives lost connections, expired watches, an overloaded server and lost answers."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import pytest
from tests.services.fault_proxy import Fault

_SLOW_COUNT = "i=1; while [ $i -le 40 ]; do echo line $i; i=$((i+1)); sleep 0.1; done"
_LINES = [f"line {each}" for each in range(1, 41)]


def _lines(cluster: Any) -> list[str]:
    text: str = cluster.recorder.data.decode()
    return text.splitlines()


_LATER = {"Retry-After": "1"}
_SUBMITTING = ("create jobs", "create secrets", "create configmaps", "patch jobs")

_CASES = {
    "410 in the stream": [Fault("watch jobs", expire=True), Fault("watch pods", expire=True)],
    "410": [Fault("watch jobs", status=410), Fault("watch pods", status=410)],
    "cut watches": [Fault("watch pods", cut_after=700, times=3), Fault("watch jobs", cut_after=300)],
    "logs cut in the middle of lines": [Fault("get pods/log", cut_after=each) for each in (100, 37, 500, 900)],
    "429": [
        Fault(f"{verb} {what}", status=429, headers=_LATER) for verb in ("list", "watch") for what in ("jobs", "pods")
    ],
    "5xx": [
        Fault("watch pods", status=503, times=2),
        Fault("watch jobs", status=500),
        Fault("get pods/log", status=500),
    ],
    "5xx while submitting": [Fault("create jobs", status=503), Fault("create secrets", status=500)],
    "lost answers while submitting": [Fault(each, lose_answer=True) for each in _SUBMITTING],
    "slow answers": [Fault(each, delay=2) for each in ("list jobs", "watch pods", "get pods/log")],
}


@pytest.mark.parametrize("name", _CASES)
def test_run_survives_faults(cluster: Any, proxy: Any, name: str) -> None:
    own = [proxy.add(fault) for fault in _CASES[name]]
    outcome = cluster.run(_SLOW_COUNT)
    assert outcome.succeeded, outcome
    assert _lines(cluster) == _LINES
    assert len(cluster.jobs) == 1
    assert all(fault.hits for fault in own), own


def test_many_lines_survive_cut_logs(cluster: Any, proxy: Any) -> None:
    for size in (10_000, 3_333, 50_001, 1, 77_777):
        proxy.add(Fault("get pods/log", cut_after=size))
    assert cluster.run("seq 20000; sleep 2; seq 20001 30000").succeeded
    assert _lines(cluster) == [str(each) for each in range(1, 30001)]


def test_equal_lines_are_neither_lost_nor_repeated(cluster: Any, proxy: Any) -> None:
    for size in (200, 450, 990, 20):
        proxy.add(Fault("get pods/log", cut_after=size))
    assert cluster.run("for i in 1 2 3 4 5 6 7 8; do yes same | head -n 25; sleep 0.2; done").succeeded
    assert _lines(cluster) == ["same"] * 200


def test_lines_of_retried_pod_are_marked(cluster: Any, proxy: Any) -> None:
    proxy.add(Fault("get pods/log", cut_after=90, times=2))
    outcome = cluster.run("echo one; sleep 1; echo two; exit 4", **{"backoff-limit": 1})
    assert (outcome.ending, outcome.exit_code) == ("exited", 4)
    assert "BackoffLimitExceeded" in outcome.cause
    lines = _lines(cluster)
    assert lines[:2] == ["one", "two"]
    first, second = sorted(cluster.pods, key=lambda pod: pod.metadata.creation_timestamp)
    assert lines[2:] == [f"[{second.metadata.name}] one", f"[{second.metadata.name}] two"]
    assert first.metadata.name != second.metadata.name


def test_stop_on_overloaded_server_removes_the_job(cluster: Any, proxy: Any) -> None:
    proxy.add(Fault("delete jobs", status=503, times=2))
    proxy.add(Fault("delete jobs", lose_answer=True))
    proxy.add(Fault("list pods", status=429, headers={"Retry-After": "1"}))

    outcome = cluster.run_and_stop("enough")
    assert (outcome.ending, outcome.cause) == ("stopped", "enough")
    assert (cluster.pods, cluster.jobs) == ([], [])


def test_concurrent_callers_submit_one_job(cluster: Any, proxy: Any) -> None:
    flow_run_id = str(uuid.uuid4())
    proxy.add(Fault("dry-run create jobs", delay=1, times=2))
    outcomes: list[Any] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(cluster.run("echo once; sleep 1", flow_run_id)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.succeeded for outcome in outcomes] == [True, True]
    assert len(cluster.jobs) == len(cluster.pods) == 1
