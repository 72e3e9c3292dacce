"""Reads the values of parameters from a YAML or JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.spec.yaml_lines import kind_of, read_yaml


def read_values(path: str | Path) -> dict[str, Any]:
    """Returns the values by name: a mapping of names to texts, numbers, booleans, lists of them, or null (not given).

    Raises:
        ParameterError: It can't be read, is no such mapping, or has a key twice; all of it at once, with lines.
    """
    file = Path(path).expanduser()
    document = read_yaml(file)
    problems = [*document.problems, *document.duplicates]
    content = {} if document.content is None else document.content
    if not isinstance(content, dict):
        message = f"it must be a mapping of parameter names to values, not {kind_of(content)}"
        problems.append(Problem(message, file, 1, fix="write 'alpha: 0.1'"))
        content = {}
    for name, value in content.items():
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(each, list | dict) for each in parts):
            message = (
                f"the value of {name!r} must be a text, a number, a boolean or a list of them, not {kind_of(value)}"
            )
            problems.append(document.problem(message, name, parameter=name))
    if problems:
        raise ParameterError(f"The parameters in {file} can't be used", problems)
    return {name: _plain(value) for name, value in content.items()}


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it: a date becomes text, as MLflow's ``str`` writes a default."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
