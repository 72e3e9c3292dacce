"""The flow on a real process worker: a good run, and one that is cancelled in Prefect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import client_variables
from tests.services.waiting import wait_for

from prefect_mlprojects.server.api import call_api
from prefect_mlprojects.server.process import ServerAddress

FLOW = "prefect_mlprojects.flows.run_project.run_project"


@pytest.fixture
def deployment(workspace: Path, prefect_server: ServerAddress) -> Iterator[uuid.UUID]:
    """A deployment of the flow on a work pool of its own, with a worker that serves it."""
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    identifier: uuid.UUID = call_api(prefect_server.api_url, deploy, pool)
    log = (workspace / "worker.log").open("wb")
    worker = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", "tester"],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **client_variables(prefect_server.api_url), "PREFECT_WORKER_QUERY_SECONDS": "2"},
        start_new_session=True,
    )
    yield identifier
    worker.send_signal(signal.SIGINT)
    try:
        worker.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    log.close()


async def deploy(client: Any, pool: str) -> uuid.UUID:
    from prefect.client.schemas.actions import WorkPoolCreate

    from prefect_mlprojects import run_project

    await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    identifier: uuid.UUID = await client.create_deployment(
        flow_id=await client.create_flow(run_project), name=pool, entrypoint=FLOW, work_pool_name=pool
    )
    return identifier


async def start(client: Any, deployment: uuid.UUID, parameters: dict[str, Any]) -> str:
    flow_run = await client.create_flow_run_from_deployment(deployment, parameters=parameters)
    return str(flow_run.id)


def test_worker_runs_project_and_cancel_kills_process_tree(
    greet: str,
    deployment: uuid.UUID,
    prefect_server: ServerAddress,
    prefect_state: Callable[[str], Any],
    flow_log: Callable[[str], list[Any]],
    tracked: Callable[[str], Any],
    workspace: Path,
) -> None:
    log = workspace / "worker.log"
    call = {"uri": greet, "env_manager": "local"}
    good = call_api(prefect_server.api_url, start, deployment, {**call, "parameters": {"name": "worker"}})
    bad = call_api(prefect_server.api_url, start, deployment, {**call, "entry_point": "tree"})

    def lines(flow_run_id: str) -> list[str]:
        return [line for log in flow_log(flow_run_id) for line in log.message.splitlines()]

    flow_run = wait_for(lambda: final(prefect_state(good)), "the good run", log=log)
    assert (flow_run.state.type.value, flow_run.name) == ("COMPLETED", "greet/main"), flow_run.state.message
    assert "hello worker" in lines(good)
    assert tracked(flow_run.labels["mlflow.run_id"]).info.status == "FINISHED"

    grandchild = wait_for(
        lambda: [line.split()[1] for line in lines(bad) if line.startswith("grandchild")], "its child", log=log
    )
    call_api(prefect_server.api_url, cancel, bad)
    flow_run = wait_for(lambda: final(prefect_state(bad)), "the cancelled run", log=log)
    assert flow_run.state.type.value == "CANCELLED"
    wait_for(lambda: not Path(f"/proc/{grandchild[0]}").exists(), "the grandchild's end")
    run_id = flow_run.labels["mlflow.run_id"]
    wait_for(lambda: tracked(run_id).info.status == "KILLED", "MLflow's KILLED")


def final(flow_run: Any) -> Any:
    return flow_run if flow_run.state is not None and flow_run.state.is_final() else None


async def cancel(client: Any, flow_run_id: str) -> None:
    from prefect.states import Cancelling

    await client.set_flow_run_state(uuid.UUID(flow_run_id), Cancelling())
