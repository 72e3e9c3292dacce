"""Environments that ``python_env`` takes from a requirements file or a pyproject.toml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.environments.managers import check_environment, choose_manager
from prefect_mlprojects.environments.python import Contents, read_contents
from prefect_mlprojects.spec import load_project
from prefect_mlprojects.spec.project import NoEnvironment, Project

BUILD = "[build-system]\nrequires = ['hatchling']\nbuild-backend = 'hatchling.build'\n"


@pytest.fixture
def declare(tmp_path: Path) -> Callable[..., Project]:
    """Writes an MLproject whose `python_env` is the first of the files, and parses it."""

    def write(files: dict[str, str | bytes], named: str | None = None) -> Project:
        folder = tmp_path / "project"
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        (folder / "MLproject").write_text(f"python_env: {named or next(iter(files))}\n")
        return load_project(folder)

    return write


def read(project: Project, manager: Any = "uv") -> Contents:
    contents = read_contents(project, manager)
    assert isinstance(contents, Contents), contents
    return contents


def messages(project: Project) -> str:
    found = check_environment(project)
    assert found
    return "\n".join(f"{each.file}:{each.line}: {each.message} ({each.fix})" for each in found)


@pytest.mark.parametrize("manager", ["uv", "virtualenv"])
def test_requirements_file_is_the_same_as_one_that_a_python_env_includes(
    declare: Callable[..., Project], manager: Any
) -> None:
    files: dict[str, str | bytes] = {
        "needs/my list.txt": "six==1.16\n-c limits.txt\n-r more.txt\n",
        "needs/limits.txt": "attrs<25\n",
        "needs/more.txt": "attrs; python_version > '3'\n",
    }
    direct = read(declare(files), manager)
    included = declare({"python_env.yaml": "dependencies: ['-r \"needs/my list.txt\"']\n", **files})
    assert direct.run.lines == read(included, manager).run.lines
    assert direct.run.key_inputs == read(included, manager).run.key_inputs
    assert (direct.source and direct.source.name, direct.python) == ("my list.txt", None)


def test_listed_dependencies_of_a_pyproject(declare: Callable[..., Project]) -> None:
    text = "[project]\nname = 'x'\ndependencies = [\n  \"six==1.16\",\n  'attrs>=20',\n]\n"
    text += "[project.optional-dependencies]\na = ['b']\n"
    project = declare({"pyproject.toml": text})
    contents = read(project)
    assert contents.run.lines == ["six==1.16", "attrs>=20"]
    assert choose_manager(project) == "uv"


@pytest.mark.parametrize("text", ["", "[tool.uv]\npackage = true\n", "[tool.poetry]\nname = 'x'\nversion = '1'\n"])
def test_what_can_be_built_is_installed(declare: Callable[..., Project], text: str) -> None:
    contents = read(
        declare({"sub/pyproject.toml": f"[project]\nname = 'x'\ndynamic = ['dependencies']\n{BUILD}{text}"})
    )
    assert contents.run.lines == ["-e ./sub"]
    assert [each.directory.name for each in contents.run.local_packages] == ["sub"]


def test_what_is_no_package_is_not_installed(declare: Callable[..., Project]) -> None:
    text = f"[project]\nname = 'x'\ndependencies = ['six']\n{BUILD}[tool.uv]\npackage = false\n"
    assert read(declare({"pyproject.toml": text})).run.lines == ["six"]


def test_poetry_versions_are_translated(declare: Callable[..., Project]) -> None:
    text = """
[tool.poetry]
package-mode = false
[tool.poetry.dependencies]
python = "^3.8"
six = "^1.16"
attrs = "~23.1"
numpy = {version = "1.*", python = "<3.9"}
pandas = {version = ">=2", optional = true}
requests = {version = "2.31.0", extras = ["socks"]}
lib = {path = "lib"}
tool = {git = "https://git.example/tool.git", tag = "v1"}
[tool.poetry.group.dev.dependencies]
pytest = "*"
"""
    lib = "[project]\nname = 'lib'\nversion = '1'\n" + BUILD
    contents = read(declare({"pyproject.toml": text, "lib/pyproject.toml": lib, "poetry.lock": ""}))
    lines = contents.run.lines
    assert lines[:4] == [
        "six (>=1.16,<2.0)",
        "attrs (>=23.1,<23.2)",
        'numpy (==1.*) ; python_version < "3.9"',
        "requests[socks] (==2.31.0)",
    ]
    assert lines[4].startswith("lib @ file://")
    assert lines[5:] == ["tool @ git+https://git.example/tool.git@v1"]
    assert [each.directory.name for each in contents.run.local_packages] == ["lib"]
    assert "poetry.lock is not read" in contents.warnings[0]
    assert contents.python is None  # the running Python is in the range


@pytest.mark.parametrize(
    "text",
    [
        "[project]\nname = 'x'\nrequires-python = '>=3.99'\n",
        "[tool.poetry]\npackage-mode = false\n[tool.poetry.dependencies]\npython = '>=3.99'\n",
    ],
)
def test_python_is_looked_for_only_if_the_running_one_does_not_fit(declare: Callable[..., Project], text: str) -> None:
    contents = read(declare({"pyproject.toml": text}))
    assert contents.python == ">=3.99"
    assert contents.python_source.endswith(f"pyproject.toml:{text.count(chr(10))}")
    assert read(declare({"pyproject.toml": text.replace("3.99", "3.8")})).python is None


def test_lock_of_a_named_pyproject_is_used(declare: Callable[..., Project]) -> None:
    lock = "version = 1\nrequires-python = '>=3.8'\n[[package]]\nname = 'x'\nversion = '1'\nsource = {virtual = '.'}\n"
    project = declare({"pyproject.toml": "[project]\nname = 'x'\ndependencies = ['six']\n", "uv.lock": lock})
    assert read(project).locked is not None
    assert read(project, "virtualenv").run.lines == ["six"]
    assert read(replace(project, environment=NoEnvironment())).locked is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.black]\nline-length = 100\n", "pyproject.toml:None: it lists no dependencies"),
        ("", "it lists no dependencies"),
        ("[project\n", "it is not valid TOML"),
        ("project = 3\n", "pyproject.toml:1: 'project' must be a table"),
        ("[tool]\npoetry = []\n", "pyproject.toml:2: 'tool.poetry' must be a table"),
        ("[project]\nname = 'x'\ndependencies = 'six'\n", "pyproject.toml:3: 'dependencies' must be a list of texts"),
        ("[project]\nname = 'x'\ndependencies = ['six', {a = 1}]\n", "must be a list of texts"),
        ("[project]\nname = 'x'\ndependencies = [\n 'six',\n 'a = b',\n]\n", "pyproject.toml:5: 'a = b' is not"),
        ("[project]\nname = 'x'\ndynamic = ['dependencies']\n", "pyproject.toml:3: its dependencies are dynamic"),
        ("[project]\nname = 'x'\nrequires-python = 3.11\n", "pyproject.toml:3: requires-python: 3.11 is not a range"),
        ("[project]\nname = 'x'\n[tool.uv.sources]\nsix = {path = 'six'}\n", "is used with a uv.lock only"),
        ("[tool.poetry]\npackage-mode = false\ndependencies = {six = 'no version'}\n", "Poetry can't read it"),
        (
            "[tool.poetry]\npackage-mode = false\ndependencies = {six = {version = '*', source = 'own'}}\n"
            "[[tool.poetry.source]]\nname = 'own'\nurl = 'https://pkg.example/simple'\n",
            "comes from the source 'own'",
        ),
        ("[project]\nname = 'x'\ndependencies = ['a @ file:///etc']\n", None),
        (b"[project]\nname = '\xff'\n", "it is not UTF-8 text"),
    ],
)
def test_mistakes_name_file_and_line(declare: Callable[..., Project], text: Any, said: str | None) -> None:
    project = declare({"pyproject.toml": text})
    if said is not None:
        assert said in messages(project)
    else:
        fetched = replace(project, root=project.directory)
        assert "outside of the project" in messages(fetched)


def test_requirements_of_a_fetched_project_stay_in_it(declare: Callable[..., Project]) -> None:
    project = declare({"requirements.txt": "-r ../../secret\nsix\n"})
    assert "outside of the project" in messages(replace(project, root=project.directory))


def test_missing_or_large_file(declare: Callable[..., Project], tmp_path: Path) -> None:
    project = declare({"requirements.txt": b"#" * (5 << 20)})
    assert "it names the requirements file" in messages(project)
    project = declare({"pyproject.toml": b"#" * (5 << 20)})
    assert "can't be read" in messages(project)
