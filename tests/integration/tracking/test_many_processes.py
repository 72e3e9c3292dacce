"""Concurrent processes that create and share one database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

from prefect_mlprojects.tracking.uris import sqlite_uri

PROGRAM = """
import sys, threading
from pathlib import Path
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import Tracker, TrackingRequest
uri, name = sys.argv[1:]
copy = WorkingCopy(directory=Path.cwd(), uri="x", kind="local", source_name="x")
tracker = Tracker()
import mlflow
print("ready", flush=True)
sys.stdin.readline()
def one(number):
    request = TrackingRequest(
        tracking_uri=Secret(uri),
        working_copy=copy,
        entry_point="main",
        experiment_name="shared",
        parameters={"n": f"{name}{number}"},
    )
    tracker.finish(tracker.start(request), "FINISHED")
threads = [threading.Thread(target=one, args=(number,)) for number in range(17)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_concurrent_processes_create_and_fill_one_database(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path / "new" / "mlflow.db")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, uri, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "abc"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    for process in processes:
        out, err = process.communicate()
        assert (out, err, process.returncode) == ("", "", 0)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("shared")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert {run.data.params["n"] for run in runs} == {f"{name}{number}" for name in "abc" for number in range(17)}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["mlflow.db"]
