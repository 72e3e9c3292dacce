"""Compares the run of a project with the one that ``mlflow.projects.run`` records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import mlflow.projects
import pytest
from mlflow import MlflowClient
from tests.services.git import git

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.tracking import Tracker, TrackingRequest
from prefect_mlprojects.tracking.uris import sqlite_uri
from prefect_mlprojects.types import StopSignal

MLPROJECT = """
name: parity
entry_points:
  main:
    parameters:
      alpha: {type: float, default: 0.5}
      words: {type: string, default: none}
    command: "true {alpha} {words}"
"""


@pytest.fixture
def tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = sqlite_uri(tmp_path / "store" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture(params=["folder", "repository", "below", "ignored"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project outside of git, at the top of a repository, in a folder of one, and in an ignored folder of one."""
    top = tmp_path / "checkout"
    folder = top / "projects" / "one" if request.param in ("below", "ignored") else top
    folder.mkdir(parents=True)
    (folder / "MLproject").write_text(MLPROJECT)
    if request.param != "folder":
        git(top, "init", "-q", "-b", "trunk")
        (top / ".gitignore").write_text("projects/\n" if request.param == "ignored" else "*.tmp\n")
        git(top, "remote", "add", "origin", "https://me:hunter2@example.com/o/r.git")
        git(top, "add", ".")
        git(top, "commit", "-q", "-m", "first")
    return folder


def their_run(uri: str, **options: Any) -> Any:
    run: Any = mlflow.projects.run
    submitted = run(uri, env_manager="local", **options)
    return MlflowClient().get_run(submitted.run_id)


def our_run(uri: str, tracking_uri: str, **fields: Any) -> Any:
    copy = detect_source(uri).fetch(StopSignal(), lambda line: None)
    request = TrackingRequest(
        tracking_uri=Secret(tracking_uri),
        working_copy=copy,
        **{
            "entry_point": "main",
            "environment": "local",
            "flow_run_id": "f",
            "flow_run_url": "http://prefect/f",
            **fields,
        },
    )
    run = Tracker().start(request)
    Tracker().finish(run, "FINISHED")
    return MlflowClient().get_run(run.run_id)


def without(tags: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in tags.items() if name not in names}


def test_start_tags_are_those_of_mlflow_and_our_own(project: Path, tracking_uri: str) -> None:
    theirs = their_run(str(project), run_name="same name")
    ours = our_run(str(project), tracking_uri, run_name="same name", parameters={"alpha": "0.5", "words": "none"})

    # We add Prefect's tags, and the branch that is checked out (MLflow tags it only when it was asked for).
    added = {"prefect.flow_run_id", "prefect.flow_run_url"}
    if (project / ".git").exists() or project.name == "one":
        commit = theirs.data.tags.get("mlflow.source.git.commit")
        added |= {"mlflow.source.git.branch"} if commit else set()
    assert ours.data.tags.keys() - theirs.data.tags.keys() == added
    # Old versions of MLflow keep the password of a remote.
    expected = {name: value.replace("me:hunter2@", "") for name, value in theirs.data.tags.items()}
    assert without(ours.data.tags, *added) == expected
    assert ours.data.params == theirs.data.params
    assert ours.info.run_name == theirs.info.run_name
    assert ours.info.user_id == theirs.info.user_id
    assert ours.info.experiment_id == theirs.info.experiment_id
    assert ours.info.status == theirs.info.status
    assert "hunter2" not in str(ours.data.tags)


def test_start_inside_active_run_has_it_as_parent(tmp_path: Path, tracking_uri: str) -> None:
    from prefect_mlprojects.tracking import active_run_id

    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "MLproject").write_text(MLPROJECT)
    Tracker().warm_up(Secret(tracking_uri))

    with mlflow.start_run() as parent:
        theirs = their_run(str(tmp_path / "project"))
        ours = our_run(str(tmp_path / "project"), tracking_uri, parent_run_id=active_run_id())

    assert theirs.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert ours.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_start_parameters_are_recorded_without_shell_quotes(tmp_path: Path, tracking_uri: str) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "MLproject").write_text(MLPROJECT)
    parameters = {"words": "two words", "extra": "it's"}

    theirs = their_run(str(tmp_path / "project"), parameters=parameters)
    ours = our_run(str(tmp_path / "project"), tracking_uri, parameters={"alpha": "0.5", **parameters})

    # An intended difference: with the quotes, the same value logged by the project's own code would be a conflict.
    assert theirs.data.params == {"alpha": "0.5", "words": "'two words'", "extra": "'it'\"'\"'s'"}
    assert ours.data.params == {"alpha": "0.5", "words": "two words", "extra": "it's"}


def test_start_experiment_name_is_that_of_mlflow(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "MLproject").write_text(MLPROJECT)

    ours = our_run(str(tmp_path / "project"), tracking_uri, experiment_name="shared")
    theirs = their_run(str(tmp_path / "project"), experiment_name="shared")

    assert ours.info.experiment_id == theirs.info.experiment_id
    assert ours.info.artifact_uri.rpartition("/")[0] != ""
    assert ours.info.artifact_uri.split("/")[:-2] == theirs.info.artifact_uri.split("/")[:-2]
