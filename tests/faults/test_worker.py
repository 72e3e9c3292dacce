"""A worker that is stopped or dies: its runs' states in Prefect and in MLflow are true, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tests.services.waiting import is_alive, wait_for

from prefect_mlprojects import deploy
from prefect_mlprojects.deployments.worker import default_limit

Call = Callable[..., Any]
PROJECT = """\
entry_points:
  main:
    parameters: {folder: string}
    command: "touch {folder}/begun; while [ ! -e {folder}/end ]; do sleep 0.2; echo more; done; touch {folder}/done"
"""


@pytest.fixture
def run(project: Path, pool: str, tmp_path: Path) -> Iterator[Any]:
    """A run that waits for a worker, and ends when the file ``end`` exists."""
    name = (project / "MLproject").read_text().splitlines()[0]
    (project / "MLproject").write_text(f"{name}\n{PROJECT}")
    made = deploy(project, work_pool=pool, env_manager="local")
    handle = made.run({"folder": str(tmp_path)})
    yield handle
    (tmp_path / "end").touch()


@pytest.fixture
def worker(run: Any, pool: str, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts ``mlprojects worker``, and returns its process when it executes the run."""
    processes = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        with (tmp_path / "worker.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect_mlprojects", "worker", "--pool", pool, *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1"},
                **options,
            )
        processes.append(process)
        wait_for((tmp_path / "begun").exists, "the run's program", log=tmp_path / "worker.log")
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def truths(run: Any, call: Call) -> tuple[str, str]:
    """The run's final states in Prefect and in MLflow."""
    state = wait_for(lambda: (found := call("read_flow_run", run.flow_run_id).state).is_final() and found, "its end")
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    wait_for(lambda: client.get_run(run.run_id).info.status != "RUNNING", "its end in MLflow", 30)
    return state.type.value, client.get_run(run.run_id).info.status


def worker_child(process: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = [int(each) for each in children]
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_stopped_worker_cancels_its_runs(
    number: signal.Signals, run: Any, worker: Any, call: Call, tmp_path: Path
) -> None:
    # As in a script, whose `&` starts it with SIGINT ignored.
    process = worker(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    child = worker_child(process)
    process.send_signal(number)
    assert process.wait(120) == 0, (tmp_path / "worker.log").read_text()
    assert truths(run, call) == ("CANCELLED", "KILLED")
    assert not is_alive(child)
    assert "no more runs are taken, 1 run cancelled" in (tmp_path / "worker.log").read_text()
    # The program ended with its run.
    (tmp_path / "end").touch()
    time.sleep(0.5)
    assert not (tmp_path / "done").exists()


def test_stopped_worker_waits_for_its_runs_if_told_so_until_the_second_signal(
    run: Any, worker: Any, call: Call, pool: str, tmp_path: Path
) -> None:
    process = worker("--on-stop", "wait")
    later = call("read_flow_run", run.flow_run_id)
    waiting = call("create_flow_run_from_deployment", later.deployment_id, parameters=later.parameters)
    process.send_signal(signal.SIGTERM)
    log = tmp_path / "worker.log"
    wait_for(lambda: "1 run awaited" in log.read_text(), "the first signal", log=log)
    time.sleep(2)
    assert process.poll() is None
    assert call("read_flow_run", run.flow_run_id).state.is_running()
    (tmp_path / "end").touch()
    assert process.wait(120) == 0
    assert truths(run, call) == ("COMPLETED", "FINISHED")
    # It took no more.
    assert call("read_flow_run", waiting.id).state.is_scheduled()
    call("delete_flow_run", waiting.id)


@pytest.mark.parametrize("which", ["command", "both"])
def test_killed_worker_leaves_its_runs_to_their_end(
    which: str, run: Any, worker: Any, call: Call, tmp_path: Path
) -> None:
    process = worker()
    child = worker_child(process)
    process.kill()
    if which == "both":
        os.kill(child, signal.SIGKILL)
    time.sleep(2)
    assert call("read_flow_run", run.flow_run_id).state.is_running()
    (tmp_path / "end").touch()
    assert truths(run, call) == ("COMPLETED", "FINISHED")
    assert (tmp_path / "done").exists()
    wait_for(lambda: not is_alive(child), "the worker's end")


def test_default_limit_fits_the_machine() -> None:
    assert 1 <= default_limit() <= 4 * (os.cpu_count() or 1)
