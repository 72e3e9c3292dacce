"""One contract test for each private part of MLflow in `_mlflow_internals`; its docstring says what breaks with it."""

from __future__ import annotations

import inspect
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient, environment_variables
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.tracking import fluent
from mlflow.tracking._tracking_service import utils as tracking_service
from mlflow.utils import rest_utils, validation

from prefect_mlprojects.tracking import _mlflow_internals as internals
from prefect_mlprojects.tracking._mlflow_internals import MlflowStore


@pytest.fixture
def store(uri: str) -> MlflowStore:
    return MlflowStore(uri)


@pytest.fixture
def failing_server() -> Iterator[str]:
    """A server that answers every request with 503."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_get_store_known_uri_returns_one_abstract_store(store: MlflowStore, uri: str) -> None:
    """Else no run can be tracked at all; with a store per call, each call would open a database."""
    assert isinstance(store._store, AbstractStore)
    assert MlflowStore(uri)._store is store._store


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("create_run", ["experiment_id", "user_id", "start_time", "tags", "run_name"]),
        ("get_run", ["run_id"]),
        ("update_run_info", ["run_id", "run_status", "end_time", "run_name"]),
        ("log_batch", ["run_id", "metrics", "params", "tags"]),
        ("get_experiment", ["experiment_id"]),
        ("get_experiment_by_name", ["experiment_name"]),
        ("create_experiment", ["name", "artifact_location", "tags"]),
    ],
)
def test_abstract_store_methods_have_the_parameters_that_are_passed(
    store: MlflowStore, method: str, parameters: list[str]
) -> None:
    """Else runs are not created, ended or tagged; stores of plugins implement the abstract class."""
    for owner in (AbstractStore, type(store._store)):
        assert list(inspect.signature(getattr(owner, method)).parameters)[1 : len(parameters) + 1] == parameters


def test_set_status_without_end_time_reopens_the_run(store: MlflowStore) -> None:
    """Else a continued run would look ended."""
    run_id = store.create_run("0", "me", 1, {}, None).info.run_id
    store.set_status(run_id, "FAILED", 2)
    store.set_status(run_id, "RUNNING", None)

    run = store.get_run(run_id)
    assert run is not None
    assert (run.info.status, run.info.lifecycle_stage) == ("RUNNING", "active")


def test_error_codes_of_missing_and_existing_records_are_known(store: MlflowStore) -> None:
    """Else "no run with this ID" becomes an unexplained failure, and two runs can't create one experiment at once."""
    assert store.get_run("0" * 32) is None
    assert store.get_run("not an ID!") is None
    assert store.experiment("987654") is None
    assert store.experiment("not an ID!") is None
    assert store.experiment_by_name("unknown") is None
    assert store.create_experiment("name") is not None
    assert store.create_experiment("name") is None


def test_disconnect_database_store_closes_its_engine(store: MlflowStore) -> None:
    """Else a new database can't be renamed into place without losing writes to the old file."""
    store.disconnect()

    assert store._store.engine.pool.checkedin() == 0


@pytest.mark.parametrize(("tracking_uri", "expected"), [("sqlite:///x.db", "0"), ("databricks", None)])
def test_default_experiment_outside_of_databricks_notebooks_is_none_on_databricks(
    tracking_uri: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else a run without an experiment lands in the wrong one, or fails without advice."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))

    assert MlflowStore(tracking_uri).default_experiment_id() == expected


def test_ask_server_any_answer_is_enough(failing_server: str) -> None:
    """Else a server that has no /health, or refuses it, counts as down."""
    internals.ask_server(failing_server, timeout=5)


@pytest.mark.parametrize("is_listening", [False, True])
def test_network_failure_message_is_recognised(is_listening: bool, unused_port: int) -> None:
    """Else a server that is down or silent is not reported as unreachable, and is not waited for at the end of a run."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if is_listening else unused_port
        with pytest.raises(MlflowException) as caught:
            internals.ask_server(f"http://127.0.0.1:{port}", timeout=0.2)

    assert internals.NETWORK_FAILURE.search(str(caught.value))


def test_network_failure_message_of_a_failing_server_is_not_recognised(failing_server: str) -> None:
    """Else a server that answers with an error is reported as unreachable, without its error."""
    request: Any = rest_utils.http_request
    credentials = rest_utils.MlflowHostCreds(failing_server)  # type: ignore[no-untyped-call]
    with pytest.raises(MlflowException, match="too many 503 error") as caught:
        request(credentials, "/x", "GET", max_retries=1, backoff_factor=0, backoff_jitter=0, timeout=5)

    assert not internals.NETWORK_FAILURE.search(str(caught.value))


def test_databricks_variables_hold_the_credentials_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the child process can't log to a Databricks store."""
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("DATABRICKS_HOST", "https://workspace.example")
    monkeypatch.setenv("DATABRICKS_TOKEN", "secret")

    variables = internals.databricks_variables("databricks")

    assert variables["DATABRICKS_HOST"] == "https://workspace.example"
    assert variables["DATABRICKS_TOKEN"] == "secret"


def test_model_location_registered_version_is_where_its_files_are(uri: str, tmp_path: Path) -> None:
    """Else a ``models:/`` parameter is looked up in the registry of this process instead of the run's."""
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("greeting")
    client.create_model_version("greeting", tmp_path.as_uri())

    assert internals.model_location("models:/greeting/1", uri, uri) == tmp_path.as_uri()
    assert internals.model_location("models:/greeting/1/a/b.txt", uri, uri) == f"{tmp_path.as_uri()}/a/b.txt"
    assert internals.model_location("runs:/x/model", uri, uri) == "runs:/x/model"
    model = client.create_logged_model(experiment_id="0")
    assert internals.model_location(f"models:/{model.model_id}", uri, uri) == model.artifact_location


def test_state_of_this_process_is_where_it_is_read(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a script's ``set_tracking_uri``, ``set_experiment`` and ``start_run`` are ignored by ``run()``."""
    monkeypatch.setattr(tracking_service, "_tracking_uri", uri)
    monkeypatch.setattr(fluent, "_active_experiment_id", "7")

    assert internals.tracking_uri_in_use() == uri
    assert internals.active_experiment_id() == "7"
    assert internals.run_in_use() is None
    with fluent.start_run(experiment_id="0") as run:
        assert internals.run_in_use() == run.info.run_id


IMPORT = """
import sys
from prefect_mlprojects.tracking._mlflow_internals import import_mlflow
import_mlflow("sqlite:///x.db")
import mlflow
print("mlflow" in sys.modules, [name for name in ("pandas", "numpy", "scipy", "sklearn", "pyarrow") if sys.modules.get(name, 0)])
print([name for name in ("pandas", "numpy") if name in sys.modules])
"""


def test_import_without_optional_packages_succeeds() -> None:
    """Else the tracker process imports everything, and every start of a run takes seconds longer."""
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)

    # The packages are blocked still, so MLflow was imported without them and not again with them.
    assert result.stdout.splitlines() == ["True []", "['pandas', 'numpy']"]


@pytest.mark.parametrize("variables", [internals.HTTP_LIMITS, internals.NO_TELEMETRY])
def test_variables_of_the_tracker_process_are_known_to_mlflow(variables: dict[str, str]) -> None:
    """Else the tracker process waits minutes for a server that is down, or reports its use."""
    for name in variables:
        assert getattr(environment_variables, name).name == name


def test_noisy_loggers_are_those_of_the_modules_that_log() -> None:
    """Else messages about migrations and retries appear in the output of a run."""
    from alembic.runtime import migration
    from mlflow.store.db import utils
    from urllib3 import connectionpool

    loggers: list[logging.Logger] = [utils._logger, migration.log, connectionpool.log]
    assert {logger.name for logger in loggers} <= set(internals.NOISY_LOGGERS)


def test_limits_are_those_of_mlflow() -> None:
    """Else a long parameter fails the run instead of being shortened, or is shortened without need."""
    assert internals.MAX_KEY_LENGTH == validation.MAX_ENTITY_KEY_LENGTH
    assert internals.MAX_PARAMETER_LENGTH == validation.MAX_PARAM_VAL_LENGTH
    assert internals.MAX_TAG_LENGTH == validation.MAX_TAG_VAL_LENGTH
    assert internals.MAX_BATCH_ENTRIES == validation.MAX_PARAMS_TAGS_PER_BATCH
    assert internals.MAX_BATCH_BYTES < validation.MAX_BATCH_LOG_REQUEST_SIZE
