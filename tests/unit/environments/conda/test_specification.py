from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.environments.activation import conda_variables
from prefect_mlprojects.environments.conda import (
    CondaFile,
    check_conda_environment,
    read_conda_file,
    read_specification,
)
from prefect_mlprojects.environments.python.files import RequirementEntry
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import CondaEnvironment, Project
from prefect_mlprojects.types import StopSignal

FULL = """\
name: demo
channels: [conda-forge, nodefaults]
dependencies:
  - python=3.10
  - numpy=1.26.*
  - pip:
    - -r requirements.txt
variables:
  A: 1
  B: yes
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "requirements.txt").write_text("six\n")
    (tmp_path / "conda.yaml").write_text(FULL)
    return Project(tmp_path, None, "demo", {}, CondaEnvironment(tmp_path / "conda.yaml"))


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}


def test_complete_conda_file_is_read(project: Project) -> None:
    file = project.directory / "conda.yaml"
    assert read_conda_file(file) == CondaFile(
        file,
        "demo",
        ("conda-forge", "nodefaults"),
        (RequirementEntry("python=3.10", 4), RequirementEntry("numpy=1.26.*", 5)),
        (RequirementEntry("-r requirements.txt", 7),),
        {"A": "1", "B": "true"},
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("- a\n", "it must be a mapping"),
        ("channels: conda-forge\n", ":1: channels must be a list (put it behind a dash"),
        ("channels: [1]\n", ":1: an entry of channels must be a text"),
        ("dependencies:\n  - 3\n", ":2: a conda dependency must be a text"),
        ("dependencies:\n  - pip: [3]\n", ":2: an entry of pip must be a text"),
        ("dependencies:\n  - ' =3'\n", ":2: '=3' is not a conda dependency"),
        ("variables: [a]\n", ":1: variables must be a mapping"),
        ("variables:\n  A: [1]\n", ":2: the variable 'A' can't be set"),
        ("dependencies:\n  - pip: [-r no.txt]\n", ":2: it names the requirements file"),
    ],
)
def test_invalid_conda_file_is_reported_with_line(
    project: Project, environ: dict[str, str], text: str, words: str
) -> None:
    file = project.directory / "conda.yaml"
    file.write_text(text)
    with pytest.raises(EnvironmentBuildError) as caught:
        read_specification(project, environ)
    assert f"{file}" in caught.value.message
    assert words in caught.value.message
    assert [words in str(problem) for problem in check_conda_environment(project)] == [True]


def test_version_unknown_to_solver_is_a_problem(project: Project) -> None:
    (project.directory / "conda.yaml").write_text("dependencies:\n  - a\n  - b>=1..*0\n")
    (problem,) = check_conda_environment(project)
    assert problem.line == 3


def test_unknown_keys_are_warned_of(project: Project) -> None:
    file = project.directory / "conda.yaml"
    file.write_text("dependency: [a]\n")
    found = read_conda_file(file)
    assert isinstance(found, CondaFile)
    assert found.warnings == ("conda.yaml: the key 'dependency' is not conda's and is passed over",)


def test_pip_section_without_python_adds_python(project: Project, environ: dict[str, str]) -> None:
    (project.directory / "conda.yaml").write_text("dependencies:\n  - pip: [six]\n")
    assert [spec.text for spec in read_specification(project, environ).specs] == ["python"]


def test_cache_key_ignores_formatting_and_name(project: Project, environ: dict[str, str]) -> None:
    key = read_specification(project, environ).key
    text = FULL.replace("numpy=1.26.*", "numpy = 1.26.*").replace("name: demo", "name: other  # comment")
    (project.directory / "conda.yaml").write_text(text)
    assert read_specification(project, environ).key == key


@pytest.mark.parametrize(
    "change",
    [
        ("numpy=1.26.*", "numpy=1.25.*"),
        ("conda-forge, ", "bioconda, "),
        ("B: yes", "B: no"),
        ("requirements.txt", "other.txt"),
    ],
)
def test_other_content_makes_another_key(project: Project, environ: dict[str, str], change: tuple[str, str]) -> None:
    key = read_specification(project, environ).key
    (project.directory / "other.txt").write_text("seven\n")
    (project.directory / "conda.yaml").write_text(FULL.replace(*change))
    assert read_specification(project, environ).key != key


def test_files_and_settings_that_choose_packages_are_part_of_the_key(project: Project, environ: dict[str, str]) -> None:
    keys = {read_specification(project, environ).key}
    for name, value in {
        "CONDA_SUBDIR": "osx-64",
        "CONDA_OVERRIDE_CUDA": "12",
        "CONDA_CHANNEL_PRIORITY": "strict",
        "CONDA_CHANNEL_ALIAS": "https://mirror",
    }.items():
        keys.add(read_specification(project, {**environ, name: value}).key)
    (project.directory / "requirements.txt").write_text("seven\n")
    keys.add(read_specification(project, environ).key)
    assert len(keys) == 6
    assert read_specification(project, {**environ, "CONDA_REMOTE_MAX_RETRIES": "9"}).key in keys


def test_other_credentials_for_a_channel_have_another_key(
    project: Project, environ: dict[str, str], tmp_path: Path
) -> None:
    def key(alias: str) -> str:
        return read_specification(project, {**environ, "CONDA_CHANNEL_ALIAS": alias}).key

    urls = ("https://host", "https://a:b@host", "https://a:c@host", "https://host/t/tk-1", "https://host/t/tk-2")
    assert len(set(map(key, urls))) == 5
    assert key("https://a:b@host") == key("https://a:b@host")
    (tmp_path / "logins.json").write_text("{}")
    environ["RATTLER_AUTH_FILE"] = str(tmp_path / "logins.json")
    one = key("https://host")
    (tmp_path / "logins.json").write_text('{"host": {}}')
    assert key("https://host") != one


def test_channel_of_dependency_is_searched_too(project: Project, environ: dict[str, str]) -> None:
    text = "channels: [one]\ndependencies: [two::a=1, file:///three::b]\n"
    (project.directory / "conda.yaml").write_text(text)
    specification = read_specification(project, {**environ, "CONDA_CHANNEL_ALIAS": "https://x"})
    assert specification.channels == ("https://x/one", "https://x/two", "file:///three")
    assert [spec.match for spec in specification.specs] == ["https://x/two::a=1", "file:///three::b"]


def test_planning_does_not_load_the_solver(project: Project, environ: dict[str, str]) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path\n"
        "from prefect_mlprojects.environments.conda import read_specification\n"
        "from prefect_mlprojects.spec.project import CondaEnvironment, Project\n"
        "folder = Path(sys.argv[1])\n"
        "read_specification(Project(folder, None, 'x', {}, CondaEnvironment(folder / 'conda.yaml')), {})\n"
        "assert 'rattler' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(project.directory)], check=True)


def test_without_scripts_no_shell_is_started(tmp_path: Path, environ: dict[str, str]) -> None:
    lines: list[Any] = []
    variables = conda_variables({**environ, "PATH": ""}, tmp_path, None, lines.append, StopSignal())
    assert variables["PATH"].startswith(f"{tmp_path}/bin:")
    assert variables["CONDA_PREFIX"] == str(tmp_path)
    assert lines == []
