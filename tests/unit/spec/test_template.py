"""Values in every place of a command: bash gives the program what was given, or the call is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from prefect_mlprojects.exceptions import ParameterError
from prefect_mlprojects.spec import EntryPoint, ProjectParameter, build_command, check_parameters

PARAMETERS = {"x": ProjectParameter("x", "string", "string")}
# Each makes the file "ran" when the shell takes it for anything but text.
ATTACKS = [
    "\\'\";>ran;#",
    "(>ran)",
    "$(>ran)",
    "`>ran`",
    ";>ran;",
    "';>ran;'",
    '";>ran;"',
    "\n>ran\n",
    "'\n>ran\n'",
    "\\';>ran;'",
    ")>ran;(",
    "v[$(>ran)]",
    "}$(>ran)",
    "))$(>ran)",
    "END\n>ran\n",
]


def run(command: str, value: str, folder: Path) -> bytes:
    entry_point = EntryPoint("main", command, PARAMETERS)
    line = build_command(entry_point, check_parameters(entry_point, {"x": value}))
    return subprocess.run(["bash", "-c", line], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True).stdout


@pytest.mark.parametrize("value", [*ATTACKS, "a b", ""])
@pytest.mark.parametrize(
    "command",
    [
        "printf %s {x}",
        "printf %s \"$(printf 'it' >&2; true {x})\" {x}",
        "printf %s ${{HOME:+}}{x}",
        "v='a' w=\"b\"; printf %s ${{v:-'it'}} >&2; printf %s {x}",
        'v=abc; printf %s ${{v#"a"}} ${{#v}} $# >&2; printf %s {x}',
        "[ a = 'a' ] && printf %s {x}",
        "printf a # it's a comment\nprintf '\\0'; printf %s {x}",
        "printf a \\\n  >&2; printf %s {x}",
        "case a in a) printf %s {x};; esac",
        "v[1]=a; printf %s {x}",
        "if (( 1 < 2 )); then printf %s {x}; fi",
    ],
)
def test_unquoted_value_is_passed_unchanged(command: str, value: str, tmp_path: Path) -> None:
    assert run(command, value, tmp_path).rpartition(b"\0")[2] == value.encode()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [*ATTACKS, "a b", "", "[64,32]", "it's", "C:\\new\\", "100%", "!1", "$HOME", "a\\\\"])
@pytest.mark.parametrize(
    "command",
    [
        'printf "%s" "{x}"',
        "printf %s '{x}'",
        'printf %s "${{HOME:+}}{x}"',
        "printf %s \"\"'{x}'",
        'printf %s "$(printf %s "{x}")"',
        "printf %s \"$(printf %s '{x}')\"",
        "printf %s {x}",
    ],
)
def test_quoted_value_is_passed_unchanged(command: str, value: str, tmp_path: Path) -> None:
    expected = value.rstrip("\n") if "$(" in command else value
    assert run(command, value, tmp_path) == expected.encode()
    assert not list(tmp_path.iterdir())


UNQUOTABLE = [
    "printf %s `printf %s {x}`",
    'printf %s "`printf %s {x}`"',
    "cat <<END\n{x}\nEND\n",
    "cat <<'END'\n{x}\nEND\n",
    "cat <\\\n<END\n{x}\nEND\n",
    "true # {x}",
    "true \\\n# it's {x}'",
    "printf %s $(( {x} ))",
    "printf %s $[ {x} ]",
    'printf %s "$[ {x} ]"',
    "(( {x} ))",
    "printf %s $'{x}'",
    "printf %s $\\\n'\\'{x}",
    "printf %s \\{x}",
    'printf %s "\\{x}"',
    "printf %s ${x}",
    'printf %s "${x}"',
    'printf %s "a$\\\n{x}"',
    'printf %s "$(printf %s ${x})"',
    'printf %s "${{HOME:+{x}}}"',
    "v=abc; printf %s ${{v:{x}}}",
    "v=abc; printf %s ${{v:'{x}'}}",
    'v=abc; printf %s ${{v:"{x}"}}',
    "v=abc; printf %s ${{v:-${{w:{x}}}}}",
    "printf %s ${{v[{x}]}}",
    "v[{x}]=1",
    "v['{x}']=1",
    "v[1 + {x}]=1",
]


@pytest.mark.parametrize("command", UNQUOTABLE)
def test_at_unquotable_places_only_plain_values_are_accepted(command: str, tmp_path: Path) -> None:
    for value in ATTACKS:
        with pytest.raises(ParameterError, match="can't be quoted at its place"):
            run(command, value, tmp_path)
    run(command, "7", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "true \\\n# it's\nprintf '\\0'; printf %s {x}",
        "printf %s ${{v:-a # it}} >&2; printf '\\0'; printf %s {x}",
        "printf %s ${{v:-(}} >&2; printf '\\0'; printf %s {x}",
        "printf %s ${{v:-$(printf %s 'a)')}} >&2; printf '\\0'; printf %s {x}",
    ],
)
def test_text_like_a_quote_or_comment_does_not_mislead_the_scanner(command: str, tmp_path: Path) -> None:
    for value in ATTACKS:
        assert run(command, value, tmp_path).rpartition(b"\0")[2] == value.encode()
    assert not list(tmp_path.iterdir())
