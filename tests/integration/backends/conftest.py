"""One harness for each backend: the adapters between the contract's cases and the services."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.integration.databricks.bench import CLUSTER, FAST
from tests.integration.databricks.conftest import workspace as workspace
from tests.integration.docker.conftest import IMAGE
from tests.integration.docker.conftest import engine as engine
from tests.integration.kubernetes.conftest import cluster as cluster
from tests.integration.kubernetes.conftest import double as double
from tests.services.backend_harness import BackendHarness

BACKENDS = ("local", "docker", "kubernetes", "databricks")


class LocalHarness(BackendHarness):
    """Processes of this machine."""

    env_manager: ClassVar[str | None] = "local"

    def remaining(self, flow_run_id: str) -> list[str]:
        del flow_run_id
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if (entry / "cwd").resolve() == self.folder.resolve():
                        found.append(entry.name)
                except OSError:
                    continue
        return found


@dataclass
class DockerHarness(BackendHarness):
    """Containers of the session's engine."""

    engine: Any = None

    def remaining(self, flow_run_id: str) -> list[str]:
        label = f"prefect-mlprojects.flow-run-id={flow_run_id}"
        return [str(each["Id"]) for each in self.engine.containers(all=True, filters={"label": label})]


@dataclass
class KubernetesHarness(BackendHarness):
    """Jobs of the fake API server, or of a real cluster."""

    name: ClassVar[str] = "kubernetes"
    survives_client: ClassVar[bool] = True
    separates_streams: ClassVar[bool] = False
    long_grace: ClassVar[Mapping[str, Any]] = {"termination-grace": 30}

    cluster: Any = None

    def remaining(self, flow_run_id: str) -> list[str]:
        del flow_run_id
        jobs = [job.metadata.name for job in self.cluster.jobs if not job.status.conditions]
        return jobs + [pod.metadata.name for pod in self.cluster.pods if pod.status.phase in ("Pending", "Running")]

    def visible(self) -> str:
        objects = [*self.cluster.jobs, *self.cluster.pods]
        return str(self.cluster.core.api_client.sanitize_for_serialization(objects))


@dataclass
class DatabricksHarness(BackendHarness):
    """Job runs of the fake workspace."""

    name: ClassVar[str] = "databricks"
    survives_client: ClassVar[bool] = True
    # A submission is readable for others, so it has plain variables only; secrets come from the workspace's scopes.
    passes_variables: ClassVar[bool] = False
    long_grace: ClassVar[Mapping[str, Any]] = {}

    workspace: Any = None

    def remaining(self, flow_run_id: str) -> list[str]:
        del flow_run_id
        return [str(number) for number, run in self.workspace.runs.items() if not run.ended]

    def visible(self) -> str:
        return str([run.body for run in self.workspace.runs.values()])


def _docker(request: pytest.FixtureRequest, folder: Path) -> BackendHarness:
    engine = request.getfixturevalue("engine")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    socket = Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / "docker" / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{socket}")
    for name in ("DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    return DockerHarness(folder, {"grace-period": 2}, IMAGE, engine=engine)


def _kubernetes(request: pytest.FixtureRequest, folder: Path) -> BackendHarness:
    cluster = request.getfixturevalue("cluster")
    config = {**cluster.config, "namespace": cluster.namespace, "termination-grace": 2}
    return KubernetesHarness(folder, config, cluster.image, cluster=cluster)


def _databricks(request: pytest.FixtureRequest, folder: Path) -> BackendHarness:
    workspace = request.getfixturevalue("workspace")
    return DatabricksHarness(folder, {**FAST, "new_cluster": CLUSTER}, workspace=workspace)


_HARNESSES: dict[str, Callable[[pytest.FixtureRequest, Path], BackendHarness]] = {
    "local": lambda request, folder: LocalHarness(folder, {"grace-period": 2}),
    "docker": _docker,
    "kubernetes": _kubernetes,
    "databricks": _databricks,
}


@pytest.fixture(params=BACKENDS)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> BackendHarness:
    """Each backend in turn, with an empty project."""
    folder = tmp_path / "harness"
    folder.mkdir()
    return _HARNESSES[request.param](request, folder)
