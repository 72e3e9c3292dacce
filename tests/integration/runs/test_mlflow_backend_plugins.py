"""MLflow's backend plugins (entry-point group ``mlflow.project_backend``) run through our flow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.services.waiting import wait_for

from prefect_mlprojects import run
from prefect_mlprojects.backends import available_backends
from prefect_mlprojects.exceptions import BackendError, ParameterError, RunFailed, RunTimedOut
from prefect_mlprojects.types import FailureCategory

Read = Callable[[str], Any]

# As MLflow's documentation shows a plugin: it creates the MLflow run, starts the work and returns a SubmittedRun.
PLUGIN = """
import json, os, subprocess, sys
from pathlib import Path
from mlflow import MlflowClient
from mlflow.entities import RunStatus
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun


class OrbitRun(SubmittedRun):
    def __init__(self, client, run_id, process, log):
        self._client, self._run_id, self._process, self._log = client, run_id, process, log

    @property
    def run_id(self):
        return self._run_id

    def wait(self):
        code = self._process.wait()
        self._client.set_terminated(self._run_id, "FINISHED" if code == 0 else "FAILED")
        return code == 0

    def get_status(self):
        return RunStatus.from_string(self._client.get_run(self._run_id).info.status)

    def cancel(self):
        self._process.kill()
        self._process.wait()
        self._client.set_terminated(self._run_id, "KILLED")
        Path(self._log).write_text("cancelled")


class Orbit(AbstractBackend):
    def run(self, project_uri, entry_point, params, version, backend_config, tracking_uri, experiment_id):
        if entry_point == "needs":
            raise RuntimeError("no fuel")
        client = MlflowClient()
        run_id = client.create_run(experiment_id).info.run_id
        log = backend_config.get("log", os.devnull)
        Path(log).write_text(json.dumps({
            "uri": project_uri, "entry_point": entry_point, "params": params, "version": version,
            "config": backend_config, "tracking_uri": tracking_uri, "experiment_id": experiment_id,
        }))
        command = {"main": "echo in orbit; echo warn >&2", "fail": "exit 3", "sleep": "echo started; sleep 600"}
        process = subprocess.Popen(["sh", "-c", command[entry_point]], cwd=project_uri)
        return OrbitRun(client, run_id, process, log)
"""


@pytest.fixture
def orbit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs the plugin; returns the file that it writes its arguments into."""
    site = tmp_path / "site"
    info = site / "orbit-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "orbit.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: orbit\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlflow.project_backend]\norbit = orbit:Orbit\n")
    monkeypatch.syspath_prepend(str(site))
    return tmp_path / "arguments.json"


def test_plugins_are_among_the_backends_and_our_own_plugin_is_not(orbit: Path) -> None:
    assert "orbit" in available_backends()
    assert "prefect" not in available_backends()


def test_plugin_run_keeps_mlflow_run(
    orbit: Path, greet: str, workspace: Path, tracked: Read, prefect_state: Read, flow_log: Read, capfd: Any
) -> None:

    submitted = run(
        greet,
        parameters={"name": "it's me"},
        backend="orbit",
        backend_config={"log": str(orbit), "queue": "high"},
        experiment_name="space",
        run_name="first flight",
    )

    assert submitted.get_status() == "FINISHED"
    mlflow_run = tracked(submitted.run_id)
    assert (mlflow_run.info.status, mlflow_run.info.run_name) == ("FINISHED", "first flight")
    assert mlflow_run.data.tags["mlflow.project.backend"] == "orbit"
    assert mlflow_run.data.tags["prefect.flow_run_id"] == submitted.flow_run_id
    given = json.loads(orbit.read_text())
    assert (given["entry_point"], given["params"]) == ("main", {"name": "it's me", "times": "1"})
    assert (given["uri"], given["experiment_id"]) == (greet, mlflow_run.info.experiment_id)
    assert given["config"]["queue"] == "high"
    assert {"ENV_MANAGER", "SYNCHRONOUS", "DOCKER_ARGS", "STORAGE_DIR"} <= given["config"].keys()
    flow_run = prefect_state(submitted.flow_run_id)
    assert flow_run.state.type.value == "COMPLETED"
    assert flow_run.labels["mlflow.run_id"] == submitted.run_id
    assert "in orbit" in "\n".join(log.message for log in flow_log(submitted.flow_run_id))
    assert "in orbit" in capfd.readouterr().out


def test_failed_plugin_run_raises_run_failed(orbit: Path, greet: str, workspace: Path, tracked: Read) -> None:
    with pytest.raises(RunFailed, match="the MLflow plugin 'orbit' reported FAILED") as error:
        run(greet, entry_point="fail", backend="orbit")
    assert error.value.category == FailureCategory.USER_CODE
    assert error.value.run_id is not None
    assert tracked(error.value.run_id).info.status == "FAILED"


def test_plugin_exception_raises_backend_error(orbit: Path, greet: str, workspace: Path) -> None:
    values = {"count": 1, "rate": 1, "place": "s3://a/b"}
    with pytest.raises(BackendError, match="The MLflow plugin 'orbit' failed: RuntimeError: no fuel"):
        run(greet, entry_point="needs", parameters=values, backend="orbit")


def test_cancel_of_plugin_run_calls_plugin_cancel(
    orbit: Path, greet: str, workspace: Path, tracked: Read, prefect_state: Read
) -> None:
    submitted = run(greet, entry_point="sleep", backend="orbit", backend_config={"log": str(orbit)}, synchronous=False)
    wait_for(lambda: submitted.run_id is not None, "the plugin's run")
    submitted.cancel()
    assert submitted.wait() is False
    assert submitted.get_status() == "KILLED"
    assert orbit.read_text() == "cancelled"
    assert tracked(submitted.run_id).info.status == "KILLED"
    assert prefect_state(submitted.flow_run_id).state.type.value == "CANCELLED"


def test_timeout_cancels_plugin_run(orbit: Path, greet: str, workspace: Path, tracked: Read) -> None:
    with pytest.raises(RunTimedOut, match="longer than its timeout") as error:
        run(greet, entry_point="sleep", backend="orbit", backend_config={"log": str(orbit)}, timeout=20)
    assert error.value.category == FailureCategory.TIMEOUT
    assert orbit.read_text() == "cancelled"


def test_plugin_project_is_validated_before_start(orbit: Path, greet: str, workspace: Path) -> None:
    with pytest.raises(ParameterError, match="count"):
        run(greet, entry_point="needs", backend="orbit", backend_config={"log": str(orbit)})
    assert not orbit.exists()
