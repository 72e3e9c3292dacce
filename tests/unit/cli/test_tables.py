"""Tables on terminals of any width and encoding."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from prefect_mlprojects._support.text import span
from prefect_mlprojects.cli.tables import print_table
from prefect_mlprojects.exceptions import shown

HEADS = ("RUN", "NAME", "METRIC", "PARAMETERS")
ROW = ("2eb80103", "a-project-with-a-long-name/main", "", "alpha=0.1 note=" + "値" * 60)


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, columns: int, kind: Any = Terminal) -> list[str]:
    buffer = io.BytesIO()
    stream = kind(buffer, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(HEADS, [ROW], flexible=(3, 1))
    stream.flush()
    return buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_table_on_terminal_is_not_wider(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.cells import cell_len

    heads, row = printed(monkeypatch, "utf-8", columns)
    assert heads.split() == ["RUN", "NAME", "PARAMETERS"]
    assert cell_len(row) <= columns
    assert row.endswith("…")


def test_table_on_ascii_terminal_ends_cut_cells_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    row = printed(monkeypatch, "ascii", 80)[1]
    assert row.endswith("...")


def test_table_in_pipe_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    row = printed(monkeypatch, "utf-8", 40, io.TextIOWrapper)[1]
    assert row.split("  ")[-1] == ROW[3]


def test_control_characters_are_escaped() -> None:
    assert shown("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\nc\\u202e"
    assert shown("a\nb\r", lines=True) == "a\nb\\r"


@pytest.mark.parametrize(
    ("seconds", "text", "whole"),
    [(277200, "3d05h", "3d"), (9.94, "9.9s", "10s"), (59.4, "59s", "59s"), (185, "3m05s", "3m"), (7500, "2h05m", "2h")],
)
def test_span_has_two_units_at_most(seconds: float, text: str, whole: str) -> None:
    assert (span(seconds), span(seconds, whole=True)) == (text, whole)
