"""Deployments are checked against their project before Prefect is asked for anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.services.git import git

from prefect_mlprojects.deployments.provisioning import make_schedule
from prefect_mlprojects.deployments.specification import specify
from prefect_mlprojects.exceptions import BackendError, FetchError, ParameterError, ProjectSpecError

PROJECT = """\
name: churn
entry_points:
  main:
    parameters: {alpha: {type: float, default: 0.1}, rounds: int}
    command: "python train.py {alpha} {rounds}"
  score/all: {command: "true"}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "MLproject").write_text(PROJECT)
    return folder


def test_specification_has_typed_values_and_form(project: Path) -> None:
    made = specify("project", parameters={"alpha": "0.5", "rounds": 3, "more": "x"}, tags=["a"])

    assert made.name == "churn"
    assert made.uri == str(project)
    assert made.flow_parameters() == {
        "uri": str(project),
        "entry_point": "main",
        "parameters": {"alpha": 0.5, "rounds": 3},
        "extra_parameters": {"more": "x"},
        "backend": "local",
    }
    assert "`main`" in made.description


def test_default_name_contains_entry_point(project: Path) -> None:
    assert specify(project, "score/all").name == "churn-score-all"
    assert specify(project, name="nightly").name == "nightly"
    with pytest.raises(ParameterError, match="contains one of"):
        specify(project, name="a/b")


def test_missing_required_value_is_refused_for_schedule_only(project: Path) -> None:
    assert specify(project).parameters == {}
    schedule = make_schedule("0 3 * * *", None, None, "Europe/Berlin")
    assert str(schedule) == "cron 0 3 * * * (Europe/Berlin)"
    assert specify(project, schedule=schedule, paused=True).paused
    with pytest.raises(ParameterError, match=r"'rounds' .int. needs a value"):
        specify(project, schedule=schedule)
    assert specify(project, schedule=schedule, parameters={"rounds": 1}).schedule == schedule


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"parameters": {"alpha": "much"}}, ParameterError, "'alpha' .float. has the value 'much'"),
        ({"entry_point": "mian"}, ProjectSpecError, "main"),
        ({"backend": "locl"}, BackendError, "Did you mean 'local'"),
        ({"backend_config": {"grace": 1}}, BackendError, "unknown key 'grace'"),
        ({"env_manger": "uv"}, ParameterError, "did you mean 'env_manager'"),
        ({"pin": True}, ParameterError, "only a version of a git project can be pinned"),
        ({"uri": "nowhere"}, FetchError, "does not exist"),
    ],
)
def test_invalid_values_are_refused(
    arguments: dict[str, object], error: type[Exception], words: str, project: Path
) -> None:
    with pytest.raises(error, match=words):
        specify(**{"uri": str(project), **arguments})  # type: ignore[arg-type]


def test_git_version_is_followed_or_pinned(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))

    git(project, "init", "-q", "-b", "trunk")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "x")
    followed = specify(f"git+{project.as_uri()}", version="trunk")
    pinned = specify(f"git+{project.as_uri()}", version="trunk", pin=True)

    assert (followed.options["version"], followed.uri) == ("trunk", f"git+{project.as_uri()}")
    assert pinned.options["version"] == pinned.version == git(project, "rev-parse", "HEAD")
    assert list((tmp_path / "cache" / "working-copies").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("0 3 * * *", 60, None, None), "give only one of cron and interval"),
        ((None, None, None, "Europe/Berlin"), "a time zone needs a schedule"),
        (("nonsense", None, None, None), "the schedule cron nonsense is not valid"),
        (("0 3 * * *", None, None, "Mars/Base"), "is not valid"),
        ((None, -5, None, None), "must be a positive number of seconds, not -5"),
        ((None, 0, None, None), "must be a positive number of seconds, not 0"),
        (("0 2 30 2 *", None, None, None), "is not valid: failed to find next date"),
        ((None, None, "FREQ=SOMETIMES", None), "is not valid"),
    ],
)
def test_invalid_schedule_is_refused(
    arguments: tuple[str | None, float | None, str | None, str | None], words: str
) -> None:
    with pytest.raises(ParameterError, match=words):
        make_schedule(*arguments)


def test_path_default_outside_the_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "MLproject").write_text(
        "name: data\nentry_points: {main: {parameters: {table: {type: path, default: data.csv}}, command: 'cat {table}'}}\n"
    )
    monkeypatch.chdir(elsewhere)
    # Where the deployment is made says nothing about where it runs.
    (elsewhere / "data.csv").write_text("1")
    with pytest.raises(ParameterError, match=r"'data\.csv' of the path parameter 'table' is not in the project"):
        specify(project)
    given = specify(project, parameters={"table": "data.csv"})
    assert given.parameters == {"table": str(elsewhere / "data.csv")}
    (project / "data.csv").write_text("2")
    assert specify(project).parameters == {}
    assert specify(project, parameters={"table": "data.csv"}).parameters == {"table": "data.csv"}
