"""The whole path: `run()`, a real Prefect server, a real MLflow server, and the real SDK against the workspace double."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.fakes.databricks_api import FakeWorkspace
from tests.integration.databricks.bench import CLUSTER, FAST
from tests.services.prefect_api import api
from tests.services.waiting import wait_for

from prefect_mlprojects import run
from prefect_mlprojects.blocks import DatabricksBackendBlock, DatabricksWorkspace
from prefect_mlprojects.cli import main
from prefect_mlprojects.exceptions import BackendError, ExecutionException, RunFailed
from prefect_mlprojects.server.api import call_api
from prefect_mlprojects.server.process import ServerAddress

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "tests" / "projects" / "on_databricks"
EXAMPLE = ROOT / "examples" / "databricks"


def call(config: dict[str, Any] | None = None, **options: Any) -> Any:
    return run(
        str(PROJECT), backend="databricks", backend_config={"new_cluster": CLUSTER, **FAST, **(config or {})}, **options
    )


def test_project_run_records_tags_output_and_link(
    tracked: FakeWorkspace, capfd: Any, prefect_server: ServerAddress
) -> None:
    submitted = call(parameters={"name": "Ada; exit 9"})

    import mlflow

    found = mlflow.get_run(submitted.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["seen.by"] == "Ada; exit 9"
    assert found.data.tags["mlflow.databricks.runURL"] == f"{tracked.host}/?o=1#job/77/run/1000"
    assert found.data.tags["mlflow.databricks.webappURL"] == tracked.host
    assert found.data.tags["mlflow.databricks.shellJobID"] == "77"
    assert found.data.tags["mlflow.databricks.shellJobRunID"] == "1000"
    assert found.data.tags["mlflow.project.backend"] == "databricks"
    captured = capfd.readouterr()
    assert "hello Ada; exit 9" in captured.out
    assert "to stderr" in captured.err
    assert "good-token" not in str(tracked.runs[1000].body)
    asked = {"flow_runs": {"id": {"any_": [str(submitted.flow_run_id)]}}}
    artifacts = api(prefect_server.api_url).post("/artifacts/filter", json=asked).json()
    assert any(f"{tracked.host}/?o=1#job/77/run/1000" in str(each["data"]) for each in artifacts)


@pytest.mark.parametrize("name", ["new-cluster", "existing-cluster", "serverless"])
def test_example_project_logs_to_mlflow_server(tracked: FakeWorkspace, tmp_path: Path, name: str) -> None:
    config = yaml.safe_load((EXAMPLE / f"{name}.yaml").read_text())
    tracked.clusters.all["1023-120000-abcdefgh"] = tracked.clusters.all["c-1"]
    tracked.secrets.values = {"mlflow": {"user": "ada", "password": "geheim"}}
    if name == "serverless":
        # The driver of the double has MLflow; installing it beside would only take time.
        config["environment"]["dependencies"] = []

    submitted = run(
        str(EXAMPLE), backend="databricks", backend_config={**config, **FAST}, parameters={"rate": 0.3, "epochs": 200}
    )

    import mlflow

    found = mlflow.get_run(submitted.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["slope"] == pytest.approx(3, abs=0.01)
    assert found.data.metrics["offset"] == pytest.approx(2, abs=0.01)
    assert len(mlflow.MlflowClient().get_metric_history(submitted.run_id, "loss")) == 200


def test_profile_tracking_uri_stores_runs_in_workspace(
    tracked: FakeWorkspace, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.delenv("DATABRICKS_HOST")
    monkeypatch.delenv("DATABRICKS_TOKEN")
    (tmp_path / "databrickscfg").write_text(f"[staging]\nhost = {tracked.host}\ntoken = good-token\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks://staging")
    import mlflow

    store = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("databricks://staging")

    submitted = run(
        str(EXAMPLE),
        backend="databricks",
        backend_config={"new_cluster": CLUSTER, **FAST},
        parameters={"epochs": 3},
        experiment_name="/Users/ada@example.com/line",
    )

    mlflow.set_tracking_uri(store)
    found = mlflow.get_run(submitted.run_id)
    assert found.info.status == "FINISHED"
    assert len(mlflow.MlflowClient().get_metric_history(submitted.run_id, "loss")) == 3
    assert any("/mlflow/" in path for _, path in tracked.requests)
    assert json.loads(tracked.runs[1000].task["spark_python_task"]["parameters"][0])["variables"][
        "MLFLOW_TRACKING_URI"
    ] == ("databricks")


def test_failed_command_reports_exit_code_and_output(tracked: FakeWorkspace) -> None:
    with pytest.raises(RunFailed) as caught:
        call(parameters={"code": 3})

    assert caught.value.exit_code == 3
    assert "exit code 3" in caught.value.message
    assert any("to stderr" in line for line in caught.value.output_tail)


def test_retried_command_submits_new_run(tracked: FakeWorkspace) -> None:
    with pytest.raises(RunFailed):
        call(parameters={"code": 4}, retries=1)

    assert len(tracked.runs) == 2


def test_cancel_cancels_workspace_run(tracked: FakeWorkspace) -> None:
    submitted = call(parameters={"seconds": 600}, synchronous=False)
    wait_for(lambda: any(each.life_cycle == "RUNNING" for each in tracked.runs.values()), "the run")

    submitted.cancel()
    submitted.cancel()

    assert submitted.get_status() == "KILLED"
    assert tracked.runs[1000].result == "CANCELED"
    assert tracked.runs[1000].process.poll() is not None


def test_ctrl_c_cancels_the_run(tracked: FakeWorkspace, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"new_cluster": CLUSTER, **FAST}))
    command = [sys.executable, "-m", "prefect_mlprojects", "run", str(PROJECT), "-P", "seconds=600"]
    command += ["--backend", "databricks", "--backend-config", str(config)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: any(each.life_cycle == "RUNNING" for each in tracked.runs.values()), "the run")

    started.send_signal(signal.SIGINT)
    out, _ = started.communicate(timeout=120)

    assert started.returncode not in (0, None), out
    assert tracked.runs[1000].result == "CANCELED"
    assert "Traceback" not in out


async def make_flow_run(client: Any, parameters: dict[str, Any]) -> uuid.UUID:
    """A flow run of a deployment, for a process as a worker starts it."""
    from prefect.client.schemas.actions import WorkPoolCreate

    from prefect_mlprojects import run_project

    pool = f"pool-{uuid.uuid4().hex[:8]}"
    await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    deployment = await client.create_deployment(
        flow_id=await client.create_flow(run_project),
        name=pool,
        entrypoint="prefect_mlprojects.flows.run_project.run_project",
        work_pool_name=pool,
    )
    flow_run = await client.create_flow_run_from_deployment(deployment, parameters=parameters)
    identifier: uuid.UUID = flow_run.id
    return identifier


async def start_again(client: Any, flow_run_id: uuid.UUID) -> None:
    from prefect.states import Pending

    await client.set_flow_run_state(flow_run_id, Pending(), force=True)


def test_flow_run_restarted_after_worker_kill_reuses_run(
    tracked: FakeWorkspace, prefect_server: ServerAddress, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    project = tmp_path / "project"
    project.mkdir()
    command = f"touch {tmp_path}/begun; while [ ! -e {gate} ]; do sleep 0.1; done; echo opened"
    (project / "MLproject").write_text(f"entry_points:\n  main:\n    command: {json.dumps(command)}\n")
    config = {"new_cluster": CLUSTER, **FAST}
    parameters = {"uri": str(project), "backend": "databricks", "backend_config": config}
    flow_run_id = call_api(prefect_server.api_url, make_flow_run, parameters)
    worker = [sys.executable, "-m", "prefect.engine"]
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": str(flow_run_id)}
    first = subprocess.Popen(worker, env=environment, start_new_session=True)
    wait_for((tmp_path / "begun").exists, "the command", 90)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()

    call_api(prefect_server.api_url, start_again, flow_run_id)
    again = subprocess.Popen(worker, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: sum("runs/submit" in path for _, path in tracked.requests) == 2, "the second submission")
    gate.touch()
    out, _ = again.communicate(timeout=120)

    import mlflow

    assert "opened" in out
    assert list(tracked.runs) == [1000]
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    own = [each for each in runs if each.data.tags.get("mlflow.databricks.runURL", "").startswith(tracked.host)]
    assert [each.info.status for each in own] == ["FINISHED"]


def test_cancel_command_cancels_run_of_worker(tracked: FakeWorkspace, prefect_server: ServerAddress) -> None:
    parameters = {
        "uri": str(PROJECT),
        "parameters": {"seconds": 600},
        "backend": "databricks",
        "backend_config": {"new_cluster": CLUSTER, **FAST},
    }
    flow_run_id = call_api(prefect_server.api_url, make_flow_run, parameters)
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": str(flow_run_id)}
    worker = subprocess.Popen([sys.executable, "-m", "prefect.engine"], env=environment)
    wait_for(lambda: any(each.life_cycle == "RUNNING" for each in tracked.runs.values()), "the run")

    assert cli("cancel", str(flow_run_id)) == 0
    worker.wait(timeout=120)

    assert tracked.runs[1000].result == "CANCELED"


def test_blocks_hold_the_workspace_and_the_cluster(
    tracked: FakeWorkspace, prefect_server: ServerAddress, monkeypatch: Any
) -> None:
    monkeypatch.delenv("DATABRICKS_HOST")
    monkeypatch.delenv("DATABRICKS_TOKEN")
    name = f"t-{uuid.uuid4().hex[:8]}"
    workspace = DatabricksWorkspace(host=tracked.host, client_id="robot", client_secret="robot-secret")  # type: ignore[arg-type]
    backend = DatabricksBackendBlock(
        config={"new_cluster": CLUSTER, "code-path": "/Volumes/main/ml/code/robot", **FAST}, workspace=workspace
    )

    async def keep(client: Any) -> None:
        await workspace.asave(name, client=client)
        await backend.asave(name, client=client)

    assert workspace.test_connection() == "robot"
    call_api(prefect_server.api_url, keep)

    whole = run(str(PROJECT), backend="databricks", backend_config=f"databricks-backend/{name}")
    named = call({"credentials": name, "code-path": "/Volumes/main/ml/code/robot"})

    assert whole.get_status() == named.get_status() == "FINISHED"
    assert {each.creator for each in tracked.runs.values()} == {"robot"}
    for each in tracked.runs.values():
        assert "robot-secret" not in str(each.body)
    for submitted in (whole, named):
        kept = api(prefect_server.api_url).get(f"/flow_runs/{submitted.flow_run_id}").text
        assert "robot-secret" not in kept


def test_local_tracking_uri_is_rejected_before_upload(tracked: FakeWorkspace, monkeypatch: Any, tmp_path: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/local.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/local.db")

    with pytest.raises(BackendError, match="Got local tracking URI"):
        call()

    assert tracked.requests == []


def test_expired_token_raises_authentication_error(tracked: FakeWorkspace) -> None:
    tracked.people.tokens.clear()

    with pytest.raises(ExecutionException, match="wrong or has expired") as caught:
        call()

    assert "good-token" not in caught.value.message


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_plan_shows_the_submission_and_asks_no_network(workspace: FakeWorkspace, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    config = str(EXAMPLE / "new-cluster.yaml")

    assert cli("plan", str(EXAMPLE), "--backend", "databricks", "--backend-config", config, "--json") == 0

    shown = json.loads(capsys.readouterr().out)["backend_plan"]
    body = json.loads(shown["submission"])
    assert body["tasks"][0]["new_cluster"]["spark_version"] == "15.4.x-cpu-ml-scala2.12"
    assert body["timeout_seconds"] == 7200
    assert "to /Workspace/Users/<user>/.prefect-mlprojects/code/" in shown["code"]
    assert shown["environment"] == "the driver's own Python"
    assert workspace.requests == []


def test_clean_command_removes_old_code(workspace: FakeWorkspace, capsys: Any) -> None:
    old = workspace.root / "Workspace/Users/ada@example.com/.prefect-mlprojects/code/old.tar.gz"
    old.parent.mkdir(parents=True)
    old.touch()

    assert cli("databricks", "clean", "--older-than", "0", "--dry-run") == 0
    assert "Would remove" in capsys.readouterr().out
    assert old.exists()
    assert cli("databricks", "clean", "--older-than", "0") == 0
    assert "1 files and folders." in capsys.readouterr().out
    assert not old.exists()
