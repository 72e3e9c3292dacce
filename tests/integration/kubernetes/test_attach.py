"""After the process that watches a Job was killed, another process of the same flow run attaches to the Job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.backends.kubernetes.manifest import WATCHED_ANNOTATION

_ROOT = Path(__file__).parents[3]
_RUN = """
import json, sys
from pathlib import Path
from tests.integration.kubernetes.conftest import Cluster, Recorder

class Printer(Recorder):
    def write(self, stream, data):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def report(self, line):
        print("REPORT", line, flush=True)

config, image, namespace, project, flow_run_id, command = json.loads(sys.stdin.readline())
cluster = Cluster(config, image, None, None, None, namespace, Path(project), None, False, Printer())
print("OUTCOME", cluster.run(command, flow_run_id).succeeded, flush=True)
"""


def _start(cluster: Any, flow_run_id: str, command: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    assert process.stdin is not None
    what = [cluster.config, cluster.image, cluster.namespace, str(cluster.project), flow_run_id, command]
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.close()
    return process


def _read_until(process: subprocess.Popen[str], line: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or lines[-1] != line:
        text = process.stdout.readline()
        assert text, lines
        lines.append(text.rstrip("\n"))
    return lines


def test_successor_of_killed_watcher_attaches(cluster: Any) -> None:
    flow_run_id, command = str(uuid.uuid4()), "for i in 1 2 3 4 5 6 7 8; do echo line $i; sleep 1; done"
    first = _start(cluster, flow_run_id, command)
    _read_until(first, "line 2")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = _start(cluster, flow_run_id, command)
    lines = _read_until(second, "OUTCOME True")
    second.wait()
    assert any(line.startswith("REPORT Found the Job that runs already") for line in lines)
    assert [line for line in lines if line.startswith("line")] == [f"line {each}" for each in range(1, 9)]
    assert len(cluster.jobs) == len(cluster.pods) == 1
    # Its end was observed: another attempt of the flow run is another Job.
    assert cluster.run("echo again", flow_run_id).output_tail == ("again",)
    assert len(cluster.jobs) == 2


@pytest.mark.parametrize("before", ["create secrets", "patch jobs", "watch pods"])
def test_successor_of_killed_submitter_submits_once(cluster: Any, proxy: Any, before: str) -> None:
    from tests.services.fault_proxy import Fault

    flow_run_id = str(uuid.uuid4())
    stuck = proxy.add(Fault(before, delay=600))
    first = _start(cluster, flow_run_id, "echo done")
    cluster.wait_for(lambda: stuck.hits)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    outcome = cluster.run("echo done", flow_run_id)
    assert outcome.succeeded
    assert outcome.output_tail == ("done",)
    assert len(cluster.jobs) == 1
    assert not proxy.requests.count("create jobs") > 1


def test_job_that_ended_unwatched_reports_its_outcome(cluster: Any) -> None:
    flow_run_id = str(uuid.uuid4())
    first = _start(cluster, flow_run_id, "echo begun; sleep 2; echo oops; exit 5")
    _read_until(first, "begun")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    cluster.wait_for(lambda: any(condition.type == "Failed" for condition in cluster.jobs[0].status.conditions or []))
    outcome = cluster.run("never", flow_run_id)
    assert (outcome.exit_code, outcome.output_tail) == (5, ("begun", "oops"))
    assert len(cluster.jobs) == 1


def test_unwatched_jobs_are_listed_and_cleaned(cluster: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from prefect_mlprojects.cli.backends import kubernetes_command

    flow_run_id = str(uuid.uuid4())
    first = _start(cluster, flow_run_id, "echo begun; sleep 1000")
    _read_until(first, "begun")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # As if that had been an hour ago.
    hour_ago = (datetime.now(timezone.utc) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    age = {"metadata": {"annotations": {WATCHED_ANNOTATION: hour_ago}}}
    cluster.batch.patch_namespaced_job(cluster.jobs[0].metadata.name, cluster.namespace, age)
    options = ["--namespace", cluster.namespace]
    if cluster.real:
        options += ["--context", cluster.config["kube-context"]]
    else:
        (tmp_path / "kubeconfig").write_text(json.dumps(cluster.config["kubeconfig"]))
        options += ["--kubeconfig", str(tmp_path / "kubeconfig")]
    runner = CliRunner()
    (listed,) = json.loads(runner.invoke(kubernetes_command, ["list", "--json", *options]).output)
    assert (listed["state"], listed["flow_run_id"], listed["finished"]) == ("unwatched", flow_run_id, False)
    assert "Would delete 1 Job." in runner.invoke(kubernetes_command, ["clean", "--dry-run", *options]).output
    assert len(cluster.jobs) == 1
    assert "Deleted 1 Job." in runner.invoke(kubernetes_command, ["clean", *options]).output
    cluster.wait_for(lambda: not cluster.jobs and not cluster.pods)
