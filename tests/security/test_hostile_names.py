"""Names and URIs that are made to mislead a terminal, or to break the code that reads them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from prefect_mlprojects import ExecutionException
from prefect_mlprojects.cli import group
from prefect_mlprojects.cli.display import RunDisplay
from prefect_mlprojects.cli.tables import say
from prefect_mlprojects.exceptions import FetchError, Problem, shown
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.sources.zip_archive import unpack
from prefect_mlprojects.types import StopSignal

# Clears the screen, sets the title, hides text, turns the line round, and goes back to its start.
CODES = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202e", "\r", "\b", "\x00", "\u2028"]


@pytest.mark.parametrize(
    "uri", ["http://[::1/x", "ssh://[::1/x", "https://user@[::1/x.zip", "http://[::1/x#y", "file://[x/y"]
)
def test_malformed_url_is_an_error_that_names_it(uri: str) -> None:
    with pytest.raises(FetchError, match="no URL"):
        detect_source(uri)


def test_control_characters_of_a_message_are_escaped() -> None:
    for code in CODES:
        error = ExecutionException(f"The file says: {code}x\nand\tmore.")
        assert code not in error.message.replace("\n", "")
        assert error.message.endswith("x\nand\tmore.")
        assert code not in str(Problem(f"wrong: {code}", Path(f"a{code}"), 1, fix=code))
    assert shown("Prüfung ✓ 日本 \xa0 x") == "Prüfung ✓ 日本 \xa0 x"


def test_messages_of_commands_escape_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    for code in CODES:
        say(f"Deployed {code}x\nand more")
        RunDisplay().flow_run("id", f"http://{code}x")
    printed = capsys.readouterr()
    assert not {*CODES, "\x1b"} & {*printed.out, *printed.err}
    assert "Deployed \\x1b[2Jx\nand more" in printed.out
    assert "\\x1b[2Jx" in printed.err


@pytest.mark.parametrize("command", ["validate", "describe", "plan"])
def test_inspection_prints_no_control_character_of_a_project(command: str, tmp_path: Path) -> None:
    text = 'name: "a\\e[2Jb"\nentry_points:\n  main:\n    command: "true \\e[31m"\n    parameters:\n'
    text += '      "p\\e[1m": {type: "x\\e[3m", default: "d\\e[4m", description: "e\\e[5m"}\n  "e\\e[6m": {command: "true"}\n'
    (tmp_path / "MLproject").write_text(text)
    result = CliRunner().invoke(group, [command, str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "\\x1b" in result.output
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    "name",
    [
        "\0",
        "/",
        "./",
        "a\x1b[2J/../../x",
        "a\\b",
        "\0x",
        "a/\x1b[2J\0",
        "x" * 300,
        "a//b",
        "c:/x",
        "../x",
        "/x",
        "./..",
    ],
)
def test_hostile_member_of_a_zip_file_writes_nothing_outside(name: str, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.zip", tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("Q" * len(name), "content")
    # zipfile itself writes no such names.
    file.write_bytes(file.read_bytes().replace(b"Q" * len(name), name.encode()))
    try:
        unpack(file, folder, "a.zip", StopSignal())
        said = ""
    except ExecutionException as error:
        said = error.message
    assert "\x1b" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "folder"]
