"""The same files and calls through real MLflow and through us: the same commands and refusals, or a listed difference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.spec import build_command, check_parameters, find_entry_point, load_project

REFUSED = "refused"
COMPATIBILITY = Path(__file__).parents[2] / "docs" / "compatibility.md"

PLAIN = """
entry_points:
  main:
    parameters:
      name: string
      count: {type: int, default: 3}
      rate: {type: float, default: 0.10}
      flag: {default: yes}
    command: "run {name} {count} {rate} {flag}"
"""
PATHS = "entry_points: {main: {command: 'cat {data} {link}', parameters: {data: path, link: uri}}}"
BRACES = "entry_points: {main: {command: \"awk '{{print}}' {a}\", parameters: {a: string}}}"
TYPES = "entry_points: {main: {command: 'x {a} {b}', parameters: {a: unknown, b: {type: string, default: null}}}}"
# The form of our additions that is the same file for both: MLflow ignores declared parameters that the command does not name.
ADDED = """
entry_points:
  main:
    parameters:
      verbose: {type: bool, default: false, option: --verbose, description: Print more.}
      rate: {type: float, default: "", optional: true, min: 0}
      tags: {type: list, default: "", optional: true, option: --tag}
      size: {type: choice, choices: [small, large], default: small}
      deep: {type: bool, default: yes}
    command: "run {size} {deep}"
"""
LISTS = """
entry_points:
  main:
    parameters: {plain: list, files: {type: list, default: [a, b]}, axes: {type: list, default: "[0, 1]"}}
    command: "run {plain} {files} {axes}"
"""
BOOLEANS = "entry_points: {main: {command: 'x {a} {b}', parameters: {a: {type: bool, default: 0}, b: {type: bool, default: 'no'}}}}"

# (id of the listed difference or "", file, entry point, values)
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("", PLAIN, "main", {"name": "x"}),
    ("", PLAIN, "main", {"name": 'it\'s $(x) `y`; "z" \\ {q} \n'}),
    ("", PLAIN, "main", {"name": "", "count": "7", "rate": "1e-3", "extra": "a b", "o'dd key": 1}),
    ("", PLAIN, "main", {"name": 3, "count": 4, "rate": 5}),
    ("", PLAIN, "main", {}),
    ("", PLAIN, "nothing", {}),
    ("", "", "train.py", {"alpha": 1}),
    ("", "", "run.sh", {}),
    ("", "name: only\n", "train.py", {}),
    ("", PATHS, "main", {"data": "data.txt", "link": "s3://a/b"}),
    ("", PATHS, "main", {"data": "missing.txt", "link": "s3://a/b"}),
    ("", PATHS, "main", {"data": "data.txt", "link": "no-scheme"}),
    ("", BRACES, "main", {"a": "{b}"}),
    ("", TYPES, "main", {"a": "v", "b": "w"}),
    ("", TYPES, "main", {"a": "v"}),
    ("", "python_env: a\nconda_env: b\n", "train.py", {}),
    ("", "python_env: missing.yaml\n", "train.py", {}),
    ("", "docker_env: {image: ''}\n", "train.py", {}),
    ("", "docker_env: {image: a, volumes: a}\n", "train.py", {}),
    ("", "databricks_spark_job: {}\n", "train.py", {}),
    ("", "- a\n", "train.py", {}),
    ("", "entry_points: [a]\n", "main", {}),
    ("", ADDED, "main", {}),
    ("", ADDED, "main", {"size": "large", "deep": False}),
    ("booleans", ADDED, "main", {"deep": "no"}),
    ("", BOOLEANS, "main", {}),
    ("", BOOLEANS, "main", {"a": "1", "b": "yes"}),
    ("booleans", BOOLEANS, "main", {"a": True}),
    ("", LISTS, "main", {"plain": "a, b"}),
    ("", LISTS, "main", {"plain": "[1,2]", "files": "['c']", "axes": [2, 3]}),
    ("lists", LISTS, "main", {"plain": ["a", "b"]}),
    ("added-arguments", ADDED, "main", {"verbose": True}),
    ("added-arguments", ADDED, "main", {"rate": 0.5, "tags": "a,b"}),
    ("types-checked", ADDED, "main", {"size": "huge"}),
    ("types-checked", PLAIN, "main", {"name": "x", "count": "3.7"}),
    ("types-checked", PLAIN, "main", {"name": "x", "rate": "fast"}),
    ("null-not-given", PLAIN, "main", {"name": "x", "count": None}),
    ("", "name: a\nname: b\n", "train.py", {}),
    ("scripts-exist", "", "missing.py", {}),
    ("scripts-inside", "", "../elsewhere.py", {}),
    (
        "placeholder-attributes",
        "entry_points: {main: {command: 'x {a.strip}', parameters: {a: string}}}",
        "main",
        {"a": "1"},
    ),
    (
        "quoted-placeholders",
        "entry_points: {main: {command: 'x \"{a}\"', parameters: {a: string}}}",
        "main",
        {"a": "$(y)"},
    ),
    ("block-commands", "entry_points:\n  main:\n    command: |\n      x\n", "main", {"extra": "1"}),
    ("format-specs", "entry_points: {main: {command: 'x {a:>5}', parameters: {a: string}}}", "main", {"a": "1"}),
    ("null-not-given", PLAIN, "main", {"name": "x", "z": None}),
    ("unnamed-extra", PLAIN, "main", {"name": "x", "": "1"}),
    ("empty-command", "entry_points: {main: {command: ''}}", "main", {}),
    ("empty-sections", "entry_points: {main: {command: x, parameters: null}}", "main", {}),
    ("keys-are-text", "entry_points: {1: {command: x}}", "1", {}),
    ("shapes-checked", "name: [a]\n", "train.py", {}),
    ("shapes-checked", "docker_env: {image: 3}\n", "train.py", {}),
    ("shapes-checked", "docker_env: {image: a, environment: [[a, b, c]]}\n", "train.py", {}),
    ("empty-path", PATHS, "main", {"data": "", "link": "s3://a/b"}),
]


def through_mlflow(folder: Path, entry_point: str, values: dict[str, Any]) -> str:
    from mlflow.projects._project_spec import load_project as mlflow_load

    try:
        project = mlflow_load(str(folder))  # type: ignore[no-untyped-call]  # MLflow has no types here
        command: str = project.get_entry_point(entry_point).compute_command(values, str(folder))
    except Exception:
        return REFUSED
    return command


def through_us(folder: Path, entry_point: str, values: dict[str, Any]) -> str:
    try:
        found = find_entry_point(load_project(folder), entry_point)
        return build_command(found, check_parameters(found, values))
    except ExecutionException:
        return REFUSED


@pytest.mark.parametrize(("difference", "text", "entry_point", "values"), CASES)
def test_command_equals_mlflow_or_is_listed_difference(
    difference: str,
    text: str,
    entry_point: str,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    if text:
        (folder / "MLproject").write_text(text)
    for name in ("train.py", "run.sh", "data.txt"):
        (folder / name).write_text("")
    monkeypatch.chdir(folder)
    theirs, ours = through_mlflow(folder, entry_point, values), through_us(folder, entry_point, values)
    if difference:
        assert theirs != ours, f"{difference} is no difference any more"
        assert re.search(rf"^\| `{difference}` \|", COMPATIBILITY.read_text(), re.MULTILINE), f"{difference} has no row"
    else:
        assert theirs == ours
