from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.environments.managers import check_environment
from prefect_mlprojects.environments.python import (
    Contents,
    PythonSpecification,
    VenvManagerName,
    read_contents,
    read_specification,
)
from prefect_mlprojects.environments.python.interpreters import current_interpreter
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import DockerEnvironment, Project

CURRENT = "{}.{}.{}".format(*sys.version_info[:3])
MINOR = "{}.{}".format(*sys.version_info[:2])


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A machine that has no Pythons except the running one, where pip and uv are not set up."""
    none = str(tmp_path / "none")
    return {
        "HOME": none,
        "PATH": none,
        "PYENV_ROOT": none,
        "UV_PYTHON_INSTALL_DIR": none,
        "UV_PYTHON_DOWNLOADS": "never",
    }


@pytest.fixture
def specify(make_project: Any, tmp_path: Path, environ: dict[str, str]) -> Any:
    def make(text: str, manager: VenvManagerName = "uv", folder: str = "project", **files: str) -> PythonSpecification:
        project = make_project({"python_env.yaml": text, **files}, folder=folder)
        return read_specification(project, manager, environ, tmp_path / "cache")

    return make


def test_key_for_same_content_is_equal(specify: Any) -> None:
    first = specify(f"python: '{MINOR}'\ndependencies: [six==1.16, attrs]\n", folder="one")
    same = specify(f"# a comment\ndependencies:\n  - six == 1.16\n  - Attrs\npython: '{CURRENT}'\n", folder="two")
    assert first.key == same.key
    assert len(first.key) == 32


def test_without_a_python_the_running_one_is_used(specify: Any) -> None:
    made = specify("dependencies: [six]\n")
    assert (made.python_version, made.interpreter) == (CURRENT, current_interpreter())
    assert made.key == specify(f"python: '{CURRENT}'\ndependencies: [six]\n").key


@pytest.mark.parametrize(
    "changed",
    [
        "dependencies: [six==1.17]\n",
        "dependencies: []\n",
        "build_dependencies: [six==1.16]\n",
        "build_dependencies: [pip]\ndependencies: [six==1.16]\n",
        "dependencies: [-c c.txt, six==1.16]\n",
    ],
)
def test_other_content_makes_another_key(specify: Any, changed: str) -> None:
    assert specify("dependencies: [six==1.16]\n").key != specify(changed, **{"c.txt": "attrs<99\n"}).key


def test_key_includes_manager_and_user_settings(specify: Any, environ: dict[str, str]) -> None:
    text = "dependencies: [six]\n"
    keys = {specify(text).key, specify(text, "virtualenv").key}
    environ["UV_PRERELEASE"] = "allow"
    keys.add(specify(text).key)
    environ["PIP_INDEX_URL"] = "https://example.org"
    keys.add(specify(text).key)
    assert len(keys) == 3


def test_key_depends_on_python_version(specify: Any, environ: dict[str, str], tmp_path: Path) -> None:
    python = tmp_path / "pyenv/versions/3.7.16/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    environ["PYENV_ROOT"] = str(tmp_path / "pyenv")
    other = specify("python: '3.7'\n")
    assert (other.python_version, other.interpreter.path) == ("3.7.16", python)
    assert other.key != specify("{}\n").key


@pytest.mark.parametrize(
    ("text", "description"),
    [
        ("dependencies: [six]\n", "1 requirement (python_env.yaml)"),
        ("build_dependencies: [pip]\ndependencies: [six, -r r.txt]\n", "4 requirements (python_env.yaml)"),
        ("dependencies: []\n", "nothing installed (python_env.yaml)"),
    ],
)
def test_description_counts_requirements(specify: Any, text: str, description: str) -> None:
    assert specify(text, **{"r.txt": "attrs\nh11\n-c c.txt\n", "c.txt": "idna<99\n"}).describe(None) == (
        f"uv, Python {CURRENT}, {description}"
    )


def test_environment_problems_are_reported_together(specify: Any, make_project: Any) -> None:
    text = "build_dependencies: ['six=1']\ndependencies: [-r none.txt]\n"
    with pytest.raises(EnvironmentBuildError) as caught:
        specify(text)
    assert str(caught.value).startswith("The environment of project 'demo' can't be made:\n  - ")
    assert str(caught.value).count("python_env.yaml:") == 2
    problems = check_environment(make_project({"python_env.yaml": text}))
    assert [problem.line for problem in problems] == [1, 2]
    assert check_environment(make_project({"python_env.yaml": "dependencies: [six]\n"})) == ()


def test_check_environment_for_docker_project_finds_nothing(tmp_path: Path) -> None:
    assert check_environment(Project(tmp_path, None, None, {}, DockerEnvironment("image"))) == ()


def test_unavailable_python_error_lists_found_interpreters(specify: Any) -> None:
    with pytest.raises(EnvironmentBuildError) as caught:
        specify("dependencies: []\npython: '>=3.99'\n")
    message = str(caught.value)
    assert "There is no Python >=3.99" in message
    assert "python_env.yaml:2 asks for" in message
    assert f"Found: {current_interpreter()}" in message
    assert "uv python install '>=3.99'" in message


@pytest.mark.parametrize(
    ("wanted", "python"),
    [
        ("python>=3.7.12", "3.7.16"),
        ("python>=3.7.16", "3.7.16"),
        ("python>=3.7", "3.7.16"),
        ("python>=3.5", CURRENT),
        ("python>3.7.16", CURRENT),
        ("python<=3.8", "3.7.16"),
        ("python<3.8", "3.7.16"),
    ],
)
def test_one_sided_range_selects_limit_or_nearest_python(
    make_project: Any, environ: dict[str, str], tmp_path: Path, wanted: str, python: str
) -> None:
    executable = tmp_path / "pyenv/versions/3.7.16/bin/python"
    executable.parent.mkdir(parents=True)
    executable.touch()
    environ["PYENV_ROOT"] = str(tmp_path / "pyenv")
    project = make_project({"conda.yaml": f"dependencies: ['{wanted}']\n"})
    assert read_specification(project, "uv", environ, tmp_path / "cache").python_version == python


@pytest.mark.parametrize("wanted", [f"{MINOR}.99", f"{MINOR}.98", "3.99"])
def test_unavailable_python_error_suggests_nearest(specify: Any, wanted: str) -> None:
    with pytest.raises(EnvironmentBuildError) as caught:
        specify(f"python: '{wanted}'\n")
    offered = f"The nearest that can be had is {current_interpreter()}: write {CURRENT} or {MINOR} instead."
    assert offered in str(caught.value)


LOCK = (
    'version = 1\nrequires-python = "{}"\n\n[[package]]\nname = "demo"\nversion = "1"\nsource = {{ virtual = "." }}\n'
)


@pytest.mark.parametrize(
    ("requires", "named", "python"),
    [
        (">=3.7", None, None),
        ("==3.99.*", None, "==3.99.*"),
        (">=3.7", "3.99", "3.99"),
        (">=3.7", "my-pyenv-environment", None),
        (">=3.7", "", None),
    ],
)
def test_locked_project_selects_pinned_or_required_python(
    make_project: Any, requires: str, named: str | None, python: str | None
) -> None:
    files = {"uv.lock": LOCK.format(requires), "pyproject.toml": "[project]\nname = 'demo'\n"}
    if named is not None:
        files[".python-version"] = named + "\n"
    contents = read_contents(make_project(files), "uv")
    assert isinstance(contents, Contents)
    assert contents.python == python
    assert contents.locked is not None


def test_virtualenv_with_uv_lock_warns_and_ignores_lock(make_project: Any) -> None:
    project = make_project({"uv.lock": LOCK.format(">=3.7"), "pyproject.toml": "[project]\nname = 'demo'\n"})
    contents = read_contents(project, "virtualenv")
    assert isinstance(contents, Contents)
    assert contents.locked is None
    assert "does not install from uv.lock" in contents.warnings[0]


def test_key_depends_on_lock_and_pyproject(make_project: Any, environ: dict[str, str], tmp_path: Path) -> None:
    def key(**files: str) -> str:
        return read_specification(make_project(files), "uv", environ, tmp_path / "cache").key

    files = {"uv.lock": LOCK.format(">=3.7"), "pyproject.toml": "[project]\nname = 'demo'\n"}
    first = key(**files)
    assert key(**files) == first
    assert key(**{**files, "uv.lock": files["uv.lock"] + "\n[[package]]\n"}) != first
    assert key(**{**files, "pyproject.toml": "[project]\nname = 'demo'\nversion = '2'\n"}) != first
