"""``mlflow run --backend prefect``: through real MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import use_server

GREET = str(Path(__file__).parents[2] / "projects" / "greet")


def mlflow_run(*arguments: Any, **named: Any) -> Any:
    import mlflow

    function: Any = mlflow.projects.run
    return function(*arguments, **named)


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: Any) -> Path:
    import mlflow

    monkeypatch.chdir(tmp_path)
    use_server(monkeypatch, prefect_server.api_url)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    return tmp_path


def test_mlflow_run_command_runs_as_prefect_flow() -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "mlflow"),
            *("run", GREET, "--backend", "prefect", "--env-manager", "local", "-P", "name=mlflow"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "hello mlflow" in done.stdout


def test_mlflow_projects_run_runs_as_prefect_flow() -> None:
    import mlflow
    from mlflow.projects import SubmittedRun

    handle: Any = mlflow_run(
        GREET, backend="prefect", env_manager="local", parameters={"times": 2}, run_name="mine", synchronous=False
    )
    assert SubmittedRun in type(handle).__mro__
    assert handle.wait()
    assert handle.get_status() == "FINISHED"
    found = mlflow.MlflowClient().get_run(handle.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "mine"
    assert found.data.tags["mlflow.project.backend"] == "prefect"
    assert found.data.tags["prefect.flow_run_id"] == handle.flow_run_id
    assert found.data.params == {"name": "world", "times": "2"}


def test_failed_or_cancelled_run_has_mlflow_status() -> None:
    from mlflow.exceptions import ExecutionException

    with pytest.raises(ExecutionException):
        mlflow_run(GREET, "fail", backend="prefect", env_manager="local")
    handle: Any = mlflow_run(GREET, "sleep", backend="prefect", env_manager="local", synchronous=False)
    handle.cancel()
    assert handle.get_status() == "KILLED"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"deploymnt": "x"}, "did you mean 'deployment'"),
        ({"deployment": "x", "work-pool": "y"}, "give only one"),
        ({"deployment": "nowhere"}, "no deployment of that name"),
        ({"work-pool": "nowhere"}, "No work pool 'nowhere'"),
    ],
)
def test_invalid_configuration_is_refused(config: dict[str, str], words: str) -> None:
    from mlflow.exceptions import ExecutionException

    with pytest.raises(ExecutionException, match=words):
        mlflow_run(GREET, backend="prefect", backend_config=config, env_manager="local")


def test_deployment_runs_on_a_worker(workspace: Path) -> None:
    import mlflow

    from prefect_mlprojects import deploy

    deploy(GREET, name="plugin", env_manager="local")
    (workspace / "config.json").write_text(json.dumps({"deployment": "plugin"}))
    worker = subprocess.Popen(
        [sys.executable, "-m", "prefect_mlprojects", "worker"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        handle: Any = mlflow_run(
            GREET, backend="prefect", backend_config=str(workspace / "config.json"), parameters={"times": "2"}
        )
        assert handle.get_status() == "FINISHED"
        assert mlflow.MlflowClient().get_run(handle.run_id).data.params["times"] == "2"
    finally:
        worker.send_signal(2)
        worker.wait(60)
