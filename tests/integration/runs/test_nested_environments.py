"""Runs that start runs: each sees its own environment, and nothing of ours."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., "subprocess.CompletedProcess[str]"]

PROJECT = "name: {name}\npython_env: python_env.yaml\nentry_points:\n  main:\n    command: >-\n      {command}\n"
PRINT = "import os, sys; print(sys.argv[1], sys.prefix, os.environ['VIRTUAL_ENV'], os.environ.get('PYTHONPATH'))\n"


def project(folder: Path, name: str, command: str, python_env: str) -> Path:
    made = folder / name
    made.mkdir()
    (made / "MLproject").write_text(PROJECT.format(name=name, command=command))
    (made / "python_env.yaml").write_text(python_env)
    (made / "show.py").write_text(PRINT)
    return made


def test_nested_runs_see_their_own_environment(mlprojects: Run, workspace: Path) -> None:
    inner = project(workspace, "inner", "python show.py inner", "build_dependencies: [--no-index]\n")
    programs = Path(sys.executable).parent
    commands = [
        "python show.py outer",
        # The project may have mlprojects or mlflow in its environment, or find another installation, as here.
        f"{shlex.quote(str(programs / 'mlprojects'))} run {shlex.quote(str(inner))}",
        f"{shlex.quote(str(programs / 'mlflow'))} run {shlex.quote(str(inner))} --env-manager local",
    ]
    outer = project(workspace, "outer", " && ".join(commands), "dependencies: [--no-index]\n")
    variables = {
        "PYTHONPATH": str(workspace / "ours"),
        "VIRTUAL_ENV": sys.prefix,
        "PATH": os.pathsep.join((str(programs), os.environ["PATH"])),
    }

    done = mlprojects("run", str(outer), env=variables)

    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("inner ", "outer "))]
    assert [line[0] for line in lines] == ["outer", "inner", "inner"]
    (_, outer_prefix, *_), (_, inner_prefix, *_), (_, local_prefix, *_) = lines
    assert all(line[1] == line[2] for line in lines)
    assert all(line[3] == "None" for line in lines)
    # mlprojects makes the inner project its own environment; "local" is the one that the outer project has activated.
    assert inner_prefix not in (outer_prefix, sys.prefix)
    assert local_prefix == outer_prefix
    assert "Traceback" not in done.stderr


def test_nested_run_inherits_the_environment_manager(mlprojects: Run, workspace: Path) -> None:
    inner = project(workspace, "inner", "python show.py inner", "build_dependencies: [--no-index]\n")
    programs = Path(sys.executable).parent
    nested = f"{shlex.quote(str(programs / 'mlprojects'))} run {shlex.quote(str(inner))}"
    outer = project(workspace, "outer", f"{nested} && {nested} --env-manager uv", "dependencies: [--no-index]\n")
    variables = {"PATH": os.pathsep.join((str(programs), os.environ["PATH"])), "VIRTUAL_ENV": sys.prefix}

    done = mlprojects("run", str(outer), "--env-manager", "local", env=variables)

    assert done.returncode == 0, done.stderr
    inherited, named = (line.split()[1] for line in done.stdout.splitlines() if line.startswith("inner "))
    assert inherited == sys.prefix
    assert named != sys.prefix
