from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.environments.managers import environment_manager, release_environment
from prefect_mlprojects.types import StopSignal


def executable(folder: Path, name: str = "python") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return folder / name


def prepare(project: Any) -> Any:
    manager = environment_manager("local")
    return manager.prepare(project, manager.plan(project), print, StopSignal())


def test_caller_environment_is_used_unchanged(
    make_project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = executable(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(python.parent))
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "internal")
    environment = prepare(make_project({"python_env.yaml": "dependencies: [six]\n"}))
    assert (environment.reused, environment.plan.key, environment.plan.location) == (True, None, None)
    assert environment.variables["PATH"] == str(python.parent)
    assert environment.variables["PYTHONPATH"] == "/mine"
    assert "PREFECT__FLOW_RUN_ID" not in environment.variables
    assert str(python) in environment.plan.description
    release_environment(environment)


def test_python_outside_current_environment_warns(
    make_project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = executable(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(python.parent))
    plan = environment_manager("local").plan(make_project())
    if sys.prefix != sys.base_prefix:
        (warning,) = plan.warnings
        assert str(python) in warning
        assert sys.prefix in warning
    assert plan.python_version is None


def test_our_own_python_is_named_with_its_version(
    make_project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(folder))
    plan = environment_manager("local").plan(make_project())
    assert plan.warnings == ()
    if (folder / "python").exists():
        assert plan.python_version == "{}.{}.{}".format(*sys.version_info[:3])


def test_where_there_is_no_python_at_all_ours_is_put_behind(
    make_project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = prepare(make_project())
    assert environment.variables["PATH"] == os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent)))
    monkeypatch.delenv("PATH")
    assert prepare(make_project()).variables["PATH"].startswith(os.defpath)
