"""MLproject files: what is read from good ones, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects.exceptions import ProjectSpecError
from prefect_mlprojects.spec import (
    CondaEnvironment,
    DockerEnvironment,
    NoEnvironment,
    Project,
    PythonEnvironment,
    build_command,
    lint,
    load_project,
)
from prefect_mlprojects.spec.entry_points import check_call
from prefect_mlprojects.spec.project import expand_volume


def write(folder: Path, text: str, name: str = "MLproject") -> Path:
    (folder / name).write_text(text)
    return folder


def problems(folder: Path) -> list[tuple[int | None, str]]:
    with pytest.raises(ProjectSpecError) as caught:
        load_project(folder)
    assert all(problem.file == folder / "MLproject" for problem in caught.value.problems)
    return [(problem.line, problem.message) for problem in caught.value.problems]


GOOD = """\
name: demo
entry_points:
  main:
    parameters:
      alpha: float
      ratio: {type: float, default: 0.10}
      flag: {type: string, default: true}
      day: {default: 2024-01-02}
      need: {type: int, default: null}
      odd: {type: flaot}
    command: "python x.py {alpha}"
  other:
    command: echo {{literal}}
"""


@pytest.mark.parametrize("name", ["MLproject", "mlproject", "MLPROJECT"])
def test_valid_file_is_parsed(name: str, tmp_path: Path) -> None:
    project = load_project(write(tmp_path, GOOD, name))
    assert (project.name, list(project.entry_points)) == ("demo", ["main", "other"])
    parameters = project.entry_points["main"].parameters
    assert {each.name: (each.type, each.default, each.line) for each in parameters.values()} == {
        "alpha": ("float", None, 5),
        "ratio": ("float", "0.1", 6),
        "flag": ("string", "True", 7),
        "day": ("string", "2024-01-02", 8),
        "need": ("int", None, 9),
        "odd": ("string", None, 10),
    }
    (warning,) = project.warnings
    assert (warning.line, warning.fix) == (10, "did you mean 'float'?")


def test_folder_without_project_file_is_loaded(tmp_path: Path) -> None:
    assert load_project(tmp_path) == Project(tmp_path, None, None, {}, NoEnvironment())


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name: x\n\tfoo: 1\n", 2, "not valid YAML"),
        ("", None, "empty"),
        ("# nothing\n", None, "empty"),
        ("- a\n", 1, "not a list"),
        ("just text\n", 1, "not text"),
        ("name: [a]\n", 1, "'name' must be text"),
        ("entry_points: [a]\n", 1, "'entry_points' must be a mapping"),
        ("entry_points:\n  main: python x.py\n", 2, "must be a mapping with a 'command'"),
        ("entry_points:\n  main: {}\n", 2, "needs a 'command'"),
        ("entry_points:\n  main:\n    command: [a]\n", 3, "needs a 'command' that is text"),
        ("entry_points:\n  main:\n    command: a\n    parameters: [a]\n", 4, "'parameters' of entry point"),
        ("entry_points:\n  main:\n    command: a\n    parameters:\n      a: 3\n", 5, "parameter 'a' must have a type"),
        ("python_env: a.yaml\n", 1, "'python_env' names the file 'a.yaml', which does not exist"),
        ("conda_env: 3\n", 1, "'conda_env' must name a file"),
        ("docker_env: x\n", 1, "'docker_env' must be a mapping"),
        ("docker_env: {volumes: []}\n", 1, "needs an 'image'"),
        ("docker_env:\n  image: a\n  volumes: [{a: b}]\n", 3, "'volumes' of 'docker_env'"),
        ("docker_env:\n  image: a\n  volumes: ['$DATA/x:/x']\n", 3, "$DATA is not expanded"),
        ("docker_env:\n  image: a\n  volumes: ['$(id):/x']\n", 3, "it needs a shell"),
        ("docker_env:\n  image: a\n  volumes: ['/x:/$HOME']\n", 3, "it needs a shell"),
        ("docker_env:\n  image: a\n  environment:\n    - [a, b, c]\n", 4, "name or a pair"),
        ("databricks_spark_job: {}\n", 1, "needs a 'python_file'"),
        ("name: \x00\n", 1, "not valid YAML"),
        ("name: &a [*a]\n", 1, "an alias contains itself"),
        ("x: " + "[" * 3000 + "]" * 3000, 1, "nested too deeply"),
    ],
)
def test_invalid_file_reports_problem_with_line(text: str, line: int | None, message: str, tmp_path: Path) -> None:
    found = problems(write(tmp_path, text))
    assert len(found) == 1
    assert found[0][0] == line
    assert message in found[0][1]


def test_problems_are_reported_together_in_file_order(tmp_path: Path) -> None:
    text = "python_env: a.yaml\nconda_env: b.yaml\nentry_points:\n  main: {}\n  two: 3\n"
    assert [line for line, _ in problems(write(tmp_path, text))] == [1, 2, 2, 4, 5]


def test_non_utf8_file_and_missing_folder_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_bytes("name: a\nentry_points: {caf\xe9: {command: x}}\n".encode("latin-1"))
    with pytest.raises(ProjectSpecError, match=r"MLproject:2: the file is not UTF-8 text \(save it as UTF-8\)"):
        load_project(tmp_path)
    with pytest.raises(ProjectSpecError, match="does not exist"):
        load_project(tmp_path / "missing")
    with pytest.raises(ProjectSpecError, match="is not a folder"):
        load_project(tmp_path / "MLproject")


def test_environment_of_each_kind_is_parsed(tmp_path: Path) -> None:
    (tmp_path / "conda.yaml").write_text("")
    assert load_project(tmp_path).environment == CondaEnvironment(tmp_path / "conda.yaml")
    (tmp_path / "python_env.yaml").write_text("")
    assert load_project(tmp_path).environment == PythonEnvironment(tmp_path / "python_env.yaml")
    (tmp_path / "e.yml").write_text("")
    assert load_project(write(tmp_path, "conda_env: e.yml\n")).environment == CondaEnvironment(tmp_path / "e.yml")
    docker = 'docker_env:\n  image: a:1\n  volumes: ["/a:/b"]\n  environment: [["A", 1], "B"]\n'
    assert load_project(write(tmp_path, docker)).environment == DockerEnvironment(
        "a:1", ("/a:/b",), (("A", "1"), ("B", None))
    )


def test_lint_gives_errors_and_warnings_with_their_places(tmp_path: Path) -> None:
    text = "nmae: x\nentry_points:\n  main:\n    parameters: {name: int}\n    command: 'echo {nme} {0}'\n"
    found = lint(write(tmp_path, text), "main", {"name": "x"})
    places = [(each.severity, each.problem.line) for each in found]
    assert places == [("warning", 1), ("error", 5), ("error", 5), ("error", None)]
    assert str(found[0]) == f"{tmp_path}/MLproject:1: warning: unknown key 'nmae'; it is ignored (did you mean 'name'?)"
    clean = write(tmp_path, "entry_points:\n  main:\n    parameters: {name: int}\n    command: 'echo {name}'\n")
    assert [each.problem.parameter for each in lint(clean, "main", {"name": "x"})] == ["name"]
    assert lint(clean, "main", {"name": 3}) == []


def test_docker_env_unknown_key_warns(tmp_path: Path) -> None:
    project = load_project(write(tmp_path, "docker_env: {image: a, imgae: b}\n"))
    (warning,) = project.warnings
    assert (warning.line, warning.fix) == (1, "did you mean 'image'?")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name: x\nname: y\n", 2, "the key 'name' is given twice, first in line 1"),
        (
            "entry_points:\n  main: {command: a}\n  main: {command: b}\n",
            3,
            "the key 'main' is given twice, first in line 2",
        ),
    ],
)
def test_duplicate_key_warns_on_load_and_fails_lint(text: str, line: int, message: str, tmp_path: Path) -> None:
    project = load_project(write(tmp_path, text))
    (warning,) = project.warnings
    assert (warning.line, warning.message) == (line, message)
    assert project.name == ("y" if "name" in text else None)
    (finding,) = lint(tmp_path)
    assert (finding.severity, finding.problem) == ("error", warning)


def test_dependencies_that_nothing_installs_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("six\n")
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = ['six']\n")
    project = load_project(write(tmp_path, "name: x\n"))
    assert [(each.file, "python_env: " in str(each.fix)) for each in project.warnings] == [
        (tmp_path / "requirements.txt", True),
        (tmp_path / "pyproject.toml", True),
    ]
    (tmp_path / "uv.lock").touch()
    assert [each.file for each in load_project(tmp_path).warnings] == [tmp_path / "requirements.txt"]
    (tmp_path / "uv.lock").unlink()
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\nline-length = 100\n")
    assert [each.file for each in load_project(tmp_path).warnings] == [tmp_path / "requirements.txt"]
    (tmp_path / "python_env.yaml").touch()
    assert load_project(tmp_path).warnings == ()
    (tmp_path / "python_env.yaml").unlink()
    assert load_project(write(tmp_path, "docker_env: {image: a}\n")).warnings == ()


@pytest.mark.parametrize("name", ["MLproject.yaml", "MLproject.yml", "mlproject.txt"])
def test_misnamed_project_file_warns(name: str, tmp_path: Path) -> None:
    (warning,) = load_project(write(tmp_path, "name: x\n", name)).warnings
    assert str(warning) == f"{tmp_path / name}: it is not read: a project file is named MLproject (rename it)"
    assert [str(each) for each in lint(tmp_path)] == [
        f"{tmp_path / name}: warning: it is not read: a project file is named MLproject (rename it)"
    ]


@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        ("$(pwd)/data:/data:ro", "/project/data:/data:ro"),
        ("${PWD}:/code", "/project:/code"),
        ("$PWD/a b:/b", "/project/a b:/b"),
        ("`pwd`/out:/out", "/project/out:/out"),
        ("./data:/data", "/project/data:/data"),
        ("../shared:/s", "/shared:/s"),
        ("data/raw:/raw", "/project/data/raw:/raw"),
        ("$HOME/.aws:/aws", "/home/me/.aws:/aws"),
        ("~/x:/x", "/home/me/x:/x"),
        ("named:/data", "named:/data"),
        ("/abs:/abs", "/abs:/abs"),
    ],
)
def test_volumes_are_expanded_without_a_shell(volume: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_volume(volume, Path("/project")) == expected


def test_types_of_other_formats_are_understood_and_unknown_ones_warn_once(tmp_path: Path) -> None:
    names = {"a": "str", "b": "number", "c": "boolean", "d": "blob", "e": "blob", "f": "float"}
    types = "".join(f"      {name}: {{type: {kind}}}\n" for name, kind in names.items())
    (tmp_path / "MLproject").write_text(
        f"entry_points:\n  main:\n    parameters:\n{types}      g: {{type:int}}\n    command: x\n"
    )
    project = load_project(tmp_path)
    parameters = project.entry_points["main"].parameters
    assert [each.type for each in parameters.values()] == [
        "string",
        "float",
        "bool",
        "string",
        "string",
        "float",
        "string",
    ]
    unknown, blank = project.warnings
    assert "parameter 'd' has the unknown type 'blob'" in unknown.message
    assert blank.fix == "write 'type: int', with a blank after the colon"


def test_secret_of_a_parameter_is_true_unless_it_says_false(tmp_path: Path) -> None:
    declared = "{a: {type: string, secret: true}, b: {secret: false}, c: {secret: 'no'}, d: string}"
    (tmp_path / "MLproject").write_text(f"entry_points:\n  main:\n    parameters: {declared}\n    command: echo\n")

    project = load_project(tmp_path)

    parameters = project.entry_points["main"].parameters
    assert {name: each.secret for name, each in parameters.items()} == {"a": True, "b": False, "c": True, "d": False}
    assert [each.message for each in project.warnings] == ["'secret' of parameter 'c' is 'no'; it is taken as true"]


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (None, {"main": "python main.py"}),
        ("name: x\n", {"main": "python main.py"}),
        ("entry_points:\n  other: {command: x}\n", {"other": "x", "main": "python main.py"}),
        ("entry_points:\n  main: {command: x}\n", {"main": "x"}),
        ("databricks_spark_job: {python_file: main.py}\n", {}),
    ],
)
def test_main_py_is_the_default_entry_point(tmp_path: Path, text: str | None, points: dict[str, str]) -> None:
    (tmp_path / "main.py").write_text("print(1)\n")
    if text is not None:
        write(tmp_path, text)
    project = load_project(tmp_path)
    assert {name: each.command for name, each in project.entry_points.items()} == points
    if "main" in points and points["main"] != "x":
        _, entry_point, checked = check_call(tmp_path, "main", {"alpha": "0.1", "a b": "c d"})
        assert build_command(entry_point, checked) == "python main.py --alpha 0.1 --'a b' 'c d'"


def test_main_py_outside_of_a_fetched_project_is_none(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print(1)\n")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "main.py").symlink_to(tmp_path / "main.py")
    assert load_project(folder, root=folder).entry_points == {}
