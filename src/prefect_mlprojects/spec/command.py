"""Builds command lines; the one place where values are quoted for the shell."""

from __future__ import annotations

import shlex

from prefect_mlprojects.spec.parameters import CheckedParameters
from prefect_mlprojects.spec.project import EntryPoint


def build_command(entry_point: EntryPoint, parameters: CheckedParameters) -> str:
    """Returns the shell command line of a call.

    Each value is quoted once: whatever it holds, it stays one word of the command (``shlex.quote``). Further parameters follow as
    ``--name value`` in the order given. MLflow builds the same line (``EntryPoint.compute_command``).

    Args:
        entry_point: The entry point; its command's placeholders were checked by ``find_entry_point``.
        parameters: The checked values; what had to be downloaded has been.
    """
    quoted = {name: shlex.quote(value) for name, value in parameters.declared.items()}
    words = [entry_point.command.format(**quoted)]
    words += [f"--{shlex.quote(name)} {shlex.quote(value)}" for name, value in parameters.extra.items()]
    return " ".join(words)
