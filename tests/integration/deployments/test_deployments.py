"""Deployments on a real server, run by real workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.services.waiting import wait_for

from prefect_mlprojects import deploy, load_project
from prefect_mlprojects.exceptions import InvalidInputError, ParameterError
from prefect_mlprojects.request import OPTIONS

from .conftest import started

Call = Callable[..., Any]


def runs_of(call: Call, deployment_id: str) -> list[Any]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    found: list[Any] = call(
        "read_flow_runs",
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[UUID(deployment_id)])),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        limit=100,
    )
    return found


def test_deployment_is_stored_with_schedule_and_form(project: Path, call: Call, pool: str) -> None:
    made = deploy(
        project,
        name="stored",
        work_pool=pool,
        cron="0 3 * * *",
        timezone="Europe/Berlin",
        parameters={"needed": 1.5},
        tags=["retraining"],
        concurrency_limit=1,
        paused=True,
        env_manager="local",
    )
    stored = call("read_deployment", UUID(made.id))

    assert (stored.name, stored.work_pool_name, stored.tags, stored.paused) == ("stored", pool, ["retraining"], True)
    assert stored.entrypoint == "prefect_mlprojects.flows.run_project.run_project"
    assert not stored.pull_steps
    assert stored.enforce_parameter_schema
    assert stored.global_concurrency_limit.limit == 1
    assert [(str(each.schedule.cron), each.schedule.timezone, each.active) for each in stored.schedules] == [
        ("0 3 * * *", "Europe/Berlin", False)
    ]
    fields = stored.parameter_openapi_schema["properties"]["parameters"]["properties"]
    assert {name: facts["type"] for name, facts in fields.items()} == {
        "count": "integer",
        "word": "string",
        "needed": "number",
    }
    assert (fields["count"]["default"], fields["word"]["default"], fields["needed"]["default"]) == (0, "", 1.5)
    assert {name: stored.parameters[name] for name in OPTIONS if name in stored.parameters} == {
        "uri": str(project),
        "entry_point": "main",
        "parameters": {"needed": 1.5},
        "backend": "local",
        "env_manager": "local",
    }


@pytest.mark.parametrize(
    ("parameters", "options", "words"),
    [
        ({"needed": 1, "count": "many"}, {}, "count"),
        ({"count": 1}, {}, "needed"),
        ({"needed": 1}, {"env_manager": "pip"}, "env_manager"),
        ({"needed": 1}, {"retries": -1}, "retries"),
    ],
)
def test_server_refuses_invalid_values(
    parameters: dict[str, Any], options: dict[str, Any], words: str, project: Path, pool: str
) -> None:
    made = deploy(project, work_pool=pool)

    with pytest.raises(ParameterError, match=words):
        made.run(parameters, **options)


def test_unknown_work_pool_is_refused(project: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"No work pool 'nowhere'.*prefect work-pool create nowhere"):
        deploy(project, work_pool="nowhere")


def test_default_work_pool_is_created(project: Path, call: Call) -> None:
    deploy(project)

    assert call("read_work_pool", "mlprojects").type == "process"


def test_deploying_again_keeps_unnamed_settings(project: Path, call: Call, pool: str) -> None:
    first = deploy(
        project, work_pool=pool, cron="0 3 * * *", tags=["nightly"], concurrency_limit=2, parameters={"needed": 1}
    )
    assert (first.changes, first.schedule) == ((), "cron 0 3 * * *")
    call("pause_deployment", UUID(first.id))
    again = deploy(project)
    stored = call("read_deployment", UUID(first.id))
    assert (again.id, stored.work_pool_name, stored.tags, stored.paused) == (first.id, pool, ["nightly"], True)
    assert [str(each.schedule.cron) for each in stored.schedules] == ["0 3 * * *"]
    assert stored.global_concurrency_limit.limit == 2
    assert again.changes[:3] == ("schedule kept: cron 0 3 * * *", "tags kept: nightly", "concurrency limit kept: 2")
    assert "mlprojects deployments resume" in again.changes[3]

    other = deploy(project, interval=3600, parameters={"needed": 1})
    assert "schedule: cron 0 3 * * * -> every 1:00:00" in other.changes
    assert call("read_deployment", UUID(first.id)).paused
    deploy(project, no_schedule=True)
    assert call("read_deployment", UUID(first.id)).schedules == []


def mlprojects(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefect_mlprojects", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_deployments_commands_list_pause_resume_delete(project: Path, call: Call, pool: str) -> None:
    made = deploy(project, "sleep", work_pool=pool, cron="0 3 * * *", env_manager="local")

    def listed() -> dict[str, Any]:
        rows = json.loads(mlprojects("deployments", "list", "--json").stdout)
        (row,) = [row for row in rows if row["name"] == made.name]
        return dict(row)

    assert (listed()["work_pool"], listed()["schedule"], listed()["paused"]) == (pool, "cron 0 3 * * *", False)
    assert mlprojects("deployments", "pause", made.name).stdout == f"Paused {made.name}.\n"
    assert listed()["paused"]
    assert mlprojects("deployments", "resume", made.full_name).returncode == 0
    assert not listed()["paused"]
    started = mlprojects("start", made.name)
    assert started.returncode == 0, started.stderr
    assert str(call("read_flow_run", UUID(started.stdout.strip())).deployment_id) == made.id

    with_options = mlprojects("start", made.name, "--timeout", "60", "--retries", "2", "-P", "extra=1")
    first = call("read_flow_run", UUID(with_options.stdout.strip()))
    assert (first.parameters["timeout"], first.parameters["retries"]) == (60, 2)
    waiting = mlprojects("status", str(first.id)).stdout
    assert f"It waits for a worker of the work pool '{pool}'." in waiting
    assert f"mlprojects worker --pool {pool}" in waiting
    again = mlprojects("rerun", str(first.id), "-P", "more=x", "--retries", "0", "--detach")
    assert again.returncode == 0, again.stderr
    repeated = call("read_flow_run", UUID(again.stdout.strip()))
    assert (str(repeated.deployment_id), repeated.parameters["timeout"], repeated.parameters["retries"]) == (
        made.id,
        60,
        0,
    )
    assert repeated.parameters["extra_parameters"] == {"extra": "1", "more": "x"}
    refused = mlprojects("rerun", str(first.id), "-e", "main", "--detach")
    assert (refused.returncode, "it is for the entry point 'sleep'" in refused.stderr) == (2, True)

    assert mlprojects("deployments", "delete", made.name).returncode == 0
    missing = mlprojects("start", made.name)
    assert missing.returncode == 2
    assert "no deployment of that name exists" in missing.stderr


def test_worker_without_tracking_uri_stores_results_in_folder(
    project: Path, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    made = deploy(project, work_pool=pool, env_manager="local")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run = made.run({"needed": 1})
    with started("worker", "--pool", pool, "--once", log=tmp_path / "worker.log") as worker:
        worker.wait(200)
    assert run.wait(), (tmp_path / "worker.log").read_text()
    stored = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run.run_id)
    assert stored.data.params["needed"] == "1"

    # Prefect's own worker knows nothing of it: the run is refused instead of losing its results.
    lost = made.run({"needed": 1})
    subprocess.run(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--run-once"], check=True, timeout=200
    )
    assert not lost.wait()
    assert "The results would be lost: no tracking server is set" in lost.result().message


def test_worker_executes_runs_of_a_deployment(project: Path, pool: str, call: Call, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    made = deploy(project, work_pool=pool, env_manager="local", tags=["retraining"])
    with started("worker", "--pool", pool, log=tmp_path / "worker.log"):
        run = made.run({"needed": 2, "count": 0, "extra": "more"}, tags=["team=vision"])
        assert run.wait(), (tmp_path / "worker.log").read_text()
        flow_run = call("read_flow_run", UUID(run.flow_run_id))
        assert flow_run.name == f"{made.name}/main"
        of_project = {f"project:{made.name}", "entry-point:main", "backend:local"}
        assert set(flow_run.tags) == {"retraining", "team=vision", *of_project}
        logged = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run.run_id)
        assert logged.data.params == {"count": "0", "word": "", "needed": "2", "extra": "more"}
        assert logged.data.tags["prefect.flow_run_id"] == run.flow_run_id
        assert (logged.data.tags["retraining"], logged.data.tags["team"]) == ("true", "vision")
        assert "got 0 " in (tmp_path / "worker.log").read_text()
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

        artifacts = call(
            "read_artifacts",
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(run.flow_run_id)])),
            limit=10,
        )
        assert [(each.type, each.key) for each in artifacts] == [("markdown", f"{made.name}-main")]
        assert "| Status | **FINISHED** |" in artifacts[0].data
        assert run.run_id in artifacts[0].data

        # The project changes: what was asked for no longer fits, and the form follows when it is deployed again.
        text = (project / "MLproject").read_text()
        text = text.replace("count: {type: int, default: 0}", "size: int").replace("{count}", "{size}")
        (project / "MLproject").write_text(text)
        failed = made.run({"needed": 2, "count": 5})
        assert not failed.wait()
        message = call("read_flow_run", UUID(failed.flow_run_id)).state.message
        assert f"Since it was deployed as '{made.name}', the project has changed" in message
        assert "parameter 'count' was removed" in message
        assert "parameter 'size' (int) is new and needs a value" in message
        again = deploy(project, work_pool=pool, env_manager="local")
        assert again.id == made.id
        with pytest.raises(ParameterError, match="size"):
            again.run({"needed": 2})
        assert again.run({"needed": 2, "size": 4}).wait()

        # Cancelled as the UI does it: the process ends, and both say so.
        sleeper = deploy(project, "sleep", work_pool=pool, env_manager="local").run()
        wait_for(lambda: "sleeping 23" in (tmp_path / "worker.log").read_text(), "the command")
        sleeper.cancel()
        assert sleeper.get_status() == "KILLED"
        assert call("read_flow_run", UUID(sleeper.flow_run_id)).state.is_cancelled()
        status = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(sleeper.run_id).info.status
        assert status == "KILLED"


def test_scheduled_run_starts(project: Path, pool: str, call: Call, tmp_path: Path) -> None:
    made = deploy(project, work_pool=pool, interval=20, parameters={"needed": 1}, env_manager="local")
    # One at a time: on a busy machine the next is due before the first has ended.
    with started("worker", "--pool", pool, "--limit", "1", log=tmp_path / "worker.log"):
        first = wait_for(lambda: [run for run in runs_of(call, made.id) if run.state.is_running()], "a scheduled run")[
            0
        ]
        call("pause_deployment", UUID(made.id))
        state = wait_for(lambda: (found := call("read_flow_run", first.id).state).is_final() and found, "its end")
    assert state.is_completed(), (tmp_path / "worker.log").read_text()
    assert first.auto_scheduled


def test_pool_with_two_workers_distributes_runs(project: Path, pool: str, call: Call, tmp_path: Path) -> None:
    made = deploy(project, work_pool=pool, env_manager="local")
    runs = [made.run({"needed": 1, "count": number}) for number in range(6)]
    with (
        started("worker", "--pool", pool, "--limit", "2", "--name", "first", log=tmp_path / "first.log"),
        started("worker", "--pool", pool, "--limit", "2", "--name", "second", log=tmp_path / "second.log"),
    ):
        assert [run.wait() for run in runs] == [True] * 6
    logs = [(tmp_path / f"{name}.log").read_text() for name in ("first", "second")]
    shares = [sum(f"got {number} " in log for number in range(6)) for log in logs]
    assert sum(shares) == 6
    assert min(shares) > 0


def test_serve_executes_and_cancels_runs(project: Path, call: Call, tmp_path: Path) -> None:
    name = load_project(project).name
    with started("serve", "project", "-e", "sleep", "--env-manager", "local", log=tmp_path / "serve.log"):
        stored = wait_for(lambda: _find(call, f"run_project/{name}-sleep"), "the deployment")
        flow_run = call("create_flow_run_from_deployment", stored.id)
        wait_for(lambda: "sleeping 23" in (tmp_path / "serve.log").read_text(), "the command")
        from prefect_mlprojects import SubmittedRun

        handle = SubmittedRun.attach(str(flow_run.id))
        handle.cancel()
        assert handle.get_status() == "KILLED"
        assert call("read_flow_run", flow_run.id).state.is_cancelled()


def _find(call: Call, name: str) -> Any:
    from prefect.exceptions import ObjectNotFound

    try:
        return call("read_deployment_by_name", name)
    except ObjectNotFound:
        return None


def test_run_without_heartbeat_is_marked_crashed(project: Path, pool: str, call: Call, prefect_server: Any) -> None:
    from prefect.states import Running

    from prefect_mlprojects.deployments.provisioning import AUTOMATION_NAME, zombie_automation

    made = deploy(project, work_pool=pool)
    assert call("read_automations_by_name", AUTOMATION_NAME)
    flow_run = call(
        "create_flow_run_from_deployment",
        UUID(made.id),
        parameters={**made.specification.flow_parameters(), "parameters": {"needed": 1}},
    )
    # The same automation with less patience, for this run only: other tests share the server.
    automation = call("create_automation", zombie_automation(10, str(flow_run.id)))
    try:
        call("set_flow_run_state", flow_run.id, Running(), force=True)
        _send_heartbeat(prefect_server.api_url, flow_run.id, flow_run.flow_id)
        state = wait_for(
            lambda: (found := call("read_flow_run", flow_run.id).state).is_final() and found, "the automation"
        )
        assert state.is_crashed()
        assert "heartbeat" in state.message
    finally:
        call("delete_automation", automation)


def _send_heartbeat(api_url: str, flow_run_id: UUID, flow_id: UUID) -> None:
    """Sends the event that Prefect's engine sends; see ``prefect.flow_engine`` and ``prefect._internal``."""
    code = (
        "import sys\n"
        "from prefect.events import emit_event\n"
        "from prefect.events.worker import EventsWorker\n"
        "emit_event('prefect.flow-run.heartbeat', {'prefect.resource.id': 'prefect.flow-run.' + sys.argv[1],"
        " 'prefect.resource.name': 'x'}, related=[{'prefect.resource.id': 'prefect.flow.' + sys.argv[2],"
        " 'prefect.resource.name': 'run_project', 'prefect.resource.role': 'flow'}])\n"
        "EventsWorker.instance().drain()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(flow_run_id), str(flow_id)], check=True, timeout=60)


def test_deploy_command_prints_json_and_names_mistakes(project: Path, pool: str) -> None:
    command = [sys.executable, "-m", "prefect_mlprojects", "deploy", "project", "--work-pool", pool]
    done = subprocess.run([*command, "--cron", "0 3 * * *", "-P", "needed=2", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    name = load_project(project).name
    assert (made["name"], made["work_pool"], made["schedule"]) == (
        f"run_project/{name}",
        pool,
        "cron 0 3 * * *",
    )
    wrong = subprocess.run([*command, "--cron", "0 3 * * *"], capture_output=True, text=True)
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (2, False)
    assert "'needed' (float) needs a value" in wrong.stderr
