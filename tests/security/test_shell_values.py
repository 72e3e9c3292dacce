"""Hostile values of parameters: no shell runs them, at whatever place of a command they are."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_bash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.security.fuzz.shell_commands import HOSTILE_VALUES, HOSTILE_VARIABLES, commands, template_of

from prefect_mlprojects.spec.template import fits, parse_template

QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
_PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))
_NESTED_COMMANDS = {"command_substitution", "subshell", "process_substitution", "program"}
_CALCULATED = {"arithmetic_expansion", "subscript"}
_NOT_QUOTABLE = _CALCULATED | {"ansi_c_string", "expansion", "heredoc_body", "comment"}


def run_with(command: str, value: str, shell: str, folder: Path) -> bytes | None:
    """Runs a command with a value if the value is accepted; returns its output, and fails if the value was run."""
    template = parse_template(command)
    assert not template.faults
    if not all(fits(value, each.place) for each in template.placeholders):
        return None
    line = template.render({"x": value})
    environment = {**os.environ, **HOSTILE_VARIABLES}
    done = subprocess.run(
        [shell, "-c", line], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=20
    )
    assert not (folder / "ran").exists(), f"{shell} ran {value!r} in {command!r}: {line}"
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize(
    ("command", "accepted"),
    [
        # bash expands the word after >& twice, where it is not a file descriptor's number.
        ("echo a >&{x}", "out.txt"),
        ("echo a >& {x}", "out.txt"),
        ("echo a >&\\\n{x}", "out.txt"),
        ('echo a >&"a {x}"', "out.txt"),
        ("echo a >&'{x}'", "out.txt"),
        ("echo a >&o{x}", "out.txt"),
        ("echo a >&$(printf %s {x})", "out.txt"),
        ("echo a >&<(true){x}", "out.txt"),
        ("(echo a >&{x})", "out.txt"),
        # Subscripts are arithmetic, which takes a name for a variable and evaluates what is in it.
        ("v[{x}]=1", "7"),
        ("v=([{x}]=1)", "7"),
        ("v=( a [ {x} ]=1)", "7"),
        ("v+=([{x}]=1)", "7"),
        ("declare -a v=([{x}]=1)", "7"),
        ("v=(['{x}']=1)", "7"),
        ("v=($[1] [{x}]=1)", "7"),
        ("unset v[{x}]", "7"),
        ("echo ${{v[{x}]}}", "7"),
        ('echo "${{v[{x}]}}"', "7"),
        ("v=abc; echo ${{v:{x}}}", "7"),
        ("echo ${{{x}}}", "7"),
        ("echo $(({x}))", "7"),
        ("echo `echo $(({x}))`", "7"),
        ("cat <<END\n$(({x}))\nEND\n", "7"),
        ("for ((i = 0; i < {x}; i++)); do true; done", "7"),
        # Elsewhere.
        ("true <#{x}", "a"),
        ("echo ${{v:-{x}}}", "s3://bucket/file"),
        ("cat `echo {x}`", "/dev/null"),
        ("ls data.d[{x}]", "a-z"),
        ("echo $(( $(printf 1 {x}) + {x} ))", "7"),
    ],
)
def test_value_where_quotes_do_not_help_is_refused_unless_plain(
    command: str, accepted: str, shell: str, tmp_path: Path
) -> None:
    assert run_with(command, accepted, shell, tmp_path) is not None
    results = {value: run_with(command, value, shell, tmp_path) for value in HOSTILE_VALUES}
    assert results["$(>ran)"] is None
    assert accepted != "7" or not any(result is not None for result in results.values())


@pytest.mark.parametrize(
    "command",
    [
        'v=([1]={x}); printf %s "${{v[1]}}"',
        "printf %s {x} 2>&1",
        'v=([0]=a {x}); printf %s "${{v[@]:1}}"',
        "printf %s {x} >out 2>&1; cat out",
        "echo $((1 + 2)) >&2; v[1]=a; printf %s {x}",
        "{{ printf %s {x}; }} >&1",
    ],
)
def test_value_beside_such_places_arrives_as_itself(command: str, tmp_path: Path) -> None:
    for value in HOSTILE_VALUES:
        assert run_with(command, value, "bash", tmp_path) == value.encode()


@QUICK
@given(commands(), st.sampled_from(HOSTILE_VALUES), st.sampled_from(["bash", "dash"]))
def test_generated_command_never_runs_a_value(command: str, value: str, shell: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_with(template_of(command), value, shell, Path(folder))


def check_against_tree_sitter(command: str) -> None:
    """Fails where the scanner takes a placeholder for quotable, or for no arithmetic, and tree-sitter's grammar does not."""
    source, places = b"", []
    for part in parse_template(template_of(command)).parts:
        places += [] if isinstance(part, str) else [(len(source), part.place)]
        source += part.encode() if isinstance(part, str) else b"PHx"
    root = _PARSER.parse(source).root_node
    if root.has_error:
        return
    for position, place in places:
        node = root.descendant_for_byte_range(position, position + 3)
        around = set()
        while node is not None and node.type not in _NESTED_COMMANDS:
            around.add(node.type)
            node = node.parent
        expected = {"double-quotes": {"string"}, "single-quotes": {"raw_string"}}.get(place, set())
        refused = {"unquotable": _CALCULATED, "number": set()}.get(place, _NOT_QUOTABLE)
        if place == "word":
            refused = refused | {"string", "raw_string"}
        assert expected <= around, f"{place} at {position} of {source!r} is in {around}"
        assert not refused & around, f"{place} at {position} of {source!r} is in {around}"


@settings(QUICK, max_examples=150)
@given(commands())
def test_generated_command_is_read_as_tree_sitter_reads_it(command: str) -> None:
    check_against_tree_sitter(command)
