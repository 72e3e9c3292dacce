"""Environments: a project's environment files -> a prepared environment. This module is the contract of the managers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal


@dataclass(frozen=True)
class EnvironmentPlan:
    """The environment that a project will get, determined without building anything.

    Attributes:
        manager: The environment manager.
        description: For people to read ("uv, Python 3.11.7, 3 requirements").
        key: The cache key; None for ``local``, which builds nothing.
        location: The prepared environment's folder, now or once it is built; None for ``local``.
        ready: Whether it is built.
        python_version: Its Python's version, if known.
        warnings: Warnings for users, such as conda packages that are skipped.
    """

    manager: EnvironmentManagerName
    description: str
    key: str | None = None
    location: Path | None = None
    ready: bool = True
    python_version: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedEnvironment:
    """An environment that commands can run in: a value, which changes nothing in this process.

    Attributes:
        variables: All variables of a command in it: the environment activated, without traces of our own.
        plan: Its plan.
        command_prefix: Arguments before the shell that runs the command; mostly empty.
        reused: Whether it came from the cache.
        token: Identifies this use of a cached environment; ``release_environment`` ends it.
        lock_file: The versions that were installed, if the manager writes them.
    """

    variables: Mapping[str, str]
    plan: EnvironmentPlan
    command_prefix: tuple[str, ...] = ()
    reused: bool = True
    token: str | None = None
    lock_file: Path | None = None


class EnvironmentManager(Protocol):
    """Prepares the environment that a project asks for."""

    def plan(self, project: Project) -> EnvironmentPlan:
        """Determines the environment without building it or using the network.

        Raises:
            EnvironmentBuildError: An environment file is missing or malformed, or no Python matches.
        """

    def prepare(
        self,
        project: Project,
        plan: EnvironmentPlan,
        report: Callable[[str], None],
        stop: StopSignal,
        *,
        rebuild: bool = False,
    ) -> PreparedEnvironment:
        """Returns the environment and builds it first if necessary; concurrent processes build it once.

        A cached environment is protected from removal until it is passed to ``release_environment`` or this process
        exits.

        Args:
            project: The project.
            plan: The result of ``plan`` for it.
            report: Receives each line of the build's output, without its newline, from any thread.
            stop: Interrupts the build, which then removes what it has written.
            rebuild: True builds the environment even if it is cached.

        Raises:
            EnvironmentBuildError: The build failed (the message has its last output) or was stopped.
        """
