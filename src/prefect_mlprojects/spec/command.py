"""Builds command lines; the one place where values are quoted for the shell."""

from __future__ import annotations

import shlex

from prefect_mlprojects.exceptions import ParameterError
from prefect_mlprojects.spec.parameters import CheckedParameters, place_problems
from prefect_mlprojects.spec.project import EntryPoint
from prefect_mlprojects.spec.template import parse_template


def build_command(entry_point: EntryPoint, parameters: CheckedParameters) -> str:
    """Returns the shell command line of a call, to be run by ``bash -c``.

    Each value is quoted once: whatever it holds, it stays one word of the command and never becomes shell syntax. Further
    parameters follow as ``--name value`` in the order given. MLflow builds the same line (``EntryPoint.compute_command``), except
    for what ``docs/compatibility.md`` lists.

    Args:
        entry_point: The entry point, as ``find_entry_point`` returned it: that checked its command's placeholders.
        parameters: The checked values; what had to be downloaded has been.

    Raises:
        ParameterError: A value stands in a place of the command where it can't be quoted; ``check_parameters`` finds this for all
            values but those that were downloaded since.
        ValueError: Something is still to be downloaded.
    """
    if parameters.downloads:
        raise ValueError(f"still to be downloaded: {', '.join(parameters.downloads)}")
    template = parse_template(entry_point.command)
    problems = place_problems(template, parameters.declared, parameters.extra)
    if problems:
        raise ParameterError(f"Parameters of entry point '{entry_point.name}' do not fit", problems)
    command = template.render(parameters.declared)
    if not parameters.extra:
        return command
    if template.line_ends:
        command = command.rstrip()
    words = (f"--{shlex.quote(name)} {shlex.quote(value)}" for name, value in parameters.extra.items())
    return " ".join([command, *words])
