"""The same calls through ``mlflow.projects.run`` and through ours: what the program saw, what was recorded, how it ended."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.services.git import git

from prefect_mlprojects import run
from prefect_mlprojects.exceptions import ExecutionException

PROJECT = """\
name: parity
entry_points:
  main:
    parameters:
      alpha: {type: float, default: 0.5}
      word: {type: string, default: none}
      file: {type: path, default: "."}
      place: {type: uri, default: "s3://bucket/key"}
    command: "python show.py {alpha} {word} {file} {place}"
  needs:
    parameters: {count: int}
    command: "python show.py {count}"
  fail:
    command: "python show.py failing; exit 3"
  kinds:
    parameters:
      deep: {type: bool, default: yes, description: MLflow ignores our keys}
      size: {type: choice, choices: [small, large], default: small}
      axes: {type: list, default: [0, 1]}
      rate: {type: float, default: "", optional: true, min: 0}
      tags: {type: list, default: "", optional: true, option: --tag}
      verbose: {type: bool, default: false, option: --verbose}
    command: "python show.py {deep} {size} {axes}"
"""
SHOW = """\
import json, os, sys
names = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
seen = {"argv": sys.argv[1:], "cwd": os.getcwd(), "variables": sorted(name for name in names if os.environ.get(name))}
json.dump(seen, open(os.environ["SEEN"], "w"))
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a call."""

    seen: Any
    status: str | None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub"):
        (place / "MLproject").write_text(PROJECT)
        (place / "show.py").write_text(SHOW)
    (folder / "bare.py").write_text(SHOW)
    for command in (("init", "-q", "-b", "trunk"), ("add", "-A"), ("commit", "-qm", "x"), ("tag", "v1")):
        git(folder, *command)
    return folder


def outcome(function: Any, error: type[Exception], uri: str, out: Path, **call: Any) -> Outcome:
    from mlflow import MlflowClient

    out.unlink(missing_ok=True)
    client = MlflowClient()
    before = {each.info.run_id for each in client.search_runs(["0"])}
    try:
        function(uri, env_manager="local", **call)
        raised = False
    except error:
        raised = True
    runs = [each for each in client.search_runs(["0"]) if each.info.run_id not in before]
    seen = json.loads(out.read_text()) if out.exists() else None
    if not runs:
        return Outcome(seen, "refused" if raised else None)
    assert raised == (runs[0].info.status != "FINISHED")
    tags = dict(runs[0].data.tags)
    # MLflow leaves the scheme out where a subdirectory was named.
    tags["mlflow.source.name"] = tags["mlflow.source.name"].removeprefix("file://")
    return Outcome(seen, runs[0].info.status, dict(runs[0].data.params), tags)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"parameters": {"alpha": 2, "word": "plain"}},
        {"parameters": {"word": "two words; $(date) 'quoted' \"double\" \\ * ~ é"}},
        {"parameters": {"extra": "more", "other": 3}},
        {"parameters": {"file": "show.py"}},
        {"entry_point": "needs", "parameters": {"count": "7"}},
        {"entry_point": "bare.py", "parameters": {"a": "b"}},
        {"entry_point": "fail"},
        # Its default "." is another difference on purpose (docs/compatibility.md, project-defaults).
        {"uri": "#sub", "parameters": {"file": "show.py"}},
        {"version": "v1"},
        {"run_name": "named"},
        {"entry_point": "kinds"},
        {"entry_point": "kinds", "parameters": {"deep": False, "size": "large", "axes": "[2]"}},
        # Refused by both.
        {"entry_point": "needs"},
        {"entry_point": "nowhere"},
        {"parameters": {"place": "no-scheme"}},
        {"parameters": {"file": "no-such-file"}},
        {"uri": "-missing"},
        {"backend": "nowhere"},
    ],
    ids=str,
)
def test_run_gives_same_result_as_mlflow(
    call: dict[str, Any], project: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import mlflow.projects

    out = workspace / "seen.json"
    monkeypatch.setenv("SEEN", str(out))
    monkeypatch.chdir(project)
    uri = f"{project}{call.get('uri', '')}"
    arguments = {name: value for name, value in call.items() if name != "uri"}
    theirs = outcome(mlflow.projects.run, Exception, uri, out, **arguments)
    ours = outcome(run, ExecutionException, uri, out, **arguments)

    # A call that MLflow refuses leaves a run behind that seems to go on for ever.
    assert ours.status == ("refused" if theirs.status == "RUNNING" else theirs.status)
    if ours.status == "refused":
        assert ours.seen is None
        return
    if "version" in call:
        # MLflow checks the version out where the user works; ours has a copy, and is called by its URL there.
        assert ours.seen["argv"][:2] == theirs.seen["argv"][:2]
        assert ours.tags["mlflow.source.git.commit"] == theirs.tags["mlflow.source.git.commit"]
        return
    assert ours.seen == theirs.seen
    # MLflow records values with the shell's quotes around them; docs/compatibility.md tells why ours do not.
    theirs_recorded = {name: value.strip("'") for name, value in theirs.params.items() if "'" not in value.strip("'")}
    # Ours records no optional parameter that is not given; it has to have the default "" for MLflow.
    theirs_recorded = {name: value for name, value in theirs_recorded.items() if value}
    if "file" in theirs_recorded:
        # Ours records which file it was, wherever it is looked at.
        theirs_recorded["file"] = str((project / theirs_recorded["file"]).resolve())
    assert {name: value for name, value in ours.params.items() if "'" not in value} == theirs_recorded
    added = {"prefect.flow_run_id", "prefect.flow_run_url", "mlflow.source.git.branch"}
    added |= {"mlprojects.failure.category", "mlprojects.failure.cause", "mlflow.note.content"}
    # MLflow makes names up, and ours come from it.
    names = {"mlflow.runName"} if "run_name" not in call else set()
    assert {key: value for key, value in ours.tags.items() if key not in added | names} == {
        key: value for key, value in theirs.tags.items() if key not in names
    }
