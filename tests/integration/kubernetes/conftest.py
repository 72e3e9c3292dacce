"""A new namespace for each test, on the double or on a real cluster (``--kube-context``)."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.services import docker_engine
from tests.services.fault_proxy import FaultProxy
from tests.services.recorder import Recorder
from tests.services.waiting import wait_for

from prefect_mlprojects._support.locks import hold_lock
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.contract import Command, RunIdentity
from prefect_mlprojects.backends.kubernetes import KubernetesBackend
from prefect_mlprojects.backends.kubernetes.config import KubernetesRequest
from prefect_mlprojects.backends.outcome import Outcome
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.sources.git import GitCredentialsLookup
from prefect_mlprojects.spec import check_parameters, find_entry_point, load_project
from prefect_mlprojects.types import StopSignal

DOUBLE_IMAGE = "double/project:1.0"
ENGINE_IMAGE = "kubernetes-tests:1"
"""What projects' images are built on: busybox on the session's engine."""


@dataclass
class Cluster:
    """The cluster under test: how to reach it, the image to use, and the namespace of this test."""

    config: dict[str, Any]
    image: str
    core: Any
    batch: Any
    rbac: Any
    namespace: str
    project: Path
    api: Any
    real: bool
    recorder: Recorder = field(default_factory=Recorder)

    def call(
        self,
        *,
        image: str | None = None,
        copy: WorkingCopy | None = None,
        docker_auth: dict[str, str] | None = None,
        git_credentials: GitCredentialsLookup | None = None,
        **config: Any,
    ) -> KubernetesRequest:
        """Returns a request of the project with a configuration."""
        directory = copy.directory if copy else self.project
        project = load_project(directory)
        entry_point = find_entry_point(project, "main")
        return KubernetesRequest(
            project,
            entry_point,
            check_parameters(entry_point, {}),
            copy or WorkingCopy(directory, str(directory), "local", str(directory)),
            KubernetesBackend().parse_config(
                {**self.config, "namespace": self.namespace, "termination-grace": 2, **config}
            ),
            Secret("https://tracking.invalid"),
            {"image": image or self.image},
            docker_auth,
            git_credentials=git_credentials,
        )

    def run(
        self,
        command: str,
        flow_run_id: str | None = None,
        *,
        stop: StopSignal | None = None,
        timeout: float | None = None,
        recorder: Recorder | None = None,
        call: KubernetesRequest | None = None,
        **options: Any,
    ) -> Outcome:
        """Runs a command as a Job, as the flow does: check, prepare, execute."""
        call, recorder = call or self.call(**options), recorder or self.recorder
        backend = KubernetesBackend()
        backend.check(call)
        command_of_run = Command(
            command,
            {"MLFLOW_RUN_ID": "run-1", "TOKEN": "it's a $(HOME) $$ secret"},
            RunIdentity(flow_run_id or str(uuid.uuid4()), "run-1", "Größe & Co", "main"),
            timeout,
        )
        prepared = backend.prepare(call, recorder.report, StopSignal())
        return backend.execute(prepared, command_of_run, recorder, stop or StopSignal())

    def run_and_stop(self, reason: str) -> Outcome:
        """Runs a command that takes long, and requests its stop once its output has started."""
        stop = StopSignal()

        def stop_when_it_runs() -> None:
            self.wait_for(lambda: b"begun" in self.recorder.data)
            stop.request(reason)

        thread = threading.Thread(target=stop_when_it_runs)
        thread.start()
        outcome = self.run("echo begun; sleep 1000", stop=stop)
        thread.join()
        return outcome

    @property
    def jobs(self) -> list[Any]:
        """The Jobs in the namespace."""
        found: list[Any] = self.batch.list_namespaced_job(self.namespace).items
        return found

    @property
    def pods(self) -> list[Any]:
        """The pods in the namespace."""
        found: list[Any] = self.core.list_namespaced_pod(self.namespace).items
        return found

    def wait_for(self, condition: Callable[[], object]) -> None:
        wait_for(condition, "the cluster")


@pytest.fixture(scope="session")
def double(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The double; None if the tests run on a real cluster."""
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
    # Without it, no pod can be created.
    wait_for(lambda: core.list_namespaced_service_account(namespace).items, "the namespace's service account")
    project = tmp_path / "project"
    project.mkdir()
    (project / "MLproject").write_text("name: project\nentry_points:\n  main:\n    command: 'true'\n")
    (project / "hello ä.txt").write_text("hello\n")
    image = request.config.getoption("--kube-image") or DOUBLE_IMAGE
    batch, rbac = client.BatchV1Api(api), client.RbacAuthorizationV1Api(api)
    try:
        yield Cluster(settings, image, core, batch, rbac, namespace, project, api, double is None)
    finally:
        core.delete_namespace(namespace)
        api.close()


@pytest.fixture
def host(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """The address by which pods reach servers of the tests on this machine."""
    given: str | None = request.config.getoption("--kube-host")
    if cluster.real and not given:
        pytest.skip("--kube-host is not given: the address by which the cluster's pods reach this machine")
    return given or "127.0.0.1"


@pytest.fixture
def registry(
    request: pytest.FixtureRequest,
    cluster: Cluster,
    need_program: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[str, dict[str, str] | None]:
    """A registry that the nodes pull from, its login, and the session's Docker engine, which pushes to it."""
    given: str | None = request.config.getoption("--kube-registry")
    if cluster.real and not given:
        pytest.skip("--kube-registry is not given: HOST:PORT of a registry that the cluster's nodes pull from")
    need_program("dockerd")
    need_program("busybox")
    import docker

    folder = Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / "docker"
    folder.mkdir(exist_ok=True)
    with hold_lock(folder / "lock"):
        engine = docker_engine.start_engine(folder)
        client = docker.APIClient(base_url=engine, version="auto")
        if not client.images(ENGINE_IMAGE):
            docker_engine.import_busybox(client, ENGINE_IMAGE)
        client.close()
        monkeypatch.setenv("DOCKER_HOST", engine)
        if given:
            return given, None
        need_program("docker-registry")
        address = docker_engine.start_registry(folder)
    return address, {"username": docker_engine.USER, "password": docker_engine.PASSWORD, "registry": address}


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[FaultProxy]:
    """A proxy in front of the cluster that injects faults; the cluster is used through it."""
    proxy = FaultProxy(cluster.api)
    cluster.config = {"kubeconfig": proxy.kubeconfig()}
    yield proxy
    proxy.close()
