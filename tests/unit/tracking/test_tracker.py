from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from prefect_mlprojects._support.secrets import Secret, reveal, reveal_values
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.tracking import TrackedRun, Tracker, TrackingRequest, child_variables, failure_tags
from prefect_mlprojects.tracking.records import run_description
from prefect_mlprojects.tracking.stores import UnreachableError
from prefect_mlprojects.tracking.uris import sqlite_path, sqlite_uri

RequestMaker = Callable[..., TrackingRequest]


@pytest.fixture
def tracker() -> Tracker:
    return Tracker()


@pytest.fixture(params=["sqlite", "file"])
def any_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sqlite":
        return str(request.getfixturevalue("uri"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def stored(run: TrackedRun) -> Any:
    return MlflowClient(reveal(run.tracking_uri)).get_run(run.run_id)


def test_start_new_run_records_tags_parameters_and_name(
    tracker: Tracker, any_uri: str, request_for: RequestMaker
) -> None:
    run = tracker.start(
        request_for(any_uri, parameters={"alpha": "0.5", "words": "a 'b' c"}, run_name="mine", flow_run_id="f")
    )

    found = stored(run)
    assert found.info.status == "RUNNING"
    assert found.info.end_time is None
    assert (run.run_name, found.info.run_name) == ("mine", "mine")
    assert run.experiment_id == found.info.experiment_id == "0"
    assert found.data.params == {"alpha": "0.5", "words": "a 'b' c"}
    assert found.data.tags["mlflow.project.entryPoint"] == "main"
    assert found.data.tags["prefect.flow_run_id"] == "f"
    assert found.data.tags["mlflow.runName"] == "mine"
    assert abs(found.info.start_time - time.time() * 1000) < 60_000


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_finish_sets_status_and_end_time(
    tracker: Tracker, any_uri: str, request_for: RequestMaker, status: Any
) -> None:
    run = tracker.start(request_for(any_uri))

    tracker.finish(run, status)

    found = stored(run)
    assert found.info.status == status
    assert found.info.end_time >= found.info.start_time


def test_finish_repeated_last_status_wins_and_same_status_is_no_op(
    tracker: Tracker, uri: str, request_for: RequestMaker
) -> None:
    run = tracker.start(request_for(uri))
    MlflowClient(uri).set_terminated(run.run_id, "FINISHED")

    tracker.finish(run, "FAILED")
    ended = stored(run).info.end_time
    tracker.finish(run, "FAILED")
    assert (stored(run).info.status, stored(run).info.end_time) == ("FAILED", ended)

    Tracker().finish(run, "KILLED")
    assert stored(run).info.status == "KILLED"


def test_metrics_returns_last_values_sorted_by_name(tracker: Tracker, any_uri: str, request_for: RequestMaker) -> None:
    run = tracker.start(request_for(any_uri))
    assert tracker.metrics(run) == {}
    client = MlflowClient(any_uri)
    client.log_metric(run.run_id, "rmse", 2.0, step=0)
    client.log_metric(run.run_id, "rmse", 1.5, step=1)
    client.log_metric(run.run_id, "mae", float("inf"))

    metrics = tracker.metrics(run)

    assert list(metrics) == ["mae", "rmse"]
    assert metrics["rmse"] == 1.5


def test_set_tags_after_start_sets_shortened_values(tracker: Tracker, any_uri: str, request_for: RequestMaker) -> None:
    run = tracker.start(request_for(any_uri))

    tracker.set_tags(run, {"mlflow.project.env": "uv", "long": "x" * 9000})
    tracker.set_tags(run, {})

    tags = stored(run).data.tags
    assert tags["mlflow.project.env"] == "uv"
    assert tags["long"] == "x" * 8000


def test_adopt_run_of_another_program_changes_nothing(
    tracker: Tracker, any_uri: str, request_for: RequestMaker
) -> None:
    client = MlflowClient(any_uri)
    created = client.create_run("0", run_name="theirs")
    adopted = tracker.adopt(created.info.run_id, Secret(any_uri))
    assert (adopted.run_id, adopted.run_name, adopted.tracking_uri) == (created.info.run_id, "theirs", Secret(any_uri))
    assert stored(adopted).info.status == "RUNNING"
    with pytest.raises(TrackingError, match="no-such-run"):
        tracker.adopt("no-such-run", Secret(any_uri))


def test_failure_tags_hold_category_and_redacted_cause(tracker: Tracker, uri: str, request_for: RequestMaker) -> None:
    run = tracker.start(request_for(uri))
    tracker.set_tags(run, failure_tags("out-of-memory", "killed at https://me:s3cret@host/"))
    tags = stored(run).data.tags
    assert tags["mlprojects.failure.category"] == "out-of-memory"
    assert tags["mlprojects.failure.cause"] == "killed at https://me:***@host/"


def test_start_many_long_parameters_records_all(tracker: Tracker, uri: str, request_for: RequestMaker) -> None:
    parameters = {f"p{number}": "中" * 6000 for number in range(30)} | {f"q{number}": "1" for number in range(250)}

    run = tracker.start(request_for(uri, parameters=parameters))

    assert stored(run).data.params == parameters


# Experiments


def test_start_experiment_name_creates_it_once(tracker: Tracker, any_uri: str, request_for: RequestMaker) -> None:
    first = tracker.start(request_for(any_uri, experiment_name="new one"))
    second = tracker.start(request_for(any_uri, experiment_name="new one"))

    assert first.experiment_id == second.experiment_id
    assert MlflowClient(any_uri).get_experiment(first.experiment_id).name == "new one"


def test_start_experiment_id_uses_it(tracker: Tracker, any_uri: str, request_for: RequestMaker) -> None:
    experiment_id = MlflowClient(any_uri).create_experiment("mine")

    assert tracker.start(request_for(any_uri, experiment_id=experiment_id)).experiment_id == experiment_id


def test_start_experiment_variables_choose_the_experiment(
    tracker: Tracker, uri: str, request_for: RequestMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment_id = MlflowClient(uri).create_experiment("by variable")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
    assert tracker.start(request_for(uri)).experiment_id == experiment_id

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    another = tracker.start(request_for(uri)).experiment_id
    assert MlflowClient(uri).get_experiment(another).name == "another"

    assert tracker.start(request_for(uri, experiment_id="0")).experiment_id == "0"


def test_start_experiment_name_and_id_raises(tracker: Tracker, uri: str, request_for: RequestMaker) -> None:
    with pytest.raises(TrackingError, match="Give only one of them"):
        tracker.start(request_for(uri, experiment_name="a", experiment_id="0"))


@pytest.mark.parametrize("by", ["name", "id"])
def test_start_deleted_experiment_suggests_restore_command(
    tracker: Tracker, any_uri: str, request_for: RequestMaker, by: str
) -> None:
    client = MlflowClient(any_uri)
    experiment_id = client.create_experiment("old")
    client.delete_experiment(experiment_id)
    chosen = {"experiment_name": "old"} if by == "name" else {"experiment_id": experiment_id}

    with pytest.raises(TrackingError) as caught:
        tracker.start(request_for(any_uri, **chosen))

    assert "'old'" in str(caught.value)
    assert f"mlflow experiments restore --experiment-id {experiment_id}" in str(caught.value)


@pytest.mark.parametrize("experiment_id", ["987654", "no-number", "a b;c"])
def test_start_unknown_experiment_id_is_named(
    tracker: Tracker, any_uri: str, request_for: RequestMaker, experiment_id: str
) -> None:
    with pytest.raises(TrackingError, match=f"No MLflow experiment with the ID '{experiment_id}'"):
        tracker.start(request_for(any_uri, experiment_id=experiment_id))


def test_start_experiment_name_refused_by_mlflow_raises(tracker: Tracker, uri: str, request_for: RequestMaker) -> None:
    with pytest.raises(TrackingError, match="500"):
        tracker.start(request_for(uri, experiment_name="x" * 600))


# Continued runs


def test_start_existing_run_continues_it(
    tracker: Tracker, any_uri: str, request_for: RequestMaker, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(any_uri)
    experiment_id = client.create_experiment("its own")
    old = client.create_run(experiment_id, run_name="old", tags={"mlflow.user": "somebody", "mine": "1"})
    client.log_param(old.info.run_id, "same", "1")
    client.log_param(old.info.run_id, "other", "1")
    client.set_terminated(old.info.run_id, "FAILED")

    with caplog.at_level(logging.WARNING):
        run = tracker.start(
            request_for(any_uri, run_id=old.info.run_id, parameters={"same": "1", "other": "2", "new": "3"})
        )

    found = stored(run)
    assert (run.run_id, run.experiment_id, run.run_name) == (old.info.run_id, experiment_id, "old")
    assert found.info.status == "RUNNING"
    assert found.data.params == {"same": "1", "other": "1", "new": "3"}
    assert found.data.tags["mlflow.user"] == "somebody"
    assert found.data.tags["mine"] == "1"
    assert found.data.tags["mlflow.project.entryPoint"] == "main"
    assert [record.getMessage() for record in caplog.records if record.name.startswith("prefect_mlprojects")] == [
        f"The run {run.run_id} has the parameter 'other' = '1' already; MLflow never changes one, so '2' is not recorded."
    ]
    tracker.finish(run, "FINISHED")
    assert stored(run).info.status == "FINISHED"


def test_start_existing_run_can_be_renamed_and_finished_again(
    tracker: Tracker, uri: str, request_for: RequestMaker
) -> None:
    first = tracker.start(request_for(uri, run_name="one"))
    tracker.finish(first, "FINISHED")

    again = tracker.start(request_for(uri, run_id=first.run_id, run_name="two"))
    assert stored(again).info.run_name == "two"
    tracker.finish(again, "FINISHED")

    assert stored(again).info.status == "FINISHED"


@pytest.mark.parametrize("run_id", ["0" * 32, "not a run id!"])
def test_start_unknown_run_id_raises(tracker: Tracker, any_uri: str, request_for: RequestMaker, run_id: str) -> None:
    with pytest.raises(TrackingError, match=f"No MLflow run with the ID '{run_id}'"):
        tracker.start(request_for(any_uri, run_id=run_id))


def test_start_deleted_run_suggests_restore_command(tracker: Tracker, any_uri: str, request_for: RequestMaker) -> None:
    run = tracker.start(request_for(any_uri))
    MlflowClient(any_uri).delete_run(run.run_id)

    with pytest.raises(TrackingError, match=f"mlflow runs restore --run-id {run.run_id}"):
        tracker.start(request_for(any_uri, run_id=run.run_id))
    with pytest.raises(TrackingError, match=f"could not set the run {run.run_id} to FINISHED"):
        tracker.finish(run, "FINISHED")


def test_metrics_unknown_run_raises(tracker: Tracker, uri: str) -> None:
    with pytest.raises(TrackingError, match="No MLflow run with the ID"):
        tracker.metrics(TrackedRun(run_id="0" * 32, experiment_id="0", tracking_uri=Secret(uri)))


# State that stays unchanged


def test_tracker_leaves_environment_and_mlflow_state_unchanged(
    tracker: Tracker, uri: str, request_for: RequestMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    environment, tracking_uri = dict(os.environ), mlflow.get_tracking_uri()

    run = tracker.start(request_for(uri, experiment_name="e"))
    tracker.finish(run, "FINISHED")

    environment["PYTEST_CURRENT_TEST"] = os.environ["PYTEST_CURRENT_TEST"]
    assert dict(os.environ) == environment
    assert mlflow.get_tracking_uri() == tracking_uri
    assert mlflow.active_run() is None
    assert capfd.readouterr() == ("", "")


def test_child_variables_identify_the_run() -> None:
    run = TrackedRun(run_id="r", experiment_id="3", tracking_uri=Secret("http://me:pw@host"))

    assert reveal_values(child_variables(run)) == {
        "MLFLOW_RUN_ID": "r",
        "MLFLOW_TRACKING_URI": "http://me:pw@host",
        "MLFLOW_EXPERIMENT_ID": "3",
    }


def test_child_variables_databricks_store_include_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("DATABRICKS_HOST", "https://workspace.example")
    monkeypatch.setenv("DATABRICKS_TOKEN", "secret")

    variables = reveal_values(child_variables(TrackedRun("r", "3", Secret("databricks"))))

    assert variables["DATABRICKS_HOST"] == "https://workspace.example"
    assert variables["DATABRICKS_TOKEN"] == "secret"
    assert variables["MLFLOW_TRACKING_URI"] == "databricks"


# New databases


def test_start_missing_database_creates_it_with_its_folders_only(
    tracker: Tracker, request_for: RequestMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new folder" / "100%" / "mlflow.db"

    run = tracker.start(request_for(sqlite_uri(path)))

    assert [entry.name for entry in path.parent.iterdir()] == ["mlflow.db"]
    assert {entry.name for entry in tmp_path.iterdir()} <= {"new folder", "cache"}
    assert stored(run).info.status == "RUNNING"
    assert MlflowClient(reveal(run.tracking_uri)).get_experiment("0").artifact_location == f"{tmp_path}/mlruns/0"
    assert capfd.readouterr() == ("", "")


def test_start_empty_file_becomes_a_database(tracker: Tracker, request_for: RequestMaker, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.touch()

    assert stored(tracker.start(request_for(sqlite_uri(path)))).info.status == "RUNNING"


def test_start_replaced_database_uses_the_new_file(
    tracker: Tracker, uri: str, request_for: RequestMaker, database_template: bytes
) -> None:
    tracker.start(request_for(uri))
    path = sqlite_path(uri)
    assert path is not None
    path.unlink()
    path.write_bytes(database_template)

    run = tracker.start(request_for(uri))

    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("select run_uuid from runs").fetchall() == [(run.run_id,)]


def test_create_database_deletes_stale_temporary_files_only(
    tracker: Tracker, request_for: RequestMaker, tmp_path: Path
) -> None:
    old, young = (tmp_path / f".mlflow.db.{digit * 32}" for digit in "ab")
    old.touch()
    young.touch()
    os.utime(old, (1, 1))

    tracker.start(request_for(sqlite_uri(tmp_path / "mlflow.db")))

    assert not old.exists()
    assert young.exists()


def test_create_database_without_cache_folder_succeeds(
    tracker: Tracker, request_for: RequestMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "file"))

    assert stored(tracker.start(request_for(sqlite_uri(tmp_path / "mlflow.db")))).info.status == "RUNNING"


# Concurrency


def test_start_fifty_concurrent_runs_share_one_database(tracker: Tracker, uri: str, request_for: RequestMaker) -> None:
    failures: list[BaseException] = []
    runs: list[TrackedRun] = []

    def one(number: int) -> None:
        try:
            run = tracker.start(request_for(uri, experiment_name="shared", parameters={"n": str(number)}))
            tracker.set_tags(run, {"n": str(number)})
            tracker.finish(run, "FINISHED")
            runs.append(run)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert len({run.experiment_id for run in runs}) == 1
    found = MlflowClient(uri).search_runs([runs[0].experiment_id], max_results=100)
    assert sorted(int(run.data.params["n"]) for run in found) == list(range(50))
    assert {run.info.status for run in found} == {"FINISHED"}


def test_start_locked_database_is_retried(tracker: Tracker, uri: str, request_for: RequestMaker) -> None:
    path = sqlite_path(uri)
    assert path is not None
    tracker.warm_up(Secret(uri))
    locker = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(1.0, locker.rollback)
    timer.start()

    run = tracker.start(request_for(uri))

    timer.join()
    locker.close()
    assert stored(run).info.status == "RUNNING"


# Unusable stores


def test_start_file_that_is_not_a_database_raises_at_once(
    tracker: Tracker, request_for: RequestMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"This is no database. " * 100)

    with pytest.raises(TrackingError, match=rf"{path}: file is not a database\. The file is damaged") as caught:
        tracker.start(request_for(sqlite_uri(path)))

    assert caught.value.tracking_uri == sqlite_uri(path)
    assert path.read_bytes() == b"This is no database. " * 100
    assert capfd.readouterr() == ("", "")


def test_start_folder_instead_of_database_raises(tracker: Tracker, request_for: RequestMaker, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").mkdir()

    with pytest.raises(TrackingError, match=r"unable to open database file. Make the file and its folder writable"):
        tracker.start(request_for(sqlite_uri(tmp_path / "mlflow.db")))


def test_start_folder_that_cannot_be_created_raises(
    tracker: Tracker, request_for: RequestMaker, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(TrackingError, match="could not open the tracking database"):
        tracker.start(request_for(sqlite_uri(tmp_path / "file" / "mlflow.db")))


def test_start_database_of_newer_mlflow_suggests_upgrade(tracker: Tracker, uri: str, request_for: RequestMaker) -> None:
    path = sqlite_path(uri)
    with contextlib.closing(sqlite3.connect(str(path))) as database, database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")

    with pytest.raises(TrackingError, match=r"out-of-date database schema.*mlflow db upgrade"):
        tracker.start(request_for(uri))


def test_start_file_store_passes_on_the_refusal_of_mlflow(
    tracker: Tracker, request_for: RequestMaker, tmp_path: Path
) -> None:
    with pytest.raises(TrackingError, match="MLFLOW_ALLOW_FILE_STORE=true"):
        tracker.start(request_for((tmp_path / "mlruns").as_uri()))


def test_start_unknown_store_scheme_raises(tracker: Tracker, request_for: RequestMaker) -> None:
    with pytest.raises(TrackingError, match="nonsense://x"):
        tracker.start(request_for("nonsense://x"))


def test_start_server_down_names_it_without_password(
    tracker: Tracker, request_for: RequestMaker, unused_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnreachableError) as caught:
        tracker.start(request_for(f"http://me:hunter2@127.0.0.1:{unused_port}"))

    shown = f"http://me:***@127.0.0.1:{unused_port}"
    assert str(caught.value) == (
        f"The MLflow tracking store {shown} can't be reached: Connection refused. "
        "Start it, or set MLFLOW_TRACKING_URI to another store."
    )
    assert caught.value.tracking_uri == shown
    assert capfd.readouterr() == ("", "")


def test_start_unknown_host_is_named(tracker: Tracker, request_for: RequestMaker) -> None:
    with pytest.raises(UnreachableError, match=r"http://nowhere.invalid can't be reached"):
        tracker.start(request_for("http://nowhere.invalid"))


def test_start_database_server_down_names_it_without_password(
    tracker: Tracker, request_for: RequestMaker, unused_port: int
) -> None:
    with pytest.raises(
        UnreachableError, match=rf"postgresql://me:\*\*\*@127.0.0.1:{unused_port}/mlflow can't be reached"
    ):
        tracker.start(request_for(f"postgresql://me:hunter2@127.0.0.1:{unused_port}/mlflow"))


# A file-size limit simulates a full disk; it applies to a process, so the test needs its own.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import Tracker, TrackingRequest
path, uri = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker()
tracker.warm_up(Secret(uri))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
copy = WorkingCopy(directory=path.parent, uri="x", kind="local", source_name="x")
tracker.start(TrackingRequest(tracking_uri=Secret(uri), working_copy=copy, entry_point="main"))
"""


def test_start_full_disk_suggests_freeing_space(uri: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(sqlite_path(uri)), uri], capture_output=True, text=True
    )

    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("prefect_mlprojects.exceptions.TrackingError: MLflow could not create the run")
    assert "Free some space on the disk that holds the database." in last
    assert "[SQL:" not in result.stderr


def test_finish_keeps_the_failure_that_the_project_itself_recorded(
    tracker: Tracker, any_uri: str, request_for: RequestMaker
) -> None:
    run = tracker.start(request_for(any_uri))
    MlflowClient(any_uri).set_terminated(run.run_id, "FAILED")
    tracker.finish(run, "FINISHED")
    assert stored(run).info.status == "FAILED"


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_finish_ends_running_runs_below(tracker: Tracker, any_uri: str, request_for: RequestMaker, status: Any) -> None:
    run, other = tracker.start(request_for(any_uri)), tracker.start(request_for(any_uri))
    client = MlflowClient(any_uri)
    experiment = client.create_experiment("of the child")

    def nested(parent: str, experiment_id: str = "0") -> str:
        made = client.create_run(experiment_id, tags={"mlflow.parentRunId": parent})
        return str(made.info.run_id)

    child = nested(run.run_id, experiment)
    ended = nested(run.run_id)
    client.set_terminated(ended, "FINISHED")
    below = [child, nested(child), nested(ended)]
    unrelated = nested(other.run_id)
    tracker.finish(run, status)
    assert [client.get_run(each).info.status for each in below] == [status] * 3
    assert [client.get_run(each).info.status for each in (ended, unrelated)] == ["FINISHED", "RUNNING"]


def test_late_parameters_are_those_that_the_code_has_not_logged(
    tracker: Tracker, uri: str, request_for: RequestMaker
) -> None:
    run = tracker.start(request_for(uri, parameters={"word": "a"}, late_parameters={"rate": "5", "depth": "10"}))
    assert stored(run).data.params == {"word": "a"}
    MlflowClient(uri).log_param(run.run_id, "rate", 5.0)

    tracker.finish(run, "FINISHED")

    assert stored(run).data.params == {"word": "a", "rate": "5.0", "depth": "10"}


def test_continued_run_with_the_same_number_written_otherwise_warns_of_nothing(
    tracker: Tracker, uri: str, request_for: RequestMaker, caplog: pytest.LogCaptureFixture
) -> None:
    first = tracker.start(request_for(uri))
    MlflowClient(uri).log_param(first.run_id, "rate", 5.0)
    tracker.finish(first, "FINISHED")
    tracker.start(request_for(uri, run_id=first.run_id, parameters={"rate": "5"}))
    assert caplog.text == ""


def test_description_replaces_our_own_only(tracker: Tracker, uri: str, request_for: RequestMaker) -> None:
    run = tracker.start(request_for(uri))
    tracker.finish(run, "FAILED", description=run_description("f-1", "http://ui/f-1", "exit ``` code 3"))
    text = stored(run).data.tags["mlflow.note.content"]
    assert "[Flow run f-1](http://ui/f-1)" in text
    assert "````text\nexit ``` code 3\n````" in text
    assert "`mlprojects rerun f-1`" in text

    again = tracker.start(request_for(uri, run_id=run.run_id))
    tracker.finish(again, "FINISHED", description=run_description("f-1", None))
    assert "exit" not in stored(run).data.tags["mlflow.note.content"]

    MlflowClient(uri).set_tag(run.run_id, "mlflow.note.content", "mine")
    third = tracker.start(request_for(uri, run_id=run.run_id))
    tracker.finish(third, "KILLED", description=run_description("f-1", None))
    assert stored(run).data.tags["mlflow.note.content"] == "mine"


def test_experiment_of_the_project_is_the_last_choice(
    tracker: Tracker, uri: str, request_for: RequestMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(**fields: Any) -> str:
        run = tracker.start(request_for(uri, project_experiment="project", **fields))
        return str(MlflowClient(uri).get_experiment(run.experiment_id).name)

    assert chosen() == "project"
    assert chosen(experiment_name="caller") == "caller"
    assert chosen(experiment_id="0") == "Default"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "variable")
    assert chosen() == "variable"
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    assert chosen() == "Default"
