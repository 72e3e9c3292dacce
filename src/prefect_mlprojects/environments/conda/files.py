"""Reads ``conda.yaml``; see https://docs.conda.io/projects/conda/en/stable/user-guide/tasks/manage-environments.html."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefect_mlprojects.environments.python_files import (
    FileReader,
    RequirementEntry,
    conda_pip_entries,
    open_environment_file,
)
from prefect_mlprojects.exceptions import Problem

_KEYS = ("name", "channels", "dependencies", "variables", "prefix")


@dataclass(frozen=True)
class CondaFile:
    """What a ``conda.yaml`` asks for.

    Attributes:
        file: The file.
        name: The environment's name; None when it gives none.
        channels: Its channels, most wanted first.
        dependencies: Its conda packages.
        pip: Its pip section, in the format of a requirements file.
        variables: Environment variables to set in it.
        warnings: What is odd but allowed.
    """

    file: Path
    name: str | None = None
    channels: tuple[str, ...] = ()
    dependencies: tuple[RequirementEntry, ...] = ()
    pip: tuple[RequirementEntry, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_conda_file(path: Path) -> CondaFile | tuple[Problem, ...]:
    """Reads a ``conda.yaml``.

    Args:
        path: The file, absolute.

    Returns:
        What it asks for, or everything that is wrong with it.
    """
    reader = open_environment_file(path)
    if isinstance(reader, tuple):
        return reader
    content = reader.document.content
    warnings = tuple(
        f"{path.name}: the key {str(key)!r} is not conda's and is passed over" for key in content if key not in _KEYS
    )
    name = content.get("name")
    channels = tuple(_texts(reader, "channels", "'conda-forge' or a URL"))
    dependencies: list[RequirementEntry] = []
    pip: list[RequirementEntry] = []
    for position, item in reader.entries("dependencies").items():
        if isinstance(item, dict):
            pip.extend(conda_pip_entries(reader, position, item))
        elif isinstance(item, str) and item.strip():
            dependencies.append(RequirementEntry(item.strip(), reader.document.line("dependencies", position)))
        else:
            reader.problem(
                "a conda dependency must be a text such as 'numpy=1.26' or a pip section", "dependencies", position
            )
    variables = _variables(reader)
    if reader.problems:
        return tuple(reader.problems)
    return CondaFile(
        path,
        None if name is None else str(name),
        channels,
        tuple(dependencies),
        tuple(pip),
        variables,
        warnings,
    )


def _texts(reader: FileReader, key: str, example: str) -> list[str]:
    found = []
    for position, item in reader.entries(key).items():
        if isinstance(item, str) and item.strip():
            found.append(item.strip())
        else:
            reader.problem(f"an entry of {key} must be a text, such as {example}", key, position)
    return found


def _variables(reader: FileReader) -> dict[str, str]:
    value = reader.document.content.get("variables")
    if value is None:
        return {}
    if not isinstance(value, dict):
        reader.problem("variables must be a mapping of names to values", "variables", fix="write NAME: value")
        return {}
    found: dict[str, str] = {}
    for name, text in value.items():
        if isinstance(text, (dict, list)) or not str(name) or "=" in str(name) or "\0" in f"{name}{text}":
            reader.problem(f"the variable {str(name)!r} can't be set", "variables", str(name), fix="write NAME: value")
        elif text is not None:
            found[str(name)] = ("true" if text else "false") if isinstance(text, bool) else str(text)
    return found
