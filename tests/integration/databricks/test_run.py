from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.databricks_api import FakeWorkspace, Refusal

from prefect_mlprojects import run
from prefect_mlprojects.exceptions import BackendError, ExecutionException, RunFailed

PROJECT = Path(__file__).parents[2] / "projects" / "on_databricks"
CLUSTER = {"spark_version": "15.4.x-scala2.12", "node_type_id": "i3.xlarge", "num_workers": 1}
FAST = {"poll-interval": 0.2, "max-poll-interval": 1}


def call(config: dict[str, Any] | None = None, **options: Any) -> Any:
    return run(
        str(PROJECT), backend="databricks", backend_config={"new_cluster": CLUSTER, **FAST, **(config or {})}, **options
    )


@pytest.mark.parametrize("place", [None, "/Volumes/main/ml/code/projects", "dbfs:/projects"])
def test_a_project_runs_through_the_whole_path(workspace: FakeWorkspace, capfd: Any, place: str | None) -> None:
    config = {"code-path": place} if place else {}

    submitted = call(config, parameters={"name": "Ada; exit 9"})

    import mlflow

    tags = mlflow.get_run(submitted.run_id).data.tags
    assert mlflow.get_run(submitted.run_id).info.status == "FINISHED"
    assert tags["seen.by"] == "Ada; exit 9"
    assert tags["mlflow.databricks.runURL"] == f"{workspace.host}/?o=1#job/77/run/1000"
    assert tags["mlflow.databricks.shellJobID"] == "77"
    captured = capfd.readouterr()
    assert "hello Ada; exit 9" in captured.out
    assert "to stderr" in captured.err
    assert "good-token" not in str(workspace.runs[1000].body)


def test_the_code_is_uploaded_once(workspace: FakeWorkspace) -> None:
    call()
    first = sum("import" in path for _, path in workspace.requests)
    call()

    assert first == 2
    assert sum("import" in path for _, path in workspace.requests) == first


def test_a_failed_command_reports_its_exit_code_and_output(workspace: FakeWorkspace) -> None:
    with pytest.raises(RunFailed) as caught:
        call(parameters={"code": 3})

    assert caught.value.exit_code == 3
    assert "exit code 3" in caught.value.message
    assert any("to stderr" in line for line in caught.value.output_tail)


def test_a_cluster_that_fails_to_start_is_told_in_the_clouds_words(workspace: FakeWorkspace) -> None:
    workspace.fail("CLOUD_FAILURE", "CLOUD_FAILURE", "AWS: InsufficientInstanceCapacity in us-west-2a")

    with pytest.raises(RunFailed, match="InsufficientInstanceCapacity") as caught:
        call()

    assert "another node type or zone" in caught.value.message


def test_rate_limits_errors_and_lost_connections_do_not_lose_the_run(workspace: FakeWorkspace) -> None:
    slow = Refusal(429, "RESOURCE_EXHAUSTED", "Too many requests", {"Retry-After": "1"})
    broken = Refusal(500, "INTERNAL_ERROR", "broken")
    workspace.troubles += [("runs/get", slow), ("runs/get", broken), ("runs/get", "drop"), ("runs/submit", "drop")]

    assert call().get_status() == "FINISHED"
    assert workspace.troubles == []
    assert len(workspace.runs) == 1


def test_a_cancelled_run_is_cancelled_in_the_workspace(workspace: FakeWorkspace) -> None:
    submitted = call(parameters={"seconds": 600}, synchronous=False)
    import time

    deadline = time.monotonic() + 120
    while not any(each.life_cycle == "RUNNING" for each in workspace.runs.values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    submitted.cancel()

    assert submitted.get_status() == "KILLED"
    assert workspace.runs[1000].result == "CANCELED"
    assert workspace.runs[1000].process.poll() is not None


def test_a_retried_command_is_a_new_run(workspace: FakeWorkspace) -> None:
    with pytest.raises(RunFailed):
        call(parameters={"code": 4}, retries=1)

    assert len(workspace.runs) == 2


def test_a_local_store_is_refused_before_anything_is_uploaded(
    workspace: FakeWorkspace, monkeypatch: Any, tmp_path: Path
) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/local.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/local.db")

    with pytest.raises(BackendError, match="Got local tracking URI"):
        call()

    assert workspace.requests == []


def test_an_expired_token_is_told_with_advice(workspace: FakeWorkspace) -> None:
    workspace.people.tokens.clear()

    with pytest.raises(ExecutionException, match="wrong or has expired") as caught:
        call()

    assert "good-token" not in caught.value.message


def test_a_machines_credentials_are_enough(workspace: FakeWorkspace, monkeypatch: Any) -> None:
    monkeypatch.setenv("DATABRICKS_TOKEN", "somebody-elses")
    workspace.people.tokens.clear()
    credentials = {"host": workspace.host, "client_id": "robot", "client_secret": "robot-secret"}

    assert call({"credentials": credentials}).get_status() == "FINISHED"
    assert "robot-secret" not in str(workspace.runs[1000].body)


def test_an_environment_is_built_on_the_driver(workspace: FakeWorkspace, tmp_path: Path) -> None:
    project = tmp_path / "with_environment"
    shutil.copytree(PROJECT, project)
    (project / "MLproject").write_text(
        "name: env\npython_env: python_env.yaml\nentry_points:\n  main:\n    command: python -c 'import six; print(six.__file__)'\n"
    )
    (project / "python_env.yaml").write_text("build_dependencies: []\ndependencies:\n  - six==1.16.0\n")

    submitted = run(str(project), backend="databricks", backend_config={"existing-cluster-id": "c-1", **FAST})

    assert submitted.get_status() == "FINISHED"
    assert "/mlprojects-environments/" in workspace.runs[1000].logs


def test_what_runs_left_is_cleaned(workspace: FakeWorkspace, capsys: Any) -> None:
    from prefect_mlprojects.cli.app import main

    call()

    with pytest.raises(SystemExit) as ended:
        main(["databricks", "clean", "--older-than", "0"])

    assert ended.value.code == 0
    assert "2 files and folders." in capsys.readouterr().out
    assert list(workspace.root.rglob("*.tar.gz")) == []


def test_a_restarted_flow_run_finds_its_run_again(workspace: FakeWorkspace, mlflow_server: str) -> None:
    from prefect_mlprojects._output import TailedOutput
    from prefect_mlprojects.backends.base import BackendCall, ExecutionRequest, RunIdentity
    from prefect_mlprojects.backends.databricks.backend import DatabricksBackend
    from prefect_mlprojects.sources import WorkingCopy
    from prefect_mlprojects.spec import build_command, check_parameters, find_entry_point, load_project
    from prefect_mlprojects.types import StopSignal

    class Nowhere:
        def write(self, stream: str, data: bytes) -> None:
            """Takes no notice."""

    import mlflow

    project = load_project(PROJECT)
    entry_point = find_entry_point(project, "main")
    parameters = check_parameters(entry_point, {})
    copy = WorkingCopy(directory=PROJECT, uri=str(PROJECT), kind="local", source_name=str(PROJECT))
    config = {"new_cluster": CLUSTER, **FAST}
    backend_call = BackendCall(project, entry_point, parameters, copy, config=config, tracking_uri=mlflow_server)
    backend, stop = DatabricksBackend(), StopSignal()
    preparation = backend.prepare(backend_call, print, stop)
    with mlflow.start_run() as tracked:
        variables = {"MLFLOW_RUN_ID": tracked.info.run_id}
    request = ExecutionRequest(
        command=build_command(entry_point, parameters),
        working_directory=PROJECT,
        environment=None,
        variables=variables,
        identity=RunIdentity("0d6f7c1e-0000-4000-8000-000000000001", tracked.info.run_id, "p", "main"),
        config=config,
        call=backend_call,
        preparation=preparation,
    )

    first = backend.execute(request, TailedOutput(Nowhere()), stop)
    again = backend.execute(request, TailedOutput(Nowhere()), stop)

    assert first.succeeded, first
    assert again.succeeded
    assert len(workspace.runs) == 1
