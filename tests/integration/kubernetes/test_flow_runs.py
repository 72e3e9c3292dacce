"""Projects as flow runs on a real Prefect server, tracked on a real MLflow server, run by pods."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr
from tests.services.kubeconfig import make_kubeconfig
from tests.services.mlflow_server import MlflowServer
from tests.services.prefect_api import use_server

import prefect_mlprojects
from prefect_mlprojects.exceptions import ExecutionException, RunFailed

_PROJECT = """\
name: on pods
entry_points:
  main:
    parameters:
      word: {type: string, default: hi}
    command: "echo says {word}; python3 train.py"
  fail: {command: "echo going down; exit 3"}
  sleep: {command: "echo sleeping now; sleep 600"}
"""
_TRAIN = """\
import json, os, time, urllib.request

data = {"run_id": os.environ["MLFLOW_RUN_ID"], "key": "loss", "value": 0.25, "timestamp": int(time.time() * 1000)}
url = os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/runs/log-metric"
headers = {"Content-Type": "application/json"}
urllib.request.urlopen(urllib.request.Request(url, json.dumps(data).encode(), headers))
"""


@pytest.fixture
def project(
    cluster: Any,
    host: str,
    mlflow_server: MlflowServer,
    prefect_server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A project in the working directory, and the addresses of the tracking server for runs and for pods."""
    folder: Path = cluster.project
    (folder / "MLproject").write_text(_PROJECT)
    (folder / "train.py").write_text(_TRAIN)
    monkeypatch.chdir(folder)
    use_server(monkeypatch, prefect_server.api_url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("KUBE_MLFLOW_TRACKING_URI", f"http://{host}:{mlflow_server.port}")
    if not cluster.real:
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(cluster.config["kubeconfig"]))
        cluster.config = {"kubeconfig": str(kubeconfig)}
    cluster.config |= {"namespace": cluster.namespace, "termination-grace": 2}
    return folder


def _tracked(run_id: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(run_id)


def _run(cluster: Any, entry_point: str = "main", **options: Any) -> Any:
    options = {"backend_config": cluster.config, "docker_args": {"image": cluster.image}, **options}
    return prefect_mlprojects.run(".", entry_point, backend="kubernetes", **options)


def test_run_on_pods_is_tracked(cluster: Any, project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    submitted = _run(cluster, parameters={"word": "it's $HOME"})
    assert submitted.get_status() == "FINISHED"
    assert "says it's $HOME" in capfd.readouterr().out.splitlines()
    (job,) = cluster.jobs
    run = _tracked(submitted.run_id)
    assert (run.info.status, run.data.metrics, run.data.params) == ("FINISHED", {"loss": 0.25}, {"word": "it's $HOME"})
    assert run.data.tags["mlprojects.kubernetes.job"] == job.metadata.name
    assert run.data.tags["mlflow.project.backend"] == "kubernetes"
    assert job.metadata.labels["prefect-mlprojects/flow-run-id"] == submitted.flow_run_id
    assert job.metadata.labels["prefect-mlprojects/mlflow-run-id"] == submitted.run_id
    assert submitted.flow_run_id in job.metadata.annotations["prefect-mlprojects/flow-run-url"]


def test_failing_command_is_tracked_as_failed(cluster: Any, project: Path) -> None:
    with pytest.raises(RunFailed, match="exit code 3") as caught:
        _run(cluster, "fail")
    assert "going down" in caught.value.output_tail
    (job,) = cluster.jobs
    assert _tracked(job.metadata.labels["prefect-mlprojects/mlflow-run-id"]).info.status == "FAILED"


def test_cancel_removes_the_pods(cluster: Any, project: Path) -> None:
    submitted = _run(cluster, "sleep", synchronous=False)
    cluster.wait_for(lambda: any(pod.status.phase == "Running" for pod in cluster.pods))
    submitted.cancel()
    assert not submitted.wait()
    assert submitted.get_status() == "KILLED"
    assert (cluster.pods, cluster.jobs) == ([], [])
    assert _tracked(submitted.run_id).info.status == "KILLED"


def test_local_store_is_refused(cluster: Any, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBE_MLFLOW_TRACKING_URI")
    with pytest.raises(ExecutionException, match=r"of this machine alone.*KUBE_MLFLOW_TRACKING_URI"):
        _run(cluster)
    assert cluster.jobs == []


def _kubeconfig(api: Any) -> dict[str, Any]:
    """Returns a kubeconfig with the connection of a client, and with contents instead of paths."""
    settings = api.configuration

    def read(path: str | None) -> str:
        return base64.b64encode(Path(path).read_bytes()).decode() if path else ""

    server = {"server": settings.host, "certificate-authority-data": read(settings.ssl_ca_cert)}
    user = {"client-certificate-data": read(settings.cert_file), "client-key-data": read(settings.key_file)}
    login = settings.auth_settings().get("BearerToken")
    if login is not None:
        user["token"] = login["value"].removeprefix("Bearer ")
    return make_kubeconfig(server, user)


def test_blocks_connect_to_the_cluster(cluster: Any, project: Path, save_block: Callable[[Any, str], None]) -> None:
    from prefect_mlprojects.blocks import KubernetesCluster, KubernetesJobDefaults

    name = cluster.namespace
    save_block(KubernetesCluster(kubeconfig=SecretStr(yaml.safe_dump(_kubeconfig(cluster.api)))), name)
    config = {"namespace": cluster.namespace, "termination-grace": 2}
    save_block(KubernetesJobDefaults(config=config, credentials=name), name)
    # The tracking URI for pods is in the block only: the request may not be refused before the block was read.
    submitted = _run(cluster, backend_config=f"kubernetes-backend/{name}")
    assert submitted.get_status() == "FINISHED"
    submitted = _run(cluster, backend_config={**config, "credentials": name})
    assert submitted.get_status() == "FINISHED"
    assert len(cluster.jobs) == 2


def _mlprojects(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from prefect_mlprojects.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_command_line_plans_and_runs(cluster: Any, project: Path) -> None:
    options = [".", "--backend", "kubernetes", "--backend-config", json.dumps(cluster.config)]
    options += ["--docker-args", f"image={cluster.image}"]
    planned = _mlprojects("plan", *options, "-P", "word=there")
    assert planned.returncode == 0, planned.stderr
    manifest = yaml.safe_load(planned.stdout.partition("manifest:\n")[2])
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    assert (manifest["kind"], container["image"]) == ("Job", cluster.image)
    assert container["args"] == ["echo says there; python3 train.py"]
    assert cluster.jobs == []
    done = _mlprojects("run", *options, "-P", "word=there")
    assert done.returncode == 0, done.stderr
    assert "says there" in done.stdout.splitlines()
    failed = _mlprojects("run", *options, "-e", "fail")
    assert failed.returncode != 0
    assert "exit code 3" in failed.stderr
    assert "Traceback" not in failed.stderr
