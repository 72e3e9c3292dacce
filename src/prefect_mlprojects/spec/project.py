"""The parsed MLproject as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from prefect_mlprojects.exceptions import Problem

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
    """

    directory: Path
    file: Path | None
    name: str | None
    entry_points: Mapping[str, EntryPoint]
    environment: ProjectEnvironment
    databricks_spark_job: Mapping[str, Any] | None = None
    warnings: tuple[Problem, ...] = ()

    @property
    def display_name(self) -> str:
        """The project's name, or its folder's."""
        return self.name or self.directory.name
