"""Real runs with the real SDK against a workspace double, tracked on a real MLflow server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.databricks_api import FakeWorkspace
from tests.integration.databricks.bench import Bench
from tests.services.mlflow_server import MlflowServer
from tests.services.prefect_api import use_server

from prefect_mlprojects.server.process import ServerAddress


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorkspace]:
    """A workspace that this process has a token for."""
    for name in [each for each in os.environ if each.startswith("DATABRICKS_")]:
        monkeypatch.delenv(name)
    double = FakeWorkspace(tmp_path / "cloud")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "databrickscfg"))
    monkeypatch.setenv("DATABRICKS_HOST", double.host)
    monkeypatch.setenv("DATABRICKS_TOKEN", "good-token")
    yield double
    double.close()


@pytest.fixture
def tracked(
    workspace: FakeWorkspace,
    monkeypatch: pytest.MonkeyPatch,
    prefect_server: ServerAddress,
    mlflow_server: MlflowServer,
) -> Iterator[FakeWorkspace]:
    """The workspace, with this process set up for runs through Prefect that MLflow keeps."""
    workspace.mlflow_server = mlflow_server.uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    use_server(monkeypatch, prefect_server.api_url)
    import mlflow

    mlflow.set_tracking_uri(mlflow_server.uri)
    yield workspace
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # MLflow's way to forget it


@pytest.fixture
def bench(workspace: FakeWorkspace, tmp_path: Path) -> Bench:
    """The backend at work on the workspace, without Prefect and MLflow."""
    folder = tmp_path / "project"
    folder.mkdir()
    return Bench(workspace, folder)
