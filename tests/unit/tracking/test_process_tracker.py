from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tests.services.waiting import is_alive, wait_for

from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.exceptions import InvalidTrackingError, TrackingError
from prefect_mlprojects.tracking import ProcessTracker, TrackedRun, Tracker, TrackingRequest, process_tracker
from prefect_mlprojects.tracking.stores import UnreachableError
from prefect_mlprojects.tracking.uris import sqlite_uri

RequestMaker = Callable[..., TrackingRequest]


@pytest.fixture
def tracker(uri: str) -> Iterator[ProcessTracker]:
    tracker = ProcessTracker(Secret(uri))
    yield tracker
    tracker.close()


def process_of(tracker: ProcessTracker) -> subprocess.Popen[bytes]:
    return tracker._process


def stored(run: TrackedRun) -> Any:
    return MlflowClient(reveal(run.tracking_uri)).get_run(run.run_id)


def test_adopt_run_of_another_program_leaves_it_running(tracker: ProcessTracker, uri: str) -> None:
    created = MlflowClient(uri).create_run("0", run_name="theirs")
    adopted = tracker.adopt(created.info.run_id, Secret(uri))
    assert (adopted.run_id, adopted.run_name) == (created.info.run_id, "theirs")
    tracker.close()
    assert stored(adopted).info.status == "RUNNING"


def test_run_from_start_to_finish_is_recorded(
    tracker: ProcessTracker,
    uri: str,
    request_for: RequestMaker,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        run = tracker.start(
            request_for(uri, parameters={"a": "ä\u2028", "long": "x" * 7000}, run_name="mine", experiment_name="e")
        )
    MlflowClient(uri).log_metric(run.run_id, "rmse", 0.5)
    MlflowClient(uri).log_metric(run.run_id, "nan", float("nan"))
    tracker.set_tags(run, {"k": "v"})
    metrics = tracker.metrics(run)
    tracker.finish(run, "KILLED")
    tracker.close()
    tracker.close()

    found = stored(run)
    assert found.info.status == "KILLED"
    assert found.data.params == {"a": "ä\u2028", "long": "x" * 6000}
    assert found.data.tags["k"] == "v"
    assert (run.run_name, run.tracking_uri, run.experiment_id) == ("mine", Secret(uri), found.info.experiment_id)
    assert list(metrics) == ["nan", "rmse"]
    assert metrics["rmse"] == 0.5
    assert metrics["nan"] != metrics["nan"]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("prefect_mlprojects")] == [
        "The parameter 'long' has 7000 characters; MLflow records its first 6000."
    ]
    assert capfd.readouterr() == ("", "")
    assert process_of(tracker).returncode == 0


def test_methods_of_tracker_are_all_executed_by_the_process() -> None:
    public = {name for name, method in vars(Tracker).items() if callable(method) and not name.startswith("_")}

    # These two serve the process itself and MLflow's plugins, which have a process of their own already.
    assert process_tracker._methods == public - {"warm_up", "resolve_experiment", "close"}


def test_finish_with_keywords_sets_status_and_tags(
    tracker: ProcessTracker, uri: str, request_for: RequestMaker
) -> None:
    run = tracker.start(request=request_for(uri))

    tracker.finish(run, tags={"why": "out-of-memory"}, status="FAILED")

    assert stored(run).info.status == "FAILED"
    assert stored(run).data.tags["why"] == "out-of-memory"


def test_process_does_not_import_optional_packages(
    tracker: ProcessTracker, uri: str, request_for: RequestMaker
) -> None:
    tracker.start(request_for(uri))

    maps = Path(f"/proc/{process_of(tracker).pid}/maps").read_text()

    assert "sqlite3" in maps
    assert "numpy" not in maps
    assert "pandas" not in maps


def test_output_of_mlflow_does_not_disturb_replies(
    uri: str, request_for: RequestMaker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # SQLAlchemy's echo goes to stdout.
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_ECHO", "true")
    tracker = ProcessTracker(Secret(uri))

    run = tracker.start(request_for(uri))
    tracker.finish(run, "FINISHED")
    tracker.close()

    assert capfd.readouterr() == ("", "")
    assert stored(run).info.status == "FINISHED"


def test_errors_of_the_process_keep_their_type(
    tracker: ProcessTracker, uri: str, request_for: RequestMaker, unused_port: int
) -> None:
    with pytest.raises(TrackingError, match="No MLflow run with the ID") as unknown:
        tracker.start(request_for(uri, run_id="0" * 32))
    with pytest.raises(UnreachableError, match="Connection refused") as down:
        tracker.start(request_for(f"http://me:hunter2@127.0.0.1:{unused_port}"))

    assert type(unknown.value) is InvalidTrackingError
    assert unknown.value.tracking_uri == uri
    assert down.value.tracking_uri == f"http://me:***@127.0.0.1:{unused_port}"


def test_start_fifty_concurrent_runs_succeeds(tracker: ProcessTracker, uri: str, request_for: RequestMaker) -> None:
    failures: list[BaseException] = []

    def one(number: int) -> None:
        try:
            tracker.finish(tracker.start(request_for(uri, parameters={"n": str(number)})), "FINISHED")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    found = MlflowClient(uri).search_runs(["0"], max_results=100)
    assert sorted(int(run.data.params["n"]) for run in found) == list(range(50))
    assert {run.info.status for run in found} == {"FINISHED"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_shutdown_signals_do_not_end_the_process(
    tracker: ProcessTracker, uri: str, request_for: RequestMaker, number: signal.Signals
) -> None:
    run = tracker.start(request_for(uri))
    process = process_of(tracker)

    os.kill(process.pid, number)
    tracker.finish(run, "KILLED")

    assert stored(run).info.status == "KILLED"
    # Ctrl-C reaches the terminal's foreground group only.
    assert os.getsid(process.pid) != os.getsid(0)


def test_close_during_import_of_mlflow_ends_the_process(uri: str) -> None:
    tracker = ProcessTracker(Secret(uri))

    tracker.close()

    assert process_of(tracker).returncode == 0


def has_content(folder: Path) -> bool:
    for entry in folder.iterdir():
        # SQLite's journals come and go.
        with contextlib.suppress(FileNotFoundError):
            if entry.stat().st_size:
                return True
    return False


def test_close_during_database_creation_leaves_a_complete_database(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    tracker = ProcessTracker(Secret(sqlite_uri(folder / "mlflow.db")))
    wait_for(lambda: folder.exists() and has_content(folder), "the database's folder", 60)

    tracker.close()

    assert [entry.name for entry in folder.iterdir()] == ["mlflow.db"]


def test_kill_during_database_creation_leaves_no_partial_database(tmp_path: Path, request_for: RequestMaker) -> None:
    folder = tmp_path / "new"
    uri = sqlite_uri(folder / "mlflow.db")
    tracker = ProcessTracker(Secret(uri))
    wait_for(lambda: folder.exists() and has_content(folder), "the database's folder", 60)

    process_of(tracker).kill()
    tracker.close()
    assert not (folder / "mlflow.db").exists()

    second = ProcessTracker(Secret(uri))
    assert stored(second.start(request_for(uri))).info.status == "RUNNING"
    second.close()


def test_start_after_close_raises(tracker: ProcessTracker, uri: str, request_for: RequestMaker) -> None:
    tracker.close()

    with pytest.raises(TrackingError, match="was closed before this call"):
        tracker.start(request_for(uri))


def test_process_killed_between_calls_uses_mlflow_of_this_process(
    tracker: ProcessTracker, uri: str, request_for: RequestMaker, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracker.start(request_for(uri))
    process_of(tracker).kill()
    process_of(tracker).wait()

    with caplog.at_level(logging.WARNING):
        tracker.finish(run, "FINISHED")
        tracker.set_tags(run, {"k": "v"})
        assert tracker.metrics(run) == {}
        another = tracker.start(request_for(uri))

    assert stored(run).info.status == "FINISHED"
    assert stored(run).data.tags["k"] == "v"
    assert stored(another).info.status == "RUNNING"
    assert [record.getMessage() for record in caplog.records if record.name.startswith("prefect_mlprojects")] == [
        "The process that talks to MLflow ended unexpectedly (signal 9). MLflow is used in this process instead."
    ]


def test_process_killed_during_start_raises_and_creates_no_second_run(uri: str, request_for: RequestMaker) -> None:
    tracker = ProcessTracker(Secret(uri))
    killer = threading.Timer(0.3, process_of(tracker).kill)
    killer.start()

    # MLflow's import takes longer than that, so the process can't have answered.
    with pytest.raises(TrackingError, match=r"ended unexpectedly \(signal 9\)"):
        tracker.start(request_for(uri))

    killer.join()
    tracker.close()


def test_file_named_mlflow_in_working_directory_is_not_imported(
    uri: str, request_for: RequestMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])

    tracker = ProcessTracker(Secret(uri))
    run = tracker.start(request_for(uri))
    tracker.close()

    assert stored(run).info.status == "RUNNING"


# The parent of the tracker process, which a test can kill.
PARENT = """
import json, os, signal, sys
from pathlib import Path
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import ProcessTracker, TrackingRequest
uri, end = sys.argv[1:]
tracker = ProcessTracker(Secret(uri))
copy = WorkingCopy(directory=Path.cwd(), uri="x", kind="local", source_name="x")
request = TrackingRequest(tracking_uri=Secret(uri), working_copy=copy, entry_point="main")
first, second = tracker.start(request), tracker.start(request)
tracker.finish(second, "FINISHED")
print(json.dumps([first.run_id, second.run_id, tracker._process.pid]), flush=True)
if end == "close":
    tracker.close()
elif end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "status"), [("kill", "FAILED"), ("exit", "FAILED"), ("close", "RUNNING")])
def test_process_ends_with_its_parent_and_fails_unfinished_runs(uri: str, end: str, status: str) -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT, uri, end], stdout=subprocess.PIPE, text=True)
    first, second, process_id = json.loads(parent.stdout)

    wait_for(lambda: not is_alive(process_id), "the end of the tracking process", 60)

    client = MlflowClient(uri)
    assert client.get_run(first).info.status == status
    assert client.get_run(second).info.status == "FINISHED"


# An MLflow that can't be imported without numpy.
GREEDY = """
import sys
sys.path.insert(0, sys.argv[1])
from prefect_mlprojects.tracking._mlflow_internals import import_mlflow
import_mlflow("sqlite:////x.db")
import mlflow
print(mlflow.what)
"""


def test_import_mlflow_that_needs_optional_packages_succeeds(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").touch()
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").write_text("import mlflow.part\nwhat = mlflow.part.numpy.__name__\n")
    (tmp_path / "mlflow" / "part.py").write_text("import numpy\n")

    result = subprocess.run([sys.executable, "-c", GREEDY, str(tmp_path)], capture_output=True, text=True)

    assert result.stdout.strip() == "numpy", result.stderr
