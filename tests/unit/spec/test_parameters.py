"""Entry points, parameters and command lines."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_mlprojects.exceptions import ParameterError, ProjectSpecError
from prefect_mlprojects.spec import (
    EntryPoint,
    ProjectParameter,
    build_command,
    check_call,
    check_parameters,
    find_entry_point,
    lint,
    load_project,
)
from prefect_mlprojects.spec.schema import parameters_schema


def entry_point(command: str = "echo", **types: str) -> EntryPoint:
    return EntryPoint("main", command, {name: ProjectParameter(name, kind, kind) for name, kind in types.items()})  # type: ignore[arg-type]  # the tests' tables are plain text


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", 3),
        ("int", "3"),
        ("int", "-12"),
        ("int", "+7"),
        ("int", "1" * 50),
        ("float", 3),
        ("float", "1e-3"),
        ("float", ".5"),
        ("float", "5."),
        ("float", "inf"),
        ("float", "-NaN"),
        ("float", 0.1),
        ("string", ""),
        ("string", True),
        ("string", "it's {x} $(y)"),
        ("uri", "s3://bucket/key"),
        ("uri", "file:/x"),
        ("path", "/"),
    ],
)
def test_good_values_are_passed_on_as_they_are(kind: str, value: Any) -> None:
    assert check_parameters(entry_point(p=kind), {"p": value}).declared == {"p": str(value)}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *[("int", value) for value in ["3.7", 3.0, True, "", " 3", "1_000", "٣", "0x10", [1]]],
        *[("float", value) for value in ["x", "", "1,5", False, "1e", "1_0.0", {}]],
        *[("uri", value) for value in ["bucket/key", "", "//host/x", "http//x"]],
        *[("path", value) for value in ["no/such/file", "", "file:///no/such/file"]],
        ("string", "a\0b"),
    ],
)
def test_bad_values_are_refused(kind: str, value: Any) -> None:
    with pytest.raises(ParameterError, match="'p'") as caught:
        check_parameters(entry_point(p=kind), {"p": value})
    assert caught.value.problems[0].parameter == "p"


def test_invalid_values_are_reported_together() -> None:
    with pytest.raises(ParameterError) as caught:
        check_parameters(entry_point(a="int", b="float", c="uri"), {"a": "x", "c": "y", "bb": "1", "": "z"})
    assert [problem.parameter for problem in caught.value.problems] == ["a", "b", "c", ""]
    assert "did you mean it when you wrote 'bb'" in str(caught.value.problems[1])


def test_path_values_become_absolute_or_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    declared = entry_point(a="path", b="path", c="path")
    checked = check_parameters(declared, {"a": "data", "b": f"file://{tmp_path}/data", "c": "s3://bucket/x"})
    assert checked.declared == {"a": f"{tmp_path}/data", "b": f"{tmp_path}/data", "c": "s3://bucket/x"}
    assert checked.downloads == {"c": "s3://bucket/x"}
    assert checked.with_downloads({"c": "/tmp/x"}).declared["c"] == "/tmp/x"


def test_null_counts_as_not_given_and_a_likely_typo_is_warned_of() -> None:
    declared = EntryPoint("main", "x", {"alpha": ProjectParameter("alpha", "float", "float", "0.5")})
    checked = check_parameters(declared, {"alpha": None, "alhpa": "1", "more": None})
    assert (checked.declared, checked.extra) == ({"alpha": "0.5"}, {"alhpa": "1"})
    assert "did you mean 'alpha'?" in str(checked.warnings[0])


def test_entry_points_and_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/zsh")
    (tmp_path / "MLproject").write_text("entry_points:\n  main:\n    command: echo\n")
    for name in ("train.py", "a{b}.sh", "x.R"):
        (tmp_path / name).write_text("")
    project = load_project(tmp_path)
    nothing = check_parameters(entry_point(), {})
    commands = {
        name: build_command(find_entry_point(project, name), nothing) for name in ("main", "train.py", "a{b}.sh", "x.R")
    }
    assert commands == {
        "main": "echo",
        "train.py": "python train.py",
        "a{b}.sh": "/bin/zsh 'a{b}.sh'",
        "x.R": "Rscript -e \"mlflow::mlflow_source('x.R')\" --args",
    }
    for name, words in (
        ("mian", "did you mean 'main'"),
        ("tarin.py", "did you mean 'train.py'"),
        ("../x.py", "outside"),
        ("/etc/x.sh", "outside"),
    ):
        with pytest.raises(ProjectSpecError, match=words):
            find_entry_point(project, name)


@pytest.mark.parametrize(
    "command", ["echo {b}", "echo {a.b}", "echo {a[0]}", "echo {}", "echo {0}", "awk '{print $1}'", "{"]
)
def test_placeholders_that_can_not_be_filled_in(command: str, tmp_path: Path) -> None:
    text = json.dumps(
        {"entry_points": {"main": {"command": command, "parameters": {"a": "string"}}, "b": {"command": "x"}}}
    )
    (tmp_path / "MLproject").write_text(text)
    project = load_project(tmp_path)
    with pytest.raises(ProjectSpecError, match=r"placeholder|brace"):
        find_entry_point(project, "main")
    assert find_entry_point(project, "b").command == "x"


def test_misspelled_entry_points_key_is_reported(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text("name: x\nentry_point:\n  main: {command: echo}\n")
    (tmp_path / "requirements.txt").touch()
    with pytest.raises(ProjectSpecError) as caught:
        find_entry_point(load_project(tmp_path), "main")
    declared, key = caught.value.problems
    assert declared.message == "it declares none and has no scripts (.py, .sh, .R)"
    assert (key.line, key.fix) == (2, "did you mean 'entry_points'?")


def no_project_file(folder: Path, name: str = "main", uri: str | None = None) -> str:
    with pytest.raises(ProjectSpecError) as caught:
        find_entry_point(load_project(folder), name, uri)
    return str(caught.value)


def test_folder_without_project_file_error_suggests_fix(tmp_path: Path) -> None:
    assert no_project_file(tmp_path) == (
        f"No MLproject file found in {tmp_path}: the folder has no scripts (.py, .sh, .R) either "
        "(create a file named MLproject, or give the URI of the folder that has one)"
    )
    (tmp_path / "train.py").touch()
    assert no_project_file(tmp_path) == (
        f"No MLproject file found in {tmp_path}: the folder has the script train.py "
        f"(to run one, name it: `mlprojects run {tmp_path} -e train.py`)"
    )
    assert "and no script 'tarin.py': the folder has the script train.py" in no_project_file(tmp_path, "tarin.py")
    (tmp_path / "MLproject.yml").touch()
    assert no_project_file(tmp_path) == (
        f"No MLproject file found in {tmp_path}: {tmp_path}/MLproject.yml: it is not read: "
        "a project file is named MLproject (rename it)"
    )


def test_missing_project_file_error_names_subfolder_project(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "MLproject").touch()
    (tmp_path / "setup.py").touch()
    assert no_project_file(tmp_path) == f"No MLproject file found in {tmp_path}: one is in src (use {tmp_path}#src)"
    uri = "https://example.com/o/r"
    assert no_project_file(tmp_path, uri=uri) == f"No MLproject file found in {uri}: one is in src (use {uri}#src)"
    assert f"(use {uri}#a/src)" in no_project_file(tmp_path, uri=f"{uri}#a")
    assert [str(each) for each in lint(tmp_path)] == [
        f"call: warning: no MLproject file found in {tmp_path}: one is in src (use {tmp_path}#src)"
    ]
    (tmp_path / "more" / "b").mkdir(parents=True)
    (tmp_path / "more" / "b" / "MLproject").touch()
    assert "the sub-folders more/b, src have one" in no_project_file(tmp_path)


def test_file_command_and_value_problems_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(
        "python_env: missing.yaml\nentry_points:\n  main:\n    parameters: {epochs: int}\n    command: 'echo {epochs} }'\n"
    )
    with pytest.raises(ProjectSpecError) as caught:
        check_call(tmp_path, "main", {"epochs": 3.7})
    file, brace, value = caught.value.problems
    assert (file.line, brace.line, value.parameter) == (1, 5, "epochs")
    assert "missing.yaml" in file.message
    assert "stray brace" in brace.message
    assert "whole number" in value.message
    assert [each.problem for each in lint(tmp_path, "main", {"epochs": 3.7})] == [file, brace, value]
    # An unreadable file has no entry points to complain about.
    (tmp_path / "MLproject").write_text("a: [\n")
    with pytest.raises(ProjectSpecError) as caught:
        check_call(tmp_path, "main", {})
    assert len(caught.value.problems) == 1


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=25, deadline=None)
@given(texts, texts, texts.filter(bool), texts)
def test_value_is_never_parsed_as_shell_syntax(first: str, second: str, name: str, extra: str) -> None:
    program = shlex.join([sys.executable, "-I", "-S", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"])
    template = program.replace("{", "{{").replace("}", "}}") + " {first} {second}"
    declared = entry_point(template, first="string", second="string")
    values = {"first": first, "second": second} | ({} if name in {"first", "second"} else {name: extra})
    command = build_command(declared, check_parameters(declared, values))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    expected = [first, second] + ([] if name in {"first", "second"} else [f"--{name}", extra])
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize(
    ("kind", "default"), [("int", "None"), ("int", "auto"), ("int", "1.5"), ("float", "None"), ("float", "")]
)
def test_non_numeric_default_is_accepted_with_warning(kind: str, default: str, tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(
        f"entry_points:\n  main:\n    parameters: {{x: {{type: {kind}, default: {json.dumps(default)}}}}}\n    command: 'p {{x}}'\n"
    )
    project = load_project(tmp_path)
    (warning,) = project.warnings
    assert warning.message.startswith(f"the default {default!r} of parameter 'x' ({kind}) is not a")
    main = find_entry_point(project, "main")
    assert build_command(main, check_parameters(main, {})) == f"p {shlex.quote(default)}"
    # A form gives the default as a value; another text is a caller's mistake.
    assert check_parameters(main, {"x": default}).declared == {"x": default}
    with pytest.raises(ParameterError, match="number was expected"):
        check_parameters(main, {"x": "nothing"})
    assert parameters_schema(main, {})["properties"]["x"]["default"] == default


def test_relative_path_default_resolves_against_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "data", elsewhere):
        folder.mkdir(parents=True)
    (project / "data" / "train.csv").write_text("1")
    (elsewhere / "other.csv").write_text("2")
    (tmp_path / "outside.csv").write_text("3")
    monkeypatch.chdir(elsewhere)

    def value(default: str, given: dict[str, str]) -> str:
        parameter = ProjectParameter("x", "path", "path", default)
        return check_parameters(EntryPoint("main", "p {x}", {"x": parameter}), given, project).declared["x"]

    inside = str(project / "data" / "train.csv")
    assert value("data/train.csv", {}) == value("./data/../data/train.csv", {}) == inside
    assert value("data/train.csv", {"x": "data/train.csv"}) == inside
    # What the caller names, and a default that the project does not have, are relative to the working directory.
    assert value("data/train.csv", {"x": "other.csv"}) == value("other.csv", {}) == str(elsewhere / "other.csv")
    with pytest.raises(ParameterError, match="a file or folder that exists"):
        value("missing.csv", {})
    (project / "link").symlink_to(tmp_path / "outside.csv")
    with pytest.raises(ParameterError, match="a file or folder that exists"):
        value("link", {})
