"""Values of parameters from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from prefect_mlprojects.cli import group
from prefect_mlprojects.exceptions import ParameterError
from prefect_mlprojects.spec.values_file import read_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (
            "a: 1\nb: 0.5\nc: yes\nd: text\ne: [x, 1]\nf: null\n",
            {"a": 1, "b": 0.5, "c": True, "d": "text", "e": ["x", 1], "f": None},
        ),
        ('{"a": 1e-5, "b": "x y"}', {"a": "1e-5", "b": "x y"}),
        ("day: 2026-01-02\n", {"day": "2026-01-02"}),
        ("1: x\nno: y\n", {"1": "x", "no": "y"}),
        ("", {}),
    ],
)
def test_values_are_those_of_yaml_or_json(text: str, values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "values"
    file.write_text(text)
    assert read_values(file) == values


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("- a\n", ["values:1: it must be a mapping"]),
        ("a: 1\na: 2\nb: {c: d}\n", ["values:2: the key 'a' is given twice", "values:3: the value of 'b' must be"]),
        ("a: [[1]]\n", ["values:1: the value of 'a' must be"]),
        ("a: [\n", ["not valid YAML"]),
        ("a: \xff", ["UTF-8"]),
    ],
)
def test_wrong_file_is_refused_with_its_lines(text: str, messages: list[str], tmp_path: Path) -> None:
    (tmp_path / "values").write_bytes(text.encode("latin-1"))
    with pytest.raises(ParameterError) as caught:
        read_values(tmp_path / "values")
    assert all(each in str(caught.value) for each in messages)


def test_values_on_the_command_line_take_precedence(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(
        "entry_points: {main: {parameters: {a: int, b: {type: list, words: true}}, command: 'echo {a} {b}'}}"
    )
    (tmp_path / "values.yaml").write_text("a: 1\nb: [x y, z]\n")
    arguments = ["plan", str(tmp_path), "--params-file", str(tmp_path / "values.yaml"), "-P", "a=2"]
    for order in (arguments, [arguments[0], *arguments[4:], *arguments[1:4]]):
        done = CliRunner().invoke(group, order)
        assert "echo 2 'x y' z" in done.output, done.output
