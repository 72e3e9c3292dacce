"""What a run leaves in MLflow beside what its code logs: experiment, numbers, output, description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def project(workspace: Path) -> str:
    folder = workspace / "records"
    folder.mkdir()
    (folder / "MLproject").write_text(PROJECT)
    (folder / "train.py").write_text(TRAIN)
    (folder / "fail.py").write_text("print('going down'); raise SystemExit(3)\n")
    (folder / "other.py").write_text("import mlflow, sys\nmlflow.set_experiment('no' + 'where')\nmlflow.start_run()\n")
    return str(folder)


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
