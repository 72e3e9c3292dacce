from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prefect_mlprojects.environments.managers import choose_manager, missing_module_advice
from prefect_mlprojects.environments.python.files import uv_lock_of
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import (
    CondaEnvironment,
    DockerEnvironment,
    NoEnvironment,
    Project,
    ProjectEnvironment,
    PythonEnvironment,
)

PYTHON = PythonEnvironment(Path("/p/python_env.yaml"))
CONDA = CondaEnvironment(Path("/p/conda.yaml"))
DOCKER = DockerEnvironment("python:3.11")
NONE = NoEnvironment()


def project(environment: ProjectEnvironment) -> Project:
    return Project(Path("/p"), None, "demo", {}, environment)


@pytest.mark.parametrize(
    ("environment", "requested", "expected"),
    [
        (PYTHON, None, "uv"),
        (NONE, None, "uv"),
        (CONDA, None, "conda"),
        (DOCKER, None, "local"),
        (PYTHON, "virtualenv", "virtualenv"),
        (PYTHON, "local", "local"),
        (CONDA, "uv", "uv"),
        (CONDA, "virtualenv", "virtualenv"),
        (CONDA, "local", "local"),
        (CONDA, "conda", "conda"),
        (NONE, "local", "local"),
        (DOCKER, "uv", "local"),
        (DOCKER, "conda", "local"),
    ],
)
def test_manager_is_chosen_from_request_and_environment(
    environment: ProjectEnvironment, requested: str | None, expected: str
) -> None:
    assert choose_manager(project(environment), requested) == expected


@pytest.mark.parametrize("environment", [PYTHON, NONE])
def test_conda_makes_no_environment_from_python_files(environment: ProjectEnvironment) -> None:
    with pytest.raises(
        EnvironmentBuildError, match=r"'demo' can't be run with --env-manager conda.*uv, virtualenv or local"
    ):
        choose_manager(project(environment), "conda")


@pytest.mark.parametrize(
    ("environment", "inherited", "chosen"),
    [(PYTHON, "virtualenv", "virtualenv"), (PYTHON, "conda", "uv"), (DOCKER, "uv", "local")],
)
def test_inherited_manager_counts_where_it_fits(
    environment: ProjectEnvironment, inherited: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_MLPROJECTS_ENV_MANAGER", inherited)

    assert choose_manager(project(environment)) == chosen
    assert choose_manager(project(PYTHON), "local") == "local"


@pytest.mark.parametrize("requested", ["UV", "poetry", "", "uv "])
@pytest.mark.parametrize("environment", [PYTHON, DOCKER])
def test_unknown_manager_error_lists_known_managers(environment: ProjectEnvironment, requested: str) -> None:
    with pytest.raises(EnvironmentBuildError) as caught:
        choose_manager(project(environment), requested)
    assert "local, virtualenv, uv, conda" in str(caught.value)
    assert caught.value.manager == requested
    assert pickle.loads(pickle.dumps(caught.value)).manager == requested


def test_misspelt_manager_error_suggests_nearest_name() -> None:
    with pytest.raises(EnvironmentBuildError, match="Did you mean 'virtualenv'"):
        choose_manager(project(PYTHON), "virtual-env")


def test_uv_lock_requires_pyproject_and_no_environment_file(tmp_path: Path) -> None:
    bare = Project(tmp_path, None, None, {}, NONE)
    assert uv_lock_of(bare) is None
    (tmp_path / "uv.lock").touch()
    assert uv_lock_of(bare) is None
    (tmp_path / "pyproject.toml").touch()
    assert uv_lock_of(bare) == tmp_path / "uv.lock"
    assert uv_lock_of(Project(tmp_path, None, None, {}, PYTHON)) is None


ERROR = ("Traceback (most recent call last):", "ModuleNotFoundError: No module named '{}'")
CONDA_FILE = "dependencies:\n  - numpy=1.26\n  - pip:\n    - pywin32; sys_platform == 'win32'\n"


@pytest.mark.parametrize(
    ("files", "kind", "module", "advice"),
    [
        (
            {"python_env.yaml": "dependencies: [six]\n"},
            "uv",
            "yaml.nodes",
            "contains 'yaml' to {project}/python_env.yaml",
        ),
        ({"conda.yaml": CONDA_FILE}, "conda", "numpy", "Add the package that contains 'numpy' to {project}/conda.yaml"),
        ({"conda.yaml": CONDA_FILE}, "uv", "numpy", "left out, since uv installs only the pip section: numpy=1.26."),
        ({"conda.yaml": CONDA_FILE}, "virtualenv", "numpy", "Use --env-manager conda to install them. Add the package"),
        (
            {"conda.yaml": CONDA_FILE},
            "uv",
            "pywin32",
            "'pywin32' is only required where sys_platform == \"win32\". Add",
        ),
        ({}, "uv", "yaml", "no environment file, so its environment (uv) has no packages"),
        ({"uv.lock": "", "pyproject.toml": ""}, "uv", "yaml", "to the project's pyproject.toml and run 'uv lock'"),
        ({"uv.lock": "", "pyproject.toml": ""}, "virtualenv", "yaml", "(virtualenv) has no packages"),
        ({}, "databricks", "yaml", "no environment file, so it ran in the Python of databricks. List the package"),
        ({}, "local", "yaml", "(env_manager local) has no module 'yaml'"),
        ({}, "docker", "yaml", "The image has no module 'yaml'"),
        (
            {"helpers/a.py": ""},
            "uv",
            "helpers.b",
            "'helpers' is in the project's folder, which is not on Python's path",
        ),
    ],
)
def test_missing_module_produces_advice(
    make_project: Callable[..., Project], files: dict[str, str], kind: str, module: str, advice: str
) -> None:
    project = make_project(files)
    tail = [line.format(module) for line in ERROR]
    assert advice.format(project=project.directory) in missing_module_advice(project, kind, tail)
    assert missing_module_advice(project, kind, ["ValueError: No module named 'x'", "the end"]) == ""


def test_missing_module_in_temporary_copy_names_relative_file(
    make_project: Callable[..., Project],
) -> None:
    project = replace(make_project({"python_env.yaml": "dependencies: [six]\n"}), temporary=True)
    advice = missing_module_advice(project, "uv", [ERROR[1].format("yaml")])
    assert advice == "Add the package that contains 'yaml' to python_env.yaml."
