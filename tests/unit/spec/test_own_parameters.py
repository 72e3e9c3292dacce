"""Types and keys of parameters that MLflow does not have: bool, choice, list, limits, options, and optional ones."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it has no types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_mlprojects.exceptions import ParameterError, ProjectSpecError
from prefect_mlprojects.spec import build_command, check_parameters, find_entry_point, load_project
from prefect_mlprojects.spec.project import EntryPoint, ProjectParameter
from prefect_mlprojects.spec.schema import form_value, parameters_schema, typed_value, value_for_schema
from prefect_mlprojects.spec.values import list_items, list_text, may_be_written_otherwise


def entry_point(folder: Path, parameters: str, command: str = "run") -> EntryPoint:
    lines = "".join(f"      {line}\n" for line in parameters.splitlines())
    text = f"entry_points:\n  main:\n    parameters:\n{lines}    command: {json.dumps(command)}\n"
    (folder / "MLproject").write_text(text)
    return find_entry_point(load_project(folder), "main")


def command_of(folder: Path, parameters: str, command: str, values: dict[str, Any]) -> str:
    main = entry_point(folder, parameters, command)
    return build_command(main, check_parameters(main, values))


@pytest.mark.parametrize("value", [True, "true", "True", "YES", "y", "on", "1", 1, "t"])
def test_bool_that_means_true_is_written_as_mlflow_writes_it(tmp_path: Path, value: Any) -> None:
    assert command_of(tmp_path, "v: bool", "run {v}", {"v": value}) == "run True"
    assert command_of(tmp_path, "v: {type: bool, option: true}", "run", {"v": value}) == "run --v"


@pytest.mark.parametrize("value", [False, "false", "no", "N", "off", "0", 0, "f"])
def test_bool_that_means_false_is_written_as_mlflow_writes_it(tmp_path: Path, value: Any) -> None:
    assert command_of(tmp_path, "v: bool", "run {v}", {"v": value}) == "run False"
    assert command_of(tmp_path, "v: {type: bool, option: true}", "run", {"v": value}) == "run"


_FLAG = "v: {type: bool, default: false, option: --verbose}"
_RATE = "rate: {type: float, optional: true}"
_FILES = "files: {type: list, default: 'a,b', words: true}"


@pytest.mark.parametrize(
    ("parameters", "command", "values", "expected"),
    [
        ("v: {type: bool, default: yes}", "run {v}", {}, "run True"),
        # An author's text stays as it is; a caller's value is written in the same way.
        ("v: {type: bool, default: 'no'}", "run {v}", {}, "run no"),
        ("v: {type: bool, default: 'no'}", "run {v}", {"v": True}, "run yes"),
        ("v: {type: bool, default: 0}", "run {v}", {"v": "on"}, "run 1"),
        ("v: {type: bool, default: 'true'}", "run {v}", {"v": "False"}, "run false"),
        ("v: {type: bool, default: maybe}", "run {v}", {"v": "no"}, "run False"),
        (_FLAG, "run {v} x", {}, "run  x"),
        (_FLAG, "run {v} x", {"v": "on"}, "run --verbose x"),
        (_FLAG, "run x", {"v": True}, "run x --verbose"),
        (_FLAG, "run x\n", {"v": True, "extra": "1"}, "run x --verbose --extra 1"),
        (_RATE, "run --lr {rate} x", {}, "run x"),
        (_RATE, "run --lr={rate} x", {}, "run x"),
        (_RATE, "run -l {rate}", {}, "run"),
        (_RATE, 'run --lr "{rate}" x', {}, "run x"),
        (_RATE, "run --lr {rate} x", {"rate": 1e-5}, "run --lr 1e-05 x"),
        (_RATE, "run {rate}", {"rate": ""}, "run"),
        (_RATE, 'run "--lr={rate}" x', {}, "run x"),
        (_RATE, "run --lr='{rate}'; x", {}, "run; x"),
        (_RATE, "run \\\n  --lr {rate} \\\n  x", {}, "run \\\n \\\n  x"),
        # Where it is a part of a word, only the value vanishes.
        (_RATE, "run {rate}x", {}, "run x"),
        (_RATE, "run --lr={rate}x", {}, "run --lr=x"),
        (_RATE, 'run "{rate}x" y', {}, 'run "x" y'),
        (f"{_RATE}\na: {{default: 1}}", "run {a}-x {rate} y", {}, "run 1-x y"),
        (_RATE, "run", {"rate": "2"}, "run --rate 2"),
        (_RATE, "run", {}, "run"),
        ("rate: {type: float, default: '', optional: true, option: -r}", "run", {"rate": 2}, "run -r 2"),
        ("rate: {type: float, default: '', optional: true, option: -r}", "run", {}, "run"),
        (_FILES, "run --files {files}", {}, "run --files a b"),
        (_FILES, "run {files}", {"files": ["x y", "it's"]}, "run 'x y' 'it'\"'\"'s'"),
        (_FILES, "run {files}", {"files": '["a,b", "c"]'}, "run a,b c"),
        ("files: {type: list, option: -f}", "run", {"files": "a, b"}, "run -f a -f b"),
        ("files: {type: list, separator: ':'}", 'run "{files}"', {"files": "a,b"}, 'run "a:b"'),
        ("files: {type: list, optional: true}", "run --files {files}", {}, "run"),
        ("files: {type: list, option: -f, words: true}", "run", {"files": "a, b"}, "run -f a b"),
        ("files: {type: list, option: -f, words: true}", "run {files} x", {"files": ["a b"]}, "run -f 'a b' x"),
        ("files: {type: list, option: -f, words: true, default: ''}", "run", {}, "run"),
        ("files: {type: list, option: -f, separator: ','}", "run", {"files": ["a", "b"]}, "run -f a,b"),
        # A plain list is one word: texts, and the author's default, are as MLflow writes them.
        ("files: list", "run --f={files}", {"files": "[1, 2]"}, "run --f='[1, 2]'"),
        ("files: list", "run {files}", {"files": ["x y", "z"]}, "run 'x y,z'"),
        ("files: {type: list, default: [a, b]}", "run '{files}'", {}, "run '['\"'\"'a'\"'\"', '\"'\"'b'\"'\"']'"),
        ("files: {type: list, default: [1, 2]}", "run '{files}'", {"files": [3, 4]}, "run '[3, 4]'"),
        ("files: {type: list, default: '[\"a\"]'}", "run {files}", {"files": ["b"]}, "run '[\"b\"]'"),
        ("files: {type: list, default: '', optional: true}", "run", {"files": "a,b"}, "run --files a,b"),
        ("v: {type: bool, optional: true}", "run", {"v": True}, "run --v True"),
        ("size: {type: choice, choices: [small, large], default: small}", "run {size}", {"size": "large"}, "run large"),
        ("size: {type: int, choices: [1, 2]}", "run {size}", {"size": 2}, "run 2"),
    ],
)
def test_command_has_the_arguments(
    tmp_path: Path, parameters: str, command: str, values: dict[str, Any], expected: str
) -> None:
    assert command_of(tmp_path, parameters, command, values) == expected


@pytest.mark.parametrize(
    ("parameters", "value", "expected"),
    [
        ("x: bool", "maybe", "true or false"),
        ("x: {type: choice, choices: [a, b]}", "c", "one of a, b"),
        ("x: {type: list, choices: [a, b]}", "a,c", "one of a, b"),
        ("x: {type: int, min: 1}", "0", "of at least 1"),
        ("x: {type: float, max: 0.5}", "0.6", "of at most 0.5"),
        ("x: {type: float, min: 0, max: 1}", "nan", "from 0 to 1"),
        ("x: {type: int, min: 1, max: 3}", "7", "from 1 to 3"),
        ("x: {type: int, max: 1234567}", "1234568", "of at most 1234567"),
        ("x: {type: float, choices: [1, 0.5]}", "0.6", "one of 1, 0.5"),
    ],
)
def test_callers_value_outside_of_what_is_declared_is_refused(
    tmp_path: Path, parameters: str, value: str, expected: str
) -> None:
    with pytest.raises(ParameterError, match=expected):
        check_parameters(entry_point(tmp_path, parameters, "run {x}"), {"x": value})


@pytest.mark.parametrize(
    "parameters",
    [
        "x: {type: bool, default: maybe}",
        "x: {type: choice, choices: [a], default: b}",
        "x: {type: int, min: 3, default: 1}",
    ],
)
def test_authors_default_outside_of_what_is_declared_passes_with_a_warning(tmp_path: Path, parameters: str) -> None:
    main = entry_point(tmp_path, parameters, "run {x}")
    (warning,) = load_project(tmp_path).warnings
    assert warning.line == 4
    assert "is not" in warning.message
    assert build_command(main, check_parameters(main, {})) == f"run {main.parameters['x'].default}"


@pytest.mark.parametrize(
    ("parameters", "command", "message"),
    [
        ("x: {type: int, min: 3, max: 1}", "run {x}", "'min' of parameter 'x' is greater"),
        ("x: {choices: a}", "run {x}", "'choices' of parameter 'x' must be a list"),
        ("x: {choices: []}", "run {x}", "'choices' of parameter 'x' must be a list"),
        ("x: {type: int, choices: [1, two]}", "run {x}", "the choice 'two' of parameter 'x' \\(int\\) is not a whole"),
        ("x: {type: list, words: true, separator: ','}", "run {x}", "has 'words' and 'separator'"),
        ("x: {type: list, separator: [a]}", "run {x}", "must be a text, not a list"),
        ("x: {type: list, words: 3}", "run {x}", "'words' of parameter 'x' must be true or false"),
        ("x: {optional: maybe}", "run {x}", "'optional' of parameter 'x' must be true or false"),
        ("x: {option: '$(id)'}", "run {x}", "'option' of parameter 'x' must be an option"),
        ("x: {option: 3}", "run {x}", "'option' of parameter 'x' must be an option"),
        ("x: {type: list, words: true}", "run --x={x}", "within another word or quotes"),
        ("x: {type: list, option: -x}", 'run "{x}"', "within another word or quotes"),
        ("x: {type: bool, option: --x}", "run a{x}", "within another word or quotes"),
        ("x: {type: bool, option: --x}", "run # comment", "can't be followed by x"),
    ],
)
def test_unusable_declaration_is_an_error_with_its_line(
    tmp_path: Path, parameters: str, command: str, message: str
) -> None:
    with pytest.raises(ProjectSpecError, match=message) as caught:
        entry_point(tmp_path, parameters, command)
    assert all(each.line for each in caught.value.problems)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("x: {type: choice}", "choice without 'choices'"),
        ("x: {type: string, min: 1}", "a string has none"),
        ("x: {type: int, max: many}", "it must be a number"),
        ("x: {type: float, max: .inf}", "it must be a number"),
        ("x: {type: float, words: true}", "it is for lists"),
        ("x: {separator: ','}", "it is for lists"),
        ("x: {choices: ['on', off]}", "is the boolean False"),
        ("x: {type: int, maximum: 3}", "unknown key 'maximum'"),
    ],
)
def test_key_without_effect_is_a_warning(tmp_path: Path, parameters: str, message: str) -> None:
    entry_point(tmp_path, parameters, "run {x}")
    assert [message in each.message for each in load_project(tmp_path).warnings] == [True]


def test_form_shows_each_declaration(tmp_path: Path) -> None:
    main = entry_point(
        tmp_path,
        "verbose: {type: bool, default: false, description: 'Print more.'}\n"
        "size: {type: choice, choices: [small, large], default: small}\n"
        "layers: {type: int, choices: [1, 2]}\n"
        "rate: {type: float, min: 0, max: 1, optional: true, description: Learning rate}\n"
        "files: {type: list, default: [a, b], words: true}\n"
        "axes: {type: list, default: '[0, 1]'}\n"
        "colors: {type: list, choices: [red, blue], optional: true, option: -c}\n"
        "data: {type: path, default: d.csv, description: The table.}",
        "run {verbose} {size} {layers} --rate {rate} {files} {data} {axes}",
    )
    schema = parameters_schema(main, {"verbose": "yes"})
    found = {name: dict(each) for name, each in schema["properties"].items()}
    shown = {name: {key: each[key] for key in each if key not in ("title", "position")} for name, each in found.items()}

    assert schema["required"] == ["layers"]
    assert shown == {
        "verbose": {"type": "boolean", "description": "Print more.", "default": True},
        "size": {"type": "string", "description": "choice", "enum": ["small", "large"], "default": "small"},
        "layers": {"type": "integer", "description": "int", "enum": [1, 2]},
        "rate": {"type": "number", "description": "Learning rate (from 0 to 1)", "minimum": 0, "maximum": 1},
        "files": {
            "type": "array",
            "items": {"type": "string"},
            "description": "list",
            "default": ["a", "b"],
        },
        "axes": {
            "anyOf": [
                {"type": "array", "items": {"type": "string"}, "description": "list"},
                {"type": "string"},
            ],
            "description": "list",
            "default": "[0, 1]",
        },
        "colors": {
            "type": "array",
            "items": {"type": "string", "enum": ["red", "blue"]},
            "description": "list",
        },
        "data": {
            "type": "string",
            "format": "path",
            "description": "The table. path: a file or folder where it runs, or a remote URI",
            "default": "d.csv",
        },
    }


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_list_text_has_the_items_again(items: list[str]) -> None:
    assert list_items(list_text(items)) == tuple(items)
    assert typed_value("list", list_text(items)) == items or any("\0" in each for each in items)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), min_size=1), min_size=1))
def test_items_reach_the_program_as_they_are(items: list[str]) -> None:
    parameter = ProjectParameter("x", "list", "list", option="-x")
    words = ProjectParameter("x", "list", "list", words=True)
    assert shlex.split(
        build_command(
            EntryPoint("main", "run {x}", {"x": words}),
            check_parameters(EntryPoint("main", "run {x}", {"x": words}), {"x": items}),
        )
    ) == ["run", *items]
    main = EntryPoint("main", "printf '%s\\n'", {"x": parameter})
    command = build_command(main, check_parameters(main, {"x": items}))
    assert shlex.split(command) == ["printf", "%s\\n", *(word for each in items for word in ("-x", each))]


def test_optional_and_flags_run_under_a_real_shell(tmp_path: Path) -> None:
    command = command_of(
        tmp_path,
        f"{_FLAG}\n{_RATE}\n{_FILES}",
        "printf '[%s]' {v} --lr {rate} --files {files}",
        {"v": True, "files": ["a b", "$(id)"]},
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "[--verbose][--files][a b][$(id)]"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("float", "0.5", False),
        ("float", "5", True),
        ("float", "1e-5", True),
        ("float", "1e-05", False),
        ("int", "5", False),
        ("int", "-5", False),
        ("int", "+5", True),
        ("int", "05", True),
        ("string", "5", True),
        ("string", "five", False),
        ("string", "inf", False),
        ("bool", "True", False),
    ],
)
def test_numbers_that_a_program_may_write_otherwise_are_found(kind: Any, text: str, expected: bool) -> None:
    assert may_be_written_otherwise(ProjectParameter("x", kind, kind), text) is expected


def _ways(parameter: ProjectParameter, value: Any) -> list[str]:
    """The command of a call; of a deployment with the value; of a start of a deployment with it."""
    main = EntryPoint("main", "run {x}", {"x": parameter})

    def command(given: Any) -> str:
        return build_command(main, check_parameters(main, {"x": given}))

    checked = check_parameters(main, {"x": value})
    stored = json.loads(json.dumps(form_value(parameter, checked.declared["x"])))
    field = parameters_schema(main, {})["properties"]["x"]
    started = json.loads(json.dumps(value_for_schema(field, value)))
    for each in (stored, started):
        jsonschema.validate(each, field)
    return [command(value), command(stored), command(started)]


_SCALARS = st.one_of(st.integers(), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8"), max_size=5))


@given(
    st.sampled_from(["", "a,b", "[1, 2]", '["a"]', "['a', 'b']", None]),
    st.sampled_from([{}, {"words": True}, {"option": "-x"}, {"separator": ":"}]),
    st.one_of(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5), min_size=1),
        st.lists(st.integers(), min_size=1),
        st.sampled_from(["a,b", "a, b", "[1,2]", "['a']", '["x"]', "a"]),
    ),
)
def test_list_gives_the_same_command_by_every_way(default: str | None, keys: dict[str, Any], value: Any) -> None:
    commands = _ways(ProjectParameter("x", "list", "list", default, **keys), value)
    assert commands == [commands[0]] * 3


@pytest.mark.parametrize("default", [None, "True", "no", "0"])
@pytest.mark.parametrize("value", [True, 1, "yes", "1", "TRUE", False, 0, "off"])
def test_bool_gives_the_same_command_by_every_way(default: str | None, value: Any) -> None:
    commands = _ways(ProjectParameter("x", "bool", "bool", default), value)
    assert commands == [commands[0]] * 3


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        (ProjectParameter("x", "choice", "choice", choices=("1", "b")), 1),
        (ProjectParameter("x", "float", "float", choices=("1", "0.5")), 1),
        (ProjectParameter("x", "float", "float", choices=("1", "0.5")), "0.50"),
        (ProjectParameter("x", "string", "string"), 5),
        (ProjectParameter("x", "int", "int", minimum=1), "7"),
    ],
)
def test_value_is_accepted_by_every_way(parameter: ProjectParameter, value: Any) -> None:
    assert len(_ways(parameter, value)) == 3
