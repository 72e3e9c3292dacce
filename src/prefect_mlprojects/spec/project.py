"""The parsed MLproject as a value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.yaml_lines import YamlDocument, kind_of

ParameterType: TypeAlias = Literal["string", "float", "int", "path", "uri"]


@dataclass(frozen=True)
class ProjectParameter:
    """A parameter that an entry point declares.

    Attributes:
        name: Its name.
        declared_type: The type as the file writes it; an unknown one behaves as ``string``.
        type: The type it has.
        default: Its default as text, or None when a value is required.
        line: The line of the file that declares it, counted from 1.
    """

    name: str
    declared_type: str
    type: ParameterType
    default: str | None = None
    line: int | None = None

    @property
    def required(self) -> bool:
        """Whether a call must give a value."""
        return self.default is None


@dataclass(frozen=True)
class EntryPoint:
    """An entry point: a command with parameters.

    Attributes:
        name: Its name.
        command: The command template with ``{parameter}`` placeholders.
        parameters: What it declares, in the order of the file.
        line: The line of the file, counted from 1; None for a script that no MLproject file names.
        script: The script's path relative to the project, when the entry point is a bare ``.py``, ``.sh`` or ``.R`` file.
        command_line: The line of the file in which ``command`` stands, counted from 1.
    """

    name: str
    command: str
    parameters: Mapping[str, ProjectParameter]
    line: int | None = None
    script: str | None = None
    command_line: int | None = None


@dataclass(frozen=True)
class PythonEnvironment:
    """``python_env``: the project names a ``python_env.yaml`` (or has one)."""

    file: Path


@dataclass(frozen=True)
class CondaEnvironment:
    """``conda_env``: the project names a ``conda.yaml`` (or has one)."""

    file: Path


@dataclass(frozen=True)
class DockerEnvironment:
    """``docker_env``: the project runs in a container.

    Attributes:
        image: The image's name.
        volumes: Docker's ``host:container[:mode]`` strings.
        environment: ``(name, value)`` pairs; a value of None is copied from the host.
    """

    image: str
    volumes: tuple[str, ...] = ()
    environment: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class NoEnvironment:
    """The project names no environment and has no file that does."""


ProjectEnvironment: TypeAlias = PythonEnvironment | CondaEnvironment | DockerEnvironment | NoEnvironment


@dataclass(frozen=True)
class Project:
    """A parsed and validated project.

    Attributes:
        directory: The project's folder, absolute.
        file: The MLproject file, or None when the folder has none.
        name: The project's name, or None.
        entry_points: The declared entry points, in the order of the file.
        environment: What the project needs to run.
        databricks_spark_job: The file's ``databricks_spark_job`` mapping as written, or None.
        warnings: What is odd but allowed: unknown keys, unknown parameter types.
        temporary: Whether the folder is a working copy that is removed with the run.
    """

    directory: Path
    file: Path | None
    name: str | None
    entry_points: Mapping[str, EntryPoint]
    environment: ProjectEnvironment
    databricks_spark_job: Mapping[str, Any] | None = None
    warnings: tuple[Problem, ...] = ()
    temporary: bool = False

    @property
    def display_name(self) -> str:
        """The project's name, or its folder's."""
        return self.name or self.directory.name


_KEYS = ("image", "volumes", "environment")
_VARIABLES_FIX = 'write [["NEW_VARIABLE", "value"], "COPIED_FROM_HOST"]'


def parse_docker_environment(
    value: Any, document: YamlDocument
) -> tuple[DockerEnvironment | None, list[Problem], list[Problem]]:
    """Reads what stands under ``docker_env``.

    Args:
        value: What stands there; not empty.
        document: The file, for line numbers.

    Returns:
        The environment as far as it could be understood, the problems, and warnings of unknown keys.
    """
    if not isinstance(value, dict):
        message = f"'docker_env' must be a mapping with an 'image', not {kind_of(value)}"
        return None, [document.problem(message, "docker_env", fix="write 'docker_env: {image: name:tag}'")], []
    problems: list[Problem] = []
    unknown = []
    for key in value:
        if key not in _KEYS:
            near = nearest(key, _KEYS)
            fix = f"did you mean {near!r}?" if near else f"the keys are {', '.join(_KEYS)}"
            message = f"unknown key {key!r} in 'docker_env'; it is ignored"
            unknown.append(document.problem(message, "docker_env", key, fix=fix))
    image = value.get("image")
    if not isinstance(image, str) or not image:
        message = "'docker_env' needs an 'image' that is text"
        problems.append(document.problem(message, "docker_env", "image", fix="write 'image: name:tag'"))
        image = ""
    volumes = value.get("volumes") or []
    if not isinstance(volumes, list) or not all(isinstance(each, str) for each in volumes):
        message = "'volumes' of 'docker_env' must be a list of texts"
        fix = 'write ["/host/path:/container/path"]'
        problems.append(document.problem(message, "docker_env", "volumes", fix=fix))
        volumes = []
    for volume in volumes:
        try:
            expand_volume(volume, document.file.parent)
        except ValueError as error:
            message = f"volume {volume!r} of 'docker_env' can't be used: {error}"
            fix = "only $(pwd), $PWD (the project's folder) and $HOME are expanded; write an absolute path"
            problems.append(document.problem(message, "docker_env", "volumes", fix=fix))
    variables = _variables(value.get("environment") or [], document, problems)
    return DockerEnvironment(image, tuple(volumes), variables), problems, unknown


_EXPANSION = re.compile(r"\$\(pwd\)|`pwd`|\$\{(\w+)\}|\$(\w+)")


def expand_volume(volume: str, directory: Path) -> str:
    """Returns a volume of ``docker_env`` as Docker takes it: ``$(pwd)``, ``$PWD`` and relative paths mean `directory`.

    ``mlflow run`` hands volumes to a shell. Here nothing is executed, so that ``$HOME`` is the only other variable.

    Raises:
        ValueError: Something else would have to be expanded.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2] or "PWD"
        if name not in {"PWD", "HOME"}:
            raise ValueError(f"{match[0]} is not expanded")
        return str(directory if name == "PWD" else Path.home())

    source, colon, target = volume.partition(":")
    source = _EXPANSION.sub(value, source)
    if "$" in source + target or "`" in source + target:
        raise ValueError("it needs a shell")
    if source.startswith("~"):
        source = str(Path(source).expanduser())
    elif source.startswith(".") or "/" in source:
        source = os.path.normpath(directory / source)
    return f"{source}{colon}{target}"


def _variables(entries: Any, document: YamlDocument, problems: list[Problem]) -> tuple[tuple[str, str | None], ...]:
    path = ("docker_env", "environment")
    if not isinstance(entries, list):
        message = f"'environment' of 'docker_env' must be a list, not {kind_of(entries)}"
        problems.append(document.problem(message, *path, fix=_VARIABLES_FIX))
        return ()
    variables: list[tuple[str, str | None]] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, str) and entry:
            variables.append((entry, None))
        elif isinstance(entry, list) and len(entry) == 2 and not any(isinstance(each, dict | list) for each in entry):
            variables.append((str(entry[0]), str(entry[1])))
        else:
            message = "each of 'environment' must be a name or a pair of name and value"
            problems.append(document.problem(message, *path, str(index), fix=_VARIABLES_FIX))
    return tuple(variables)
