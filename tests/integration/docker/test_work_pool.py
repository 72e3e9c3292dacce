"""A deployment on a work pool of the type ``docker``: Prefect's worker starts a container for each flow run."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import uuid
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tests.services.mlflow_server import MlflowServer
from tests.services.prefect_api import api, client_variables

import prefect_mlprojects
from prefect_mlprojects import deploy
from prefect_mlprojects.deployments.work_pools import ensure_work_pool
from prefect_mlprojects.server.api import call_api
from prefect_mlprojects.server.process import ServerAddress


def flow_log(server: ServerAddress, flow_run_id: str) -> str:
    question = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "sort": "TIMESTAMP_ASC"}
    return "\n".join(each["message"] for each in api(server.api_url).post("/logs/filter", json=question).json())


def test_deployment_runs_on_a_docker_pool(
    project: Path,
    tmp_path: Path,
    python_image: str,
    prefect_server: ServerAddress,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (project / "MLproject").write_text(
        "name: pooled\nentry_points:\n  main:\n    parameters: {word: {type: string, default: hi}}\n"
        "    command: \"python -c 'import sys, os; print(sys.argv[1], os.getpid() < 1000)' {word}\"\n"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    pool = f"docker-{uuid.uuid4().hex[:8]}"

    async def make_pool(client: Any) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect_docker.worker import DockerWorker

        template = DockerWorker.get_default_base_job_template()
        await client.create_work_pool(WorkPoolCreate(name=pool, type="docker", base_job_template=template))
        assert (await ensure_work_pool(client, pool)).name == pool

    call_api(prefect_server.api_url, make_pool)
    # What an image for a pool holds: Python, Prefect and this package. Here they come from this machine.
    packages, source = sysconfig.get_path("purelib"), Path(prefect_mlprojects.__file__).parents[1]
    deployment = deploy(
        project,
        work_pool=pool,
        env_manager="local",
        job_variables={
            "image": python_image,
            "image_pull_policy": "Never",
            "network_mode": "host",
            "auto_remove": True,
            "volumes": [f"{packages}:/packages:ro", f"{source}:{source}:ro", f"{project}:{project}"],
            "env": {"PYTHONPATH": f"/packages:{source}", "MLFLOW_TRACKING_URI": mlflow_server.uri},
        },
    )
    handle = deployment.run({"word": "from the form"})
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "docker", "--run-once"],
            env={**os.environ, **client_variables(prefect_server.api_url)},
            stdout=output,
            stderr=output,
        )
    try:
        assert handle.wait(), log.read_text()
    finally:
        worker.terminate()
        worker.wait()
    found = MlflowClient(mlflow_server.uri).get_run(handle.run_id)
    assert (found.info.status, found.data.params) == ("FINISHED", {"word": "from the form"})
    assert "from the form True" in flow_log(prefect_server, handle.flow_run_id)
