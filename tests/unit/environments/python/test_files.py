from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.utils.environment import _PythonEnv

from prefect_mlprojects.environments.python.files import (
    LockedPackage,
    PythonSpec,
    read_conda_env,
    read_lock,
    read_python_env,
)
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec import load_project

FULL = """\
python: "3.10"   # quoted, as it must be
build_dependencies:
  - pip==24.0
  - setuptools
dependencies:
  - -r requirements.txt
  - scikit-learn==1.5.2
"""


def write(tmp_path: Path, text: str | bytes, name: str = "python_env.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def texts(spec: PythonSpec | tuple[Problem, ...]) -> tuple[str | None, list[str], list[str]]:
    assert isinstance(spec, PythonSpec), spec
    return spec.python, [e.text for e in spec.build_dependencies], [e.text for e in spec.dependencies]


def test_complete_python_env_is_read_with_line_numbers(tmp_path: Path) -> None:
    spec = read_python_env(write(tmp_path, FULL))
    assert texts(spec) == ("3.10", ["pip==24.0", "setuptools"], ["-r requirements.txt", "scikit-learn==1.5.2"])
    assert isinstance(spec, PythonSpec)
    assert (spec.python_line, spec.build_dependencies[0].line, spec.dependencies[1].line) == (1, 3, 7)


@pytest.mark.parametrize(
    ("text", "python", "dependencies"),
    [
        ("dependencies: []\n", None, []),
        ("dependencies:\n", None, []),
        ("python:\n", None, []),
        ("python: '3.11.7'\n", "3.11.7", []),
        ("python: '>=3.10,<3.12'\n", ">=3.10,<3.12", []),
        ("\ufeffdependencies: [six]\n", None, ["six"]),
        ("dependencies:\n  - |\n    six\n    iniconfig\n", None, ["six", "iniconfig"]),
        (
            "x: &deps [six]\ndependencies: *deps\n".replace("x: &deps [six]\n", "build_dependencies: &deps [six]\n"),
            None,
            ["six"],
        ),
    ],
)
def test_python_env_with_omitted_fields_is_read(
    tmp_path: Path, text: str, python: str | None, dependencies: list[str]
) -> None:
    spec = read_python_env(write(tmp_path, text))
    assert (texts(spec)[0], texts(spec)[2]) == (python, dependencies)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [(None, "empty")]),
        ("# only a comment\n", [(None, "empty")]),
        ("- six\n", [(1, "must be a mapping")]),
        ("just text\n", [(1, "must be a mapping")]),
        ("dependencies:\n\t- six\n", [(2, "not valid YAML")]),
        ("dependencies: [six\n", [(2, "not valid YAML")]),
        ("dependencies: [six]\ndependencies: [attrs]\n", [(2, "is given twice")]),
        ("dependencies: six\n", [(1, "must be a list")]),
        ("dependencies: {six: 1}\n", [(1, "must be a list")]),
        (
            "dependencies:\n  - six\n  - 3\n  - [a]\n  - a: b\n",
            [(3, "must be a text"), (4, "must be a text"), (5, "must be a text")],
        ),
        ("python: 3.10\n", [(1, "has no quotes")]),
        ("python: 3\n", [(1, "has no quotes")]),
        ("python: [3.10]\n", [(1, "must be a version")]),
        ("python: three\n", [(1, "is not a version")]),
        ('python: ""\n', [(1, "is not a version")]),
        ("dependancies: [six]\n", [(1, "did you mean 'dependencies'?")]),
        ("name: x\n", [(1, "the keys are python, build_dependencies, dependencies")]),
        (b"dependencies: [\xff]\n", [(1, "UTF-8")]),
        ("a: 1\nb: 2\npython: 3.9\n", [(1, "'a'"), (2, "'b'"), (3, "number")]),
    ],
)
def test_everything_wrong_is_named_with_its_line(
    tmp_path: Path, text: str | bytes, expected: list[tuple[int | None, str]]
) -> None:
    path = write(tmp_path, text)
    problems = read_python_env(path)
    assert isinstance(problems, tuple)
    assert [problem.line for problem in problems] == [line for line, _ in expected]
    assert all(problem.file == path for problem in problems)
    for problem, (_, words) in zip(problems, expected, strict=True):
        assert words in str(problem)


def test_missing_file_and_folder_are_reported(tmp_path: Path) -> None:
    (missing,) = read_python_env(tmp_path / "none.yaml")  # type: ignore[misc]  # a problem is expected
    assert "No such file" in str(missing)
    (folder,) = read_python_env(tmp_path)  # type: ignore[misc]  # a problem is expected
    assert "Is a directory" in str(folder)


CONDA = """\
name: demo
channels: [conda-forge]
dependencies:
  - python=3.10.13
  - pip<=24.0
  - setuptools=65
  - numpy=1.26
  - libgomp
  - pip:
      - six==1.16.0
      - -r requirements.txt
"""


def test_pip_section_of_conda_file_is_read_as_mlflow_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path, CONDA, "conda.yaml")
    spec = read_conda_env(path, "uv")
    theirs = _PythonEnv.from_conda_yaml(path)  # type: ignore[no-untyped-call]  # MLflow has no types here
    assert texts(spec) == (theirs.python, theirs.build_dependencies, theirs.dependencies)
    assert isinstance(spec, PythonSpec)
    (warning,) = spec.warnings
    assert "numpy=1.26, libgomp" in warning
    assert "uv" in warning


@pytest.mark.parametrize(
    ("dependency", "python"),
    [
        ("python=3.10", "3.10"),
        ("python==3.10.2", "3.10.2"),
        ("python>=3.9", "3.9"),
        ("python<=3.9", "3.9"),
        ("python = 3.10", "3.10"),
        ("python 3.10.*", "3.10"),
        ("python=3.10.*=*_cpython", "3.10"),
        ("conda-forge::python=3.11", "3.11"),
        ("python>=3.9,<3.12", ">=3.9,<3.12"),
        ("python<3.12", "<3.12"),
        ("python > 3.6", ">3.6"),
        ("python!=3.12", "!=3.12"),
    ],
)
def test_conda_python_version_or_range_is_read(tmp_path: Path, dependency: str, python: str) -> None:
    spec = read_conda_env(write(tmp_path, f"dependencies: ['{dependency}']\n", "conda.yaml"), "uv")
    assert texts(spec) == (python, [], [])


@pytest.mark.parametrize(
    ("dependency", "python", "python_range"),
    [
        ("python>=3.7.12", "3.7.12", ">=3.7.12"),
        ("python <= 3.9", "3.9", "<=3.9"),
        ("python~=3.9.2", "3.9.2", "~=3.9.2"),
        ("python=3.10", "3.10", None),
        ("python==3.10.2", "3.10.2", None),
    ],
)
def test_one_sided_conda_python_keeps_its_range(
    tmp_path: Path, dependency: str, python: str, python_range: str | None
) -> None:
    spec = read_conda_env(write(tmp_path, f"dependencies: ['{dependency}']\n", "conda.yaml"), "uv")
    assert isinstance(spec, PythonSpec)
    assert (spec.python, spec.python_range) == (python, python_range)


def test_packages_whose_names_begin_with_python_are_left_out(tmp_path: Path) -> None:
    spec = read_conda_env(
        write(tmp_path, "dependencies: [python-dateutil, python_abi=3.10]\n", "conda.yaml"), "virtualenv"
    )
    assert isinstance(spec, PythonSpec)
    assert spec.python is None
    assert "python-dateutil, python_abi=3.10" in spec.warnings[0]
    assert "names no Python version" in spec.warnings[1]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("dependencies:\n  - python\n", 2, "must be pinned"),
        ("dependencies: [python<3.x]\n", 1, "is not a version"),
        ("dependencies: ['python 3.12 or so']\n", 1, "is not a version"),
        ("dependencies: [python=latest]\n", 1, "is not a version"),
        ("dependencies:\n- [a]\n", 2, "must be a text"),
        ("dependencies:\n- npm: [a]\n", 2, "'npm' is not a pip section"),
        ("dependencies:\n- pip: six\n", 2, "pip must be a list"),
        ("dependencies: python=3.10\n", 1, "must be a list"),
        ("", None, "empty"),
    ],
)
def test_malformed_conda_file_is_reported_with_line(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    problems = read_conda_env(write(tmp_path, text, "conda.yaml"), "uv")
    assert isinstance(problems, tuple)
    (problem,) = problems
    assert problem.line == line
    assert words in str(problem)


LOCK = """\
version = 1
revision = 3
requires-python = ">=3.10, <3.13"

[[package]]
name = "demo"
version = "0.1.0"
source = { virtual = "." }
dependencies = [
    { name = "helper" },
]

[[package]]
name = "helper"
version = "1.0"
source = { directory = "libs/helper" }

[[package]]
name = "wheel-file"
source = { path = "wheels/wheel_file-1.0-py3-none-any.whl" }

[[package]]
name = "six"
version = "1.17.0"
source = { registry = "https://pypi.org/simple" }
"""


def test_lock_python_range_and_local_packages_are_read(tmp_path: Path) -> None:
    assert read_lock(write(tmp_path, LOCK, "uv.lock"), load_project(tmp_path)) == (
        ">=3.10,<3.13",
        (
            LockedPackage("demo", tmp_path.resolve(), installed=False),
            LockedPackage("helper", (tmp_path / "libs/helper").resolve(), installed=True),
            LockedPackage(
                "wheel-file", (tmp_path / "wheels/wheel_file-1.0-py3-none-any.whl").resolve(), installed=True
            ),
        ),
    )


@pytest.mark.parametrize("text", ["", "hello", "version = 1\nnonsense\n", b"\xff\xfe"])
def test_invalid_lock_is_reported(tmp_path: Path, text: str | bytes) -> None:
    problem = read_lock(write(tmp_path, text, "uv.lock"), load_project(tmp_path))
    assert isinstance(problem, Problem)
