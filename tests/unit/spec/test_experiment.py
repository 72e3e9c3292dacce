"""The experiment that a project chooses: by its file, or by its script."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects.exceptions import ProjectSpecError
from prefect_mlprojects.spec import find_entry_point, load_project
from prefect_mlprojects.spec.experiment import script_experiment


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import mlflow\nmlflow.set_experiment('churn')\n", "churn"),
        ("from mlflow import set_experiment\ndef main():\n    set_experiment(experiment_name='churn')\n", "churn"),
        ("NAME = 'churn'\nmlflow.set_experiment(NAME)\n", "churn"),
        ("mlflow.set_experiment('a')\nmlflow.set_experiment('a')\n", "a"),
        ("mlflow.set_experiment('a')\nmlflow.set_experiment('b')\n", None),
        ("mlflow.set_experiment(sys.argv[1])\n", None),
        ("mlflow.set_experiment(experiment_id='7')\n", None),
        ("# mlflow.set_experiment('a')\n", None),
        ("not python(", None),
        ("\0", None),
        ("(" * 100_000, None),
    ],
)
def test_script_chooses_the_only_experiment_that_it_names(script: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text("entry_points: {main: {command: 'python -u train.py --x 1'}}\n")
    (tmp_path / "train.py").write_text(script)
    project = load_project(tmp_path)
    assert script_experiment(project, find_entry_point(project, "main")) == expected


def test_script_outside_of_the_project_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("mlflow.set_experiment('a')\n")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "MLproject").write_text("entry_points: {main: {command: 'python ../evil.py; python link.py'}}\n")
    (folder / "link.py").symlink_to(tmp_path / "evil.py")
    project = load_project(folder)
    assert script_experiment(project, find_entry_point(project, "main")) is None


def test_file_names_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text("experiment: churn\n")
    project = load_project(tmp_path)
    assert (project.experiment, project.warnings) == ("churn", ())
    (tmp_path / "MLproject").write_text("name: x\nexperiment: [a]\n")
    with pytest.raises(ProjectSpecError, match="MLproject:2: 'experiment' must be an experiment's name, not a list"):
        load_project(tmp_path)
