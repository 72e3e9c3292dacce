"""Projects and caches for the tests of environments: real files in temporary folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import pytest

from prefect_mlprojects.spec.project import (
    CondaEnvironment,
    NoEnvironment,
    Project,
    ProjectEnvironment,
    PythonEnvironment,
)

MakeProject: TypeAlias = Callable[..., Project]


@pytest.fixture
def make_project(tmp_path: Path) -> MakeProject:
    """Writes a project's files and returns the project that has them."""

    def make(files: Mapping[str, str] | None = None, *, name: str | None = "demo", folder: str = "project") -> Project:
        directory = tmp_path / folder
        directory.mkdir(exist_ok=True)
        for path, text in (files or {}).items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text, encoding="utf-8")
        environment: ProjectEnvironment = NoEnvironment()
        if (directory / "python_env.yaml").exists():
            environment = PythonEnvironment(directory / "python_env.yaml")
        elif (directory / "conda.yaml").exists():
            environment = CondaEnvironment(directory / "conda.yaml")
        return Project(directory, None, name, {}, environment)

    return make
