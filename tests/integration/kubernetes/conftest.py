"""A namespace of its own for each test, on the double or on a real cluster (``--kube-context``)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.backends.base import BackendCall, ExecutionOutcome, ExecutionRequest, NoEvents, RunIdentity
from prefect_mlprojects.backends.kubernetes.backend import KubernetesBackend
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.spec import check_parameters, find_entry_point, load_project
from prefect_mlprojects.types import StopSignal, StreamName

DOUBLE_IMAGE = "double/project:1.0"


@dataclass
class Recorder(NoEvents):
    """Keeps what a run printed and reported."""

    data: bytes = b""
    reports: list[str] = field(default_factory=list)

    def write(self, stream: StreamName, data: bytes) -> None:
        self.data += data

    def report(self, line: str) -> None:
        self.reports.append(line)


@dataclass
class Cluster:
    """The cluster under test: how to reach it, the image to use, and the namespace of this test."""

    config: dict[str, Any]
    image: str
    core: Any
    batch: Any
    namespace: str
    project: Path
    recorder: Recorder = field(default_factory=Recorder)

    def run(
        self,
        command: str,
        flow_run_id: str | None = None,
        *,
        stop: StopSignal | None = None,
        timeout: float | None = None,
        image: str | None = None,
        **config: Any,
    ) -> ExecutionOutcome:
        project = load_project(self.project)
        entry_point = find_entry_point(project, "main")
        call = BackendCall(
            project,
            entry_point,
            check_parameters(entry_point, {}),
            WorkingCopy(self.project, str(self.project), "local", str(self.project)),
            {**self.config, "namespace": self.namespace, "termination-grace": 2, **config},
            "https://tracking.invalid",
            {"image": image or self.image},
        )
        backend = KubernetesBackend()
        backend.check(call)
        request = ExecutionRequest(
            command,
            self.project,
            None,
            {"MLFLOW_RUN_ID": "run-1", "TOKEN": "it's a $(HOME) $$ secret"},
            RunIdentity(flow_run_id or str(uuid.uuid4()), "run-1", "Größe & Co", "main"),
            call.config,
            timeout,
            call,
            backend.prepare(call, self.recorder.report, StopSignal()),
            events=self.recorder,
        )
        return backend.execute(request, self.recorder, stop or StopSignal())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def double(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The double; None when a real cluster is named."""
    if request.config.getoption("--kube-context"):
        yield None
        return
    from tests.fakes.kubernetes_api import KubernetesDouble

    made = KubernetesDouble({DOUBLE_IMAGE})
    yield made
    made.close()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, double: Any, tmp_path: Path) -> Iterator[Cluster]:
    from kubernetes import client, config

    if double is None:
        context = request.config.getoption("--kube-context")
        settings, api = {"kube-context": context}, config.new_client_from_config(context=context)
    else:
        settings = {"kubeconfig": double.kubeconfig()}
        api = config.new_client_from_config_dict(double.kubeconfig())
    namespace = f"mlprojects-{uuid.uuid4().hex[:10]}"
    core = client.CoreV1Api(api)
    core.create_namespace({"metadata": {"name": namespace}})
    project = tmp_path / "project"
    project.mkdir()
    (project / "MLproject").write_text("name: project\nentry_points:\n  main:\n    command: 'true'\n")
    (project / "hello ä.txt").write_text("hello\n")
    image = request.config.getoption("--kube-image") or DOUBLE_IMAGE
    yield Cluster(settings, image, core, client.BatchV1Api(api), namespace, project)
    core.delete_namespace(namespace)
