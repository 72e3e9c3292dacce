from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.databricks_api import Refusal
from tests.integration.databricks.bench import CLUSTER, FAST, Bench
from tests.services.waiting import is_alive, wait_for

from prefect_mlprojects.exceptions import BackendError

SLEEP = "import time, sys\nprint('started', flush=True)\ntime.sleep(600)\n"


@pytest.mark.parametrize(
    ("code", "kind", "message", "advice"),
    [
        ("CLOUD_FAILURE", "CLOUD_FAILURE", "AWS: InsufficientInstanceCapacity in us-west-2a", "node type or zone"),
        ("CLUSTER_ERROR", "CLIENT_ERROR", "Cluster 1 was terminated. Reason: BOOTSTRAP_TIMEOUT", "event log"),
        ("INTERNAL_ERROR", "INTERNAL_ERROR", "Unexpected failure while waiting for the cluster", "support"),
        ("WORKSPACE_RUN_LIMIT_EXCEEDED", "CLIENT_ERROR", "The limit of 1000 is reached", "higher limit"),
        ("CLUSTER_REQUEST_LIMIT_EXCEEDED", "CLIENT_ERROR", "You are limited to 200 requests", "pool"),
        ("BUDGET_POLICY_LIMIT_EXCEEDED", "CLIENT_ERROR", "The budget is spent", "budget policy"),
    ],
)
def test_start_failure_reports_databricks_message_and_advice(
    bench: Bench, code: str, kind: str, message: str, advice: str
) -> None:
    bench.program(SLEEP)
    bench.workspace.fail(code, kind, message)

    outcome = bench.run()

    assert not outcome.succeeded
    assert message in outcome.cause
    assert advice in outcome.advice


def test_skipped_run_ends_as_not_started(bench: Bench) -> None:
    bench.program(SLEEP)
    bench.workspace.fail("SKIPPED", "CLIENT_ERROR", "The run was skipped.", life_cycle="SKIPPED", result=None)

    assert bench.run().ending == "not-started"


def test_uninstallable_library_is_reported(bench: Bench) -> None:
    bench.program(SLEEP)

    outcome = bench.run({"libraries": [{"pypi": {"package": "six==99.99"}}]})

    assert outcome.ending == "not-started"
    assert "a library could not be installed" in outcome.cause
    assert "six==99.99" in outcome.cause
    assert "libraries" in outcome.advice


def test_databricks_own_timeout_ends_the_run(bench: Bench) -> None:
    bench.program(SLEEP)

    outcome = bench.run({"timeout": 1})

    assert outcome.ending == "timed-out"
    assert "Run timed out after 1 seconds" in outcome.cause
    assert bench.last.process.poll() is not None


def test_our_timeout_cancels_the_run(bench: Bench) -> None:
    bench.program(SLEEP)

    outcome = bench.run(timeout=2.0)

    assert outcome.ending == "timed-out"
    assert bench.last.result == "CANCELED"


def test_run_cancelled_by_another_user_names_the_user(bench: Bench) -> None:
    bench.program(SLEEP)
    thread, found, _ = bench.start()
    wait_for(lambda: b"started" in bench.recorder.streams["stdout"], "the command")

    bench.last.cancelled_by = "bob@example.com"
    bench.last.asked_to_end.set()
    thread.join(60)

    assert found[0].ending == "stopped"
    assert "cancelled by bob@example.com" in found[0].cause


def test_queued_run_is_cancelled_before_it_starts(bench: Bench) -> None:
    bench.workspace.drivers.hold = "QUEUED"
    bench.program(SLEEP)
    thread, found, stop = bench.start()
    wait_for(lambda: any("QUEUED" in line for line in bench.recorder.reports), "the queue")

    stop.request("enough")
    thread.join(60)

    assert found[0].ending == "stopped"
    assert bench.last.result == "CANCELED"
    assert bench.last.process is None


def test_stopped_command_can_exit_gracefully_and_leaves_no_child(bench: Bench, tmp_path: Path) -> None:
    bench.program(
        "import os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "def end(number, frame):\n"
        "    time.sleep(0.5); print('saved', flush=True); os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('started', flush=True)\ntime.sleep(600)\n",
        "python main.py; true",
    )
    thread, found, stop = bench.start({"existing-cluster-id": "c-1"})
    wait_for(lambda: b"started" in bench.recorder.streams["stdout"], "the command")

    stop.request("enough")
    thread.join(60)

    assert found[0].ending == "stopped"
    assert b"saved" in bench.recorder.streams["stdout"]
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_alive(child), "the child's end")


def test_rate_limits_and_errors_and_lost_answers_do_not_lose_the_run(bench: Bench) -> None:
    bench.program("import time; time.sleep(3); print('done')")
    slow = Refusal(429, "REQUEST_LIMIT_EXCEEDED", "Too many requests", {"Retry-After": "1"})
    bench.workspace.troubles += [
        ("scim", Refusal(503, "TEMPORARILY_UNAVAILABLE", "down")),
        ("workspace/import", "drop"),
        ("runs/submit", "drop-answer"),
        ("runs/submit", Refusal(502, "BAD_GATEWAY", "Bad Gateway")),
        ("runs/get", slow),
        ("runs/get", Refusal(500, "INTERNAL_ERROR", "broken")),
        ("runs/get", "drop"),
        ("workspace/export", "drop"),
    ]

    outcome = bench.run()

    assert outcome.succeeded, outcome
    assert b"done" in bench.recorder.streams["stdout"]
    assert bench.workspace.troubles == []
    assert len(bench.workspace.runs) == 1


def test_workspace_with_rate_limit_completes_run(bench: Bench) -> None:
    bench.program("print('done')")
    bench.workspace.rate_limit = 4

    assert bench.run().succeeded
    assert b"done" in bench.recorder.streams["stdout"]


def test_lost_network_is_retried_until_it_returns(bench: Bench) -> None:
    bench.program("import time; print('started', flush=True); time.sleep(2)")
    thread, found, _ = bench.start()
    wait_for(lambda: b"started" in bench.recorder.streams["stdout"], "the command")
    bench.workspace.unreachable = True
    time.sleep(3)
    assert thread.is_alive()

    bench.workspace.unreachable = False
    thread.join(60)

    assert found[0].succeeded


def test_lost_network_beyond_timeout_raises_and_names_run(bench: Bench) -> None:
    bench.program(SLEEP)
    told = []
    stop_watching = bench.recorder.report

    def report(line: str) -> None:
        stop_watching(line)
        if "RUNNING" in line:
            bench.workspace.unreachable = True
            told.append(line)

    bench.recorder.report = report  # type: ignore[method-assign]

    with pytest.raises(BackendError, match=r"The Databricks run 1000 can't be watched \(it may still be running\)"):
        bench.run({"network-timeout": 2})


def test_stop_during_lost_network_cancels_run(bench: Bench) -> None:
    bench.program(SLEEP)
    thread, found, stop = bench.start()
    wait_for(lambda: b"started" in bench.recorder.streams["stdout"], "the command")
    bench.workspace.unreachable = True
    time.sleep(0.5)
    stop.request("enough")
    time.sleep(0.5)

    bench.workspace.unreachable = False
    thread.join(60)

    assert found[0].ending == "stopped"
    assert bench.last.result == "CANCELED"


def test_killed_watcher_reattaches_to_its_run(bench: Bench, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    bench.program(
        f"import os, time\nprint('started', flush=True)\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.05)\n"
    )
    flow_run_id = str(uuid.uuid4())
    script = textwrap.dedent(f"""
        from pathlib import Path
        from tests.integration.databricks.bench import Bench
        bench = Bench(None, Path({str(bench.folder)!r}))
        bench.run(flow_run_id={flow_run_id!r})
    """)
    root = Path(__file__).parents[3]
    watcher = subprocess.Popen([sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    wait_for(lambda: 1000 in bench.workspace.runs and bench.last.life_cycle == "RUNNING", "the submission")
    watcher.send_signal(signal.SIGKILL)
    watcher.wait()

    thread, found, _ = bench.start(flow_run_id=flow_run_id)
    wait_for(lambda: b"started" in bench.recorder.streams["stdout"], "its output")
    gate.touch()
    thread.join(60)

    assert found[0].succeeded
    assert list(bench.workspace.runs) == [1000]


def test_reported_failure_is_followed_by_new_run(bench: Bench) -> None:
    bench.program("raise SystemExit(3)")
    flow_run_id = str(uuid.uuid4())

    assert bench.run(flow_run_id=flow_run_id).exit_code == 3
    assert bench.run(flow_run_id=flow_run_id).exit_code == 3

    tokens = [run.body["idempotency_token"] for run in bench.workspace.runs.values()]
    assert tokens == [f"mlp-{flow_run_id}-0", f"mlp-{flow_run_id}-1"]


def test_killed_command_reports_its_signal(bench: Bench) -> None:
    bench.program("import os; os.kill(os.getpid(), 9)")

    outcome = bench.run()

    assert outcome.signal == signal.SIGKILL
    assert "SIGKILL" in outcome.cause
    assert "memory" in outcome.advice


def test_dead_driver_is_reported_with_its_last_output(bench: Bench) -> None:
    bench.program(
        "import os, signal, time\n"
        "print('first', flush=True); time.sleep(2.5); print('last words', flush=True); time.sleep(0.2)\n"
        "os.kill(os.getppid(), signal.SIGKILL)\n"
    )

    outcome = bench.run()

    assert not outcome.succeeded
    assert "the driver died" in outcome.cause
    assert "memory" in outcome.advice
    assert (
        bench.recorder.streams["stdout"].count(b"first") == bench.recorder.streams["stdout"].count(b"last words") == 1
    )


def test_unknown_cluster_is_reported(bench: Bench) -> None:
    bench.program(SLEEP)

    with pytest.raises(BackendError, match="Cluster c-2 does not exist"):
        bench.run({"existing-cluster-id": "c-2"})

    assert bench.files("runs") == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"environment": {"dependencies": ["six"]}}, "client or environment_version is required"),
        ({"libraries": [{"pypi": {"package": "six"}, "jar": "x"}]}, "exactly one of"),
        ({"libraries": [{"pypi": {"packge": "six"}}]}, "has no 'packge'"),
        ({"new_cluster": {"spark_version": "15.4.x-scala2.12", "num_workers": "many"}}, "num_workers to be int"),
    ],
)
def test_config_rejected_by_databricks_reports_its_message(bench: Bench, config: dict[str, Any], message: str) -> None:
    bench.program(SLEEP)

    with pytest.raises(BackendError, match=message):
        bench.run(config)

    assert bench.workspace.runs == {}


def test_poll_of_idle_run_sends_two_requests(bench: Bench) -> None:
    bench.program(SLEEP)
    thread, _, stop = bench.start({"new_cluster": CLUSTER, **FAST, "max-poll-interval": 0.3})
    wait_for(lambda: b"started" in bench.recorder.streams["stdout"], "the command")
    before = len(bench.workspace.requests)
    time.sleep(2)
    seen = bench.workspace.requests[before:]
    stop.request("enough")
    thread.join(60)

    looks = sum("runs/get" in path for _, path in seen)
    assert looks >= 2
    assert abs(len(seen) - 2 * looks) <= 1
