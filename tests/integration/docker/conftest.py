"""A Docker engine and a registry for the test session, and a project that runs on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services import docker_engine
from tests.services.mlflow_server import MlflowServer
from tests.services.prefect_api import use_server

from prefect_mlprojects._support.locks import hold_lock

IMAGE = "busybox-tests:1"
CARRIED = "busybox-carried:1"

PROJECT = """\
name: contained
docker_env:
  image: busybox-tests:1
  environment: [[FIXED, "from project"], COPIED]
entry_points:
  main:
    parameters:
      word: {type: string, default: hi}
      file: {type: path, default: "data.txt"}
    command: "echo out {word} && echo err >&2 && cat {file} > copy.txt; cat copy.txt; pwd"
  fail: {command: "echo going down >&2; exit 3"}
  variables: {command: "env"}
  missing: {command: "no-such-command"}
  sleep: {command: "echo sleeping now; sleep 600"}
  lines: {command: "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done"}
  who: {command: "id -u; touch /shared/made"}
  slow: {command: "i=0; while [ $i -lt 40 ]; do echo line $i; echo error $i >&2; sleep 0.1; i=$((i+1)); done; printf end"}
  quiet: {command: "sleep 3; echo at last"}
  checkpoint:
    command: >-
      sh -c "trap 'sleep 1; echo checkpoint; exit 0' TERM; echo begun; while :; do sleep 0.1; done" && echo uploaded
  greedy: {command: "tail /dev/zero"}
"""


@pytest.fixture(scope="session")
def engine(need_program: Callable[[str], str]) -> Iterator[Any]:
    """Docker's low-level client, connected to the session's engine, with the images in it."""
    need_program("dockerd")
    need_program("busybox")
    if os.geteuid() != 0:
        pytest.skip("a Docker engine of the tests' own needs root")
    import docker

    folder = Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / "docker"
    folder.mkdir(exist_ok=True)
    with hold_lock(folder / "lock"):
        address = docker_engine.start_engine(folder)
        client = docker.APIClient(base_url=address, version="auto")
        names = {name for image in client.images() for name in image["RepoTags"] or ()}
        if IMAGE not in names:
            docker_engine.import_busybox(client, IMAGE)
            docker_engine.import_busybox(client, CARRIED, project=True)
    yield client
    client.close()


@pytest.fixture(scope="session")
def python_image(engine: Any) -> str:
    """An image with the Python that runs the tests."""

    name = "python-tests:1"
    with hold_lock(Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / "docker" / "lock"):
        if not any(name in (image["RepoTags"] or ()) for image in engine.images()):
            docker_engine.import_python(engine, name)
    return name


@pytest.fixture
def registry(engine: Any, need_program: Callable[[str], str]) -> str:
    """``host:port`` of the session's registry."""
    need_program("docker-registry")

    folder = Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / "docker"
    with hold_lock(folder / "lock"):
        return docker_engine.start_registry(folder)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: Any, engine: Any) -> Path:
    """A Docker project with a new tracking store; the environment names the session's engine."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "MLproject").write_text(PROJECT)
    (folder / "data.txt").write_text("the data\n")
    monkeypatch.chdir(folder)
    socket = Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / "docker" / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{socket}")
    use_server(monkeypatch, prefect_server.api_url)
    for name in ("DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    store = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("COPIED", "from here")
    import mlflow

    mlflow.set_tracking_uri(store)
    return folder


@pytest.fixture
def elsewhere(project: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The session's engine's folder, for tests that reach it as one on another machine: tracked by a server, not a file."""
    monkeypatch.delenv("DOCKER_HOST")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    import mlflow

    mlflow.set_tracking_uri(mlflow_server.uri)
    return Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / "docker"


@pytest.fixture
def containers_of(engine: Any) -> Callable[[str], list[Any]]:
    """The containers, running or not, of a flow run."""

    def find(flow_run_id: str) -> list[Any]:
        found: list[Any] = engine.containers(
            all=True, filters={"label": f"prefect-mlprojects.flow-run-id={flow_run_id}"}
        )
        return found

    return find
