"""What a run leaves in MLflow beside what its code logs: experiment, numbers, output, description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from prefect_mlprojects import run
from prefect_mlprojects.exceptions import RunFailed

PROJECT = """\
name: records
entry_points:
  main:
    parameters:
      rate: {type: float, default: 5}
      tiny: {type: float, default: "1e-5"}
      count: {type: int, default: 10}
      unused: {type: float, default: 2}
      name: string
    command: "python train.py {rate} {tiny} {count} {unused} {name}"
  fail: {command: "python fail.py"}
  other: {command: "python other.py"}
  curve: {command: "python curve.py"}
"""
TRAIN = """\
import sys
import mlflow
rate, tiny, count = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
mlflow.set_experiment("chosen by the script")
with mlflow.start_run():
    mlflow.log_params({"rate": rate, "tiny": tiny, "count": count, "name": sys.argv[5]})
    print("trained", flush=True)
    print("warned", file=sys.stderr)
"""
CURVE = """\
import mlflow
with mlflow.start_run():
    for step in range(3):
        mlflow.log_metric("val_loss", 3 - step, step=step)
    mlflow.log_metric("accuracy", 0.5)
"""


@pytest.fixture
def project(workspace: Path) -> str:
    folder = workspace / "records"
    folder.mkdir()
    (folder / "MLproject").write_text(PROJECT)
    (folder / "train.py").write_text(TRAIN)
    (folder / "fail.py").write_text("print('going down'); raise SystemExit(3)\n")
    (folder / "other.py").write_text("import mlflow, sys\nmlflow.set_experiment('no' + 'where')\nmlflow.start_run()\n")
    (folder / "curve.py").write_text(CURVE)
    return str(folder)


@pytest.fixture
def card(prefect_server: Any) -> Callable[[str], str]:
    """Reads the card of a flow run."""
    from prefect_mlprojects.server.api import call_api

    async def read(client: Any, flow_run_id: str) -> str:
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(flow_run_id)]))
        (found,) = await client.read_artifacts(artifact_filter=of_run)
        return str(found.data)

    return lambda flow_run_id: call_api(prefect_server.api_url, read, flow_run_id)


def _output(workspace: Path, run_id: str) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    return Path(client.download_artifacts(run_id, "logs/stdout.txt", str(workspace))).read_text()


def test_script_that_sets_experiment_and_logs_its_numbers_works(
    project: str, workspace: Path, tracked: Callable[[str], Any]
) -> None:
    from mlflow import MlflowClient

    done = run(project, parameters={"name": "x"}, env_manager="local")

    found = tracked(done.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"rate": "5.0", "tiny": "1e-05", "count": "10", "unused": "2", "name": "x"}
    experiment = MlflowClient().get_experiment(found.info.experiment_id)
    assert experiment.name == "chosen by the script"
    assert sorted(_output(workspace, done.run_id).splitlines()) == ["trained", "warned"]
    description = found.data.tags["mlflow.note.content"]
    assert f"/runs/flow-run/{done.flow_run_id}" in description
    assert f"mlprojects rerun {done.flow_run_id}" in description


def test_failed_run_has_its_output_and_the_reason(project: str, workspace: Path, tracked: Callable[[str], Any]) -> None:
    with pytest.raises(RunFailed) as caught:
        run(project, "fail", env_manager="local")
    run_id = str(caught.value.run_id)
    assert _output(workspace, run_id) == "going down\n"
    tags = tracked(run_id).data.tags
    assert tags["mlprojects.failure.cause"] == "exit code 3"
    assert "failed: exit code 3" in tags["mlflow.note.content"]


def test_other_experiment_than_the_runs_is_explained(project: str) -> None:
    with pytest.raises(RunFailed, match="sets another experiment than the run's"):
        run(project, "other", env_manager="local")


def test_run_of_relative_folder_has_tags_card_and_absolute_uri(
    project: str, tracked: Callable[[str], Any], prefect_state: Callable[[str], Any], card: Callable[[str], str]
) -> None:
    done = run("records", "curve", env_manager="local", tags=["nightly", "team=vision"])

    flow_run = prefect_state(done.flow_run_id)
    assert flow_run.parameters["uri"] == project
    assert set(flow_run.tags) == {"nightly", "team=vision", "project:records", "entry-point:curve", "backend:local"}
    tags = tracked(done.run_id).data.tags
    assert (tags["nightly"], tags["team"]) == ("true", "vision")
    assert not any(name.startswith(("project:", "entry-point", "backend:")) for name in tags)
    text = card(done.flow_run_id)
    assert "| Exit code | 0 |" in text
    assert "| MLflow experiment | `Default` (ID 0) |" in text
    assert "## Command\n\n```text\npython curve.py\n```" in text
    assert "| Duration |" in text
    assert "![val_loss](data:image/svg+xml;base64," in text


def test_child_run_of_a_flow_has_tags_of_its_own(project: str, prefect_state: Callable[[str], Any]) -> None:
    from prefect import flow

    @flow
    def parent() -> str:
        return run(project, "curve", env_manager="local", tags=["child"]).flow_run_id

    assert set(prefect_state(parent()).tags) == {"child", "project:records", "entry-point:curve", "backend:local"}
