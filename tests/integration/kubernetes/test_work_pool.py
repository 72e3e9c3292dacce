"""A deployment on a work pool of the type ``kubernetes``: each flow run in a pod of its own, by Prefect's own worker."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from tests.services.mlflow_server import MlflowServer
from tests.services.prefect_api import api, use_server
from tests.services.waiting import wait_for

import prefect_mlprojects
from prefect_mlprojects import deploy
from prefect_mlprojects.server.api import call_api
from prefect_mlprojects.server.process import ServerAddress


def test_kubernetes_work_pool_runs_a_deployment(
    cluster: Any,
    double: Any,
    tmp_path: Path,
    prefect_server: ServerAddress,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cluster.real:
        pytest.skip(
            "it needs an image with this package on the cluster's nodes; the double's pods see this machine's files"
        )
    use_server(monkeypatch, prefect_server.api_url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(double.kubeconfig()))
    name, pool = f"pod-{uuid.uuid4().hex[:8]}", f"kubernetes-{uuid.uuid4().hex[:8]}"
    (cluster.project / "MLproject").write_text(
        f"name: {name}\nentry_points:\n  main:\n    parameters: {{word: {{type: string, default: hi}}}}\n"
        "    command: \"python -c 'import sys; print(sys.argv[1])' {word} && pwd\"\n"
    )
    # What an image for a pool holds: Python, Prefect and this package. Here they come from this machine.
    source = Path(prefect_mlprojects.__file__).parents[1]
    folders = sorted({str(Path(each).resolve()) for each in (sys.prefix, sys.base_prefix, source, cluster.project)})

    async def make_pool(client: Any) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect_kubernetes.worker import KubernetesWorker

        template = KubernetesWorker.get_default_base_job_template()
        pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        pod["volumes"] = [{"name": f"f{n}", "hostPath": {"path": each}} for n, each in enumerate(folders)]
        pod["containers"][0]["volumeMounts"] = [{"name": f"f{n}", "mountPath": each} for n, each in enumerate(folders)]
        await client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes", base_job_template=template))

    call_api(prefect_server.api_url, make_pool)
    deployment = deploy(
        cluster.project,
        work_pool=pool,
        env_manager="local",
        job_variables={
            "image": cluster.image,
            "namespace": cluster.namespace,
            "env": {
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin",
                "HOME": "/tmp",
                "PREFECT_HOME": "/tmp/prefect",
                "PREFECT_MLPROJECTS_CACHE_DIR": "/tmp/cache",
                "MLFLOW_TRACKING_URI": mlflow_server.uri,
            },
        },
    )
    handle = deployment.run({"word": "from the form"})
    log = tmp_path / "worker.log"
    with log.open("wb") as said:
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "kubernetes", "--run-once"],
            env={
                **os.environ,
                "KUBECONFIG": str(tmp_path / "kubeconfig"),
                "PREFECT_INTEGRATIONS_KUBERNETES_CLUSTER_UID": "the-double",
                "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED": "false",
            },
            stdout=said,
            stderr=said,
        )
    try:
        wait_for(
            lambda: cluster.pods and cluster.pods[0].status.phase in ("Failed", "Succeeded"), "the pod's end", log=log
        )
    finally:
        worker.terminate()
        worker.wait()
    (pod,) = cluster.pods
    said_there = cluster.core.read_namespaced_pod_log(pod.metadata.name, cluster.namespace)
    assert handle.get_status() == "FINISHED", said_there + log.read_text()
    found = MlflowClient(mlflow_server.uri).get_run(handle.run_id)
    assert (found.info.status, found.data.params) == ("FINISHED", {"word": "from the form"})
    assert pod.metadata.labels["prefect.io/flow-run-id"] == handle.flow_run_id
    question = {"logs": {"flow_run_id": {"any_": [handle.flow_run_id]}}}
    lines = [each["message"] for each in api(prefect_server.api_url).post("/logs/filter", json=question).json()]
    assert f"from the form\n{cluster.project}" in "\n".join(lines)
