from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.exceptions import FetchError, TrackingError
from prefect_mlprojects.sources.downloads import download
from prefect_mlprojects.tracking import ProcessTracker, TrackedRun, Tracker, TrackingRequest
from prefect_mlprojects.tracking.stores import UnreachableError, download_artifacts
from prefect_mlprojects.types import StopSignal

RequestMaker = Callable[..., TrackingRequest]


@pytest.fixture(params=["in-process", "tracker process"])
def tracker(request: pytest.FixtureRequest, server: Any) -> Iterator[Tracker]:
    tracker: Tracker = Tracker() if request.param == "in-process" else ProcessTracker(Secret(server.uri))
    yield tracker
    tracker.close()


def stored(run: TrackedRun) -> Any:
    return MlflowClient(reveal(run.tracking_uri)).get_run(run.run_id)


def test_run_from_start_to_finish_is_recorded(
    tracker: Tracker, server: Any, request_for: RequestMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    parameters = {f"p{number}": "中" * 6000 for number in range(30)}
    run = tracker.start(request_for(server.uri, experiment_name="over http", parameters=parameters, run_name="mine"))
    MlflowClient(server.uri).log_metric(run.run_id, "rmse", 0.5)
    tracker.set_tags(run, {"k": "v"})
    metrics = tracker.metrics(run)
    tracker.finish(run, "FINISHED")

    found = stored(run)
    assert found.info.status == "FINISHED"
    assert found.info.end_time >= found.info.start_time
    assert found.data.params == parameters
    assert found.data.tags["k"] == "v"
    assert found.info.run_name == "mine"
    assert metrics == {"rmse": 0.5}
    assert run.url == f"{server.uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    assert run.hint is None
    assert capfd.readouterr() == ("", "")


def test_start_existing_run_continues_it(tracker: Tracker, server: Any, request_for: RequestMaker) -> None:
    client = MlflowClient(server.uri)
    old = client.create_run("0", run_name="old")
    client.log_param(old.info.run_id, "a", "1")
    client.set_terminated(old.info.run_id, "FAILED")

    run = tracker.start(request_for(server.uri, run_id=old.info.run_id, parameters={"a": "2", "b": "3"}))

    assert (run.run_id, run.run_name) == (old.info.run_id, "old")
    assert stored(run).info.status == "RUNNING"
    assert stored(run).data.params == {"a": "1", "b": "3"}


def test_start_missing_or_deleted_records_are_named(tracker: Tracker, server: Any, request_for: RequestMaker) -> None:
    client = MlflowClient(server.uri)
    name = f"deleted {type(tracker).__name__}"
    experiment_id = client.create_experiment(name)
    client.delete_experiment(experiment_id)
    run = client.create_run("0")
    client.delete_run(run.info.run_id)

    for fields, message in (
        ({"run_id": "0" * 32}, "No MLflow run with the ID"),
        ({"run_id": run.info.run_id}, "mlflow runs restore"),
        ({"experiment_id": "987654"}, "No MLflow experiment with the ID"),
        ({"experiment_id": experiment_id}, "mlflow experiments restore"),
        ({"experiment_name": name}, "mlflow experiments restore"),
    ):
        with pytest.raises(TrackingError, match=message):
            tracker.start(request_for(server.uri, **fields))


def test_start_twenty_concurrent_runs_succeeds(tracker: Tracker, server: Any, request_for: RequestMaker) -> None:
    name = f"many {type(tracker).__name__}"
    failures: list[BaseException] = []

    def one(number: int) -> None:
        try:
            run = tracker.start(request_for(server.uri, experiment_name=name, parameters={"n": str(number)}))
            tracker.finish(run, "FINISHED")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert sorted(int(run.data.params["n"]) for run in found) == list(range(20))
    assert {run.info.status for run in found} == {"FINISHED"}


def test_finish_server_restarting_is_retried(server: Any, request_for: RequestMaker) -> None:
    tracker = Tracker(retry_seconds=180)
    run = tracker.start(request_for(server.uri))
    server.stop()
    finishing = threading.Thread(target=tracker.finish, args=(run, "KILLED"))
    finishing.start()
    time.sleep(0.5)
    assert finishing.is_alive()

    server.start()
    finishing.join()

    assert stored(run).info.status == "KILLED"


def test_finish_server_down_raises_and_names_it(unused_port: int) -> None:
    uri = f"http://127.0.0.1:{unused_port}"

    with pytest.raises(UnreachableError, match=f"{uri} can't be reached: Connection refused"):
        Tracker(retry_seconds=1).finish(TrackedRun("r" * 32, "0", Secret(uri)), "FINISHED")


def test_start_server_that_never_answers_raises(request_for: RequestMaker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"

        with pytest.raises(UnreachableError, match=f"{uri} can't be reached: timed out"):
            Tracker().start(request_for(uri))


def test_download_artifacts_of_runs_and_models_succeeds(server: Any, request_for: RequestMaker, tmp_path: Path) -> None:
    tracker = Tracker()
    run = tracker.start(request_for(server.uri))
    client = MlflowClient(server.uri)
    client.log_text(run.run_id, "hello", "folder/a.txt")
    client.log_text(run.run_id, "world", "folder/deep/b.txt")

    def fetch(uri: str) -> Path:
        fetch = partial(download_artifacts, tracking_uri=Secret(server.uri))
        return download(uri, tmp_path / "storage", report=lambda line: None, stop=StopSignal(), fetch_artifact=fetch)

    file, folder = fetch(f"runs:/{run.run_id}/folder/a.txt"), fetch(f"runs:/{run.run_id}/folder")

    assert (file.name, file.read_text()) == ("a.txt", "hello")
    assert folder.name == "folder"
    assert (folder / "deep" / "b.txt").read_text() == "world"
    artifacts = client.get_run(run.run_id).info.artifact_uri
    assert artifacts.startswith("mlflow-artifacts:/")
    assert fetch(f"{artifacts}/folder/a.txt").read_text() == "hello"
    assert (fetch(f"{artifacts}/folder") / "deep" / "b.txt").read_text() == "world"
    client.create_registered_model("greeting")
    client.create_model_version("greeting", f"{artifacts}/folder", run.run_id)
    assert (fetch("models:/greeting/1") / "deep" / "b.txt").read_text() == "world"
    with pytest.raises(FetchError, match="nothing"):
        fetch(f"runs:/{run.run_id}/nothing")
    with pytest.raises(FetchError, match="can't be downloaded"):
        fetch(f"runs:/{'0' * 32}/a.txt")
    assert len(list((tmp_path / "storage").iterdir())) == 5
