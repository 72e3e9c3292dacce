"""Environments that are made and used inside others: nothing of the outer one is seen in the inner one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.types import EnvironmentManagerName

PREPARE = """
import json, sys
from pathlib import Path
from prefect_mlprojects.environments.managers import environment_manager
from prefect_mlprojects.spec import load_project
from prefect_mlprojects.types import StopSignal
project = load_project(Path(sys.argv[1]))
manager = environment_manager(sys.argv[2])
made = manager.prepare(project, manager.plan(project), lambda line: None, StopSignal())
print(json.dumps({"variables": dict(made.variables), "location": str(made.plan.location)}))
"""
SEEN = "import json, os, sys; print(json.dumps([sys.prefix, sys.path, dict(os.environ)]))"


@pytest.mark.parametrize(
    ("outer", "inner"), [("conda", "uv"), ("uv", "conda"), ("conda", "conda"), ("uv", "virtualenv")]
)
def test_environment_prepared_inside_another_is_isolated(
    workshop: Any,
    conda: Any,
    pythons: Any,
    outer: EnvironmentManagerName,
    inner: EnvironmentManagerName,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "ours"))
    monkeypatch.setenv("PYTHONHOME", "")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.prefix, "bin")), os.environ["PATH"])))

    def files(manager: str, variable: str) -> dict[str, str]:
        if manager == "conda":
            return {"conda.yaml": conda.yaml([pythons], "python", more=f"variables: {{{variable}: yes}}\n")}
        return {"python_env.yaml": "dependencies: [--no-index]\n"}

    around = workshop.prepare(workshop.project(files(outer, "OUTER"), "outer"), outer)
    project = workshop.project(files(inner, "INNER"), "inner")
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(project.directory), inner],
        env=dict(around.variables),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    variables, location = found["variables"], found["location"]
    seen = subprocess.run(["python", "-c", SEEN], env=variables, cwd="/", capture_output=True, text=True, check=True)
    prefix, path, environ = json.loads(seen.stdout)
    assert prefix == location
    strangers = (str(around.plan.location), str(Path(sys.prefix)))
    if found["location"] != str(around.plan.location):
        assert not [folder for folder in path if folder.startswith(strangers)]
        folders = environ["PATH"].split(os.pathsep)
        assert not set(folders) & {f"{stranger}/bin" for stranger in strangers}
    gone = {"PYTHONPATH", "PYTHONHOME", "OUTER", "VIRTUAL_ENV" if inner == "conda" else "CONDA_PREFIX"}
    assert not gone & set(environ)
    assert environ["CONDA_PREFIX" if inner == "conda" else "VIRTUAL_ENV"] == location
