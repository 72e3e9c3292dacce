"""Real runs on a real Prefect server, tracked in a SQLite store of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import use_server

PROJECTS = Path(__file__).parents[2] / "projects"


@pytest.fixture
def greet() -> str:
    """The small project most tests run."""
    return str(PROJECTS / "greet")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: Any) -> Iterator[Path]:
    """A working directory with an empty MLflow store, on the session's Prefect server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    use_server(monkeypatch, prefect_server.api_url)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    yield tmp_path
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # MLflow's way to forget it; its annotation is narrower


@pytest.fixture
def tracked(workspace: Path) -> Callable[[str], Any]:
    """Reads an MLflow run from the test's store."""
    from mlflow.tracking import MlflowClient

    return lambda run_id: MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}").get_run(run_id)


@pytest.fixture
def prefect_state(prefect_server: Any) -> Callable[[str], Any]:
    """Reads a flow run from Prefect's server."""
    from prefect_mlprojects.server.api import call_api

    async def read(client: Any, flow_run_id: str) -> Any:
        from uuid import UUID

        return await client.read_flow_run(UUID(flow_run_id))

    return lambda flow_run_id: call_api(prefect_server.api_url, read, flow_run_id)


@pytest.fixture
def flow_log(flow_records: Callable[[str], list[Any]]) -> Callable[[str], list[Any]]:
    """Reads the project's output from a flow run's log: the records, in order."""
    return lambda flow_run_id: [log for log in flow_records(flow_run_id) if log.name.startswith("prefect_mlprojects.")]


@pytest.fixture
def flow_records(prefect_server: Any) -> Callable[[str], list[Any]]:
    """Reads a flow run's log: the records, in order."""
    from prefect_mlprojects.server.api import call_api

    async def read(client: Any, flow_run_id: str) -> list[Any]:
        from uuid import UUID

        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
        from prefect.client.schemas.sorting import LogSort

        logs: list[Any] = []
        while True:
            page = await client.read_logs(
                LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(flow_run_id)])),
                limit=200,
                offset=len(logs),
                sort=LogSort.TIMESTAMP_ASC,
            )
            logs += page
            if len(page) < 200:
                return logs

    return lambda flow_run_id: call_api(prefect_server.api_url, read, flow_run_id)


@pytest.fixture
def mlprojects(workspace: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command ``mlprojects`` as a user would."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from prefect_mlprojects.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            cwd=workspace,
            env={**os.environ, **options.pop("env", {})},
            timeout=300,
            check=False,
            **options,
        )

    return run
