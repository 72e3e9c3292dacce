"""The parsed MLproject as a value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from prefect_mlprojects._support.files import is_within
from prefect_mlprojects.exceptions import Problem

ParameterType: TypeAlias = Literal["string", "float", "int", "path", "uri", "bool", "choice", "list"]


@dataclass(frozen=True)
class ProjectParameter:
    """A parameter that an entry point declares.

    Attributes:
        name: Its name.
        declared_type: The type as written in the file.
        type: The effective type: an unknown one is ``string``.
        default: Its default as text; None if a value is required.
        line: Its line in the file, counted from 1.
        secret: Whether its value is never shown or stored.
        description: A sentence for people; empty if there is none.
        choices: The values that are allowed; empty for any.
        minimum: The least number allowed, if any.
        maximum: The greatest number allowed, if any.
        optional: Whether a call may leave it out, so that it vanishes from the command.
        option: The command line option before its value, or before each item of a list; for a bool, all there is.
        words: Whether each item of a list is a word of its own.
        separator: The text between a list's items in the command.
    """

    name: str
    declared_type: str
    type: ParameterType
    default: str | None = None
    line: int | None = None
    secret: bool = False
    description: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    optional: bool = False
    option: str | None = None
    words: bool = False
    separator: str | None = None

    @property
    def required(self) -> bool:
        """Whether a call must give a value."""
        return self.default is None and not self.optional

    @property
    def is_several(self) -> bool:
        """Whether it is a list whose items are words of their own."""
        return self.type == "list" and self.separator is None and (self.words or self.option is not None)

    @property
    def is_plain_list(self) -> bool:
        """Whether it is a list that is one word of the command, in which texts stay as they are, as in MLflow."""
        return self.type == "list" and self.separator is None and not self.is_several


@dataclass(frozen=True)
class EntryPoint:
    """An entry point: a command with parameters.

    Attributes:
        command: The command template with ``{parameter}`` placeholders.
        line: Its line in the file, counted from 1; None for a script.
        script: The path of a ``.py``, ``.sh`` or ``.R`` script that runs without a declaration, relative to the project.
        command_line: The line of ``command`` in the file, counted from 1.
    """

    name: str
    command: str
    parameters: Mapping[str, ProjectParameter]
    line: int | None = None
    script: str | None = None
    command_line: int | None = None


@dataclass(frozen=True)
class PythonEnvironment:
    """The file of ``python_env``, in one of several formats, or the ``python_env.yaml`` in the project's folder."""

    file: Path


@dataclass(frozen=True)
class CondaEnvironment:
    """A ``conda.yaml``: that of ``conda_env``, or the one in the project's folder."""

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
    """The project names no environment and has no environment file."""


ProjectEnvironment: TypeAlias = PythonEnvironment | CondaEnvironment | DockerEnvironment | NoEnvironment


@dataclass(frozen=True)
class Project:
    """A parsed project.

    Attributes:
        directory: The project's folder, absolute.
        file: The MLproject file, if the folder has one.
        name: The project's name, if it has one.
        entry_points: The declared entry points by name, in the order of the file; ``main.py`` is ``main`` if none is.
        environment: The environment it needs.
        databricks_spark_job: The file's ``databricks_spark_job`` mapping as written, if any.
        experiment: The MLflow experiment that the file names, if any.
        warnings: Harmless oddities, such as unknown keys and parameter types.
        temporary: Whether the folder is a working copy that is removed with the run.
        root: The folder that all files of the project must be in, as the author of a fetched project must not read this
            machine's files; None if they may be anywhere.
    """

    directory: Path
    file: Path | None
    name: str | None
    entry_points: Mapping[str, EntryPoint]
    environment: ProjectEnvironment
    databricks_spark_job: Mapping[str, Any] | None = None
    experiment: str | None = None
    warnings: tuple[Problem, ...] = ()
    temporary: bool = False
    root: Path | None = None

    def allows(self, path: Path) -> bool:
        """Whether the project may name a file or folder, which need not exist."""
        return is_within(path, self.root)

    @property
    def display_name(self) -> str:
        """The project's name, or its folder's."""
        return self.name or self.directory.name


_EXPANSION = re.compile(r"\$\(pwd\)|`pwd`|\$\{(\w+)\}|\$(\w+)")


def expand_volume(volume: str, directory: Path) -> str:
    """Returns a volume of ``docker_env`` for Docker; ``$(pwd)``, ``$PWD`` and relative paths mean the project's `directory`.

    ``mlflow run`` passes volumes to a shell. Here nothing is executed, so that ``$HOME`` is the only other variable.

    Raises:
        ValueError: It contains another expansion.
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
