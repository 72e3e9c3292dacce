"""Messages, tables and values on a terminal of any width and encoding, or in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

import click

from prefect_mlprojects.exceptions import shown

_COLORS = {"RUNNING": "cyan", "FINISHED": "green", "FAILED": "red", "KILLED": "yellow"}
_GAP = 2
_LEAST = 12


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, flexible: Sequence[int]) -> None:
    """Prints rows under their heads; columns without values are left out.

    On a terminal the `flexible` columns, the first of them first, are cut to its width. In a pipe nothing is cut.
    """
    from rich.cells import cell_len

    texts = [[shown(value) for value in row] for row in rows]
    kept = [index for index in range(len(heads)) if any(row[index] for row in texts)]
    widths = {index: max(cell_len(heads[index]), *(cell_len(row[index]) for row in texts)) for index in kept}
    if sys.stdout.isatty():
        excess = sum(widths.values()) + _GAP * (len(kept) - 1) - shutil.get_terminal_size().columns
        for index in flexible:
            if index in widths and excess > 0:
                cut = min(excess, max(0, widths[index] - _LEAST))
                widths[index] -= cut
                excess -= cut
    for row in [list(heads), *texts]:
        cells = [_fit(row[index], widths[index]) for index in kept]
        write_line((" " * _GAP).join(map(styled_status, cells)).rstrip())


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Prints a message; what projects and servers wrote into it can't command the terminal."""
    click.echo(shown(text, lines=True), err=err, nl=nl)


def pass_on(text: str) -> None:
    """Prints a line of a program's output, or of data for programs, as it is."""
    click.echo(text)


def write_line(text: str) -> None:
    """Prints a line in the encoding of stdout; click would print UTF-8 to a terminal that wants ASCII."""
    sys.stdout.write(f"{text}\n")


def _fit(text: str, width: int) -> str:
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text + " " * (width - cell_len(text))
    end = "…" if _encodes("…") else "..."
    return set_cell_size(text, width - len(end)) + end


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def styled_status(text: str) -> str:
    """Returns a text that begins with a status in the status's colour, if stdout is a terminal."""
    color = _COLORS.get(text.split(" ", 1)[0])
    return click.style(text, fg=color) if color and sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text
