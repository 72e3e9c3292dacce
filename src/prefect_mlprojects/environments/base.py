"""What an environment manager is, and what it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal


@dataclass(frozen=True)
class EnvironmentPlan:
    """The environment that a project will get, found out without building anything.

    Attributes:
        manager: The environment manager that makes it.
        description: For people to read ("uv, Python 3.11.7, 3 requirements").
        key: The content hash that names it in the cache; None for ``local``, which builds nothing.
        location: Where it lies or will lie; None for ``local``.
        ready: Whether it is there already.
        python_version: The Python version it has, as far as it is known.
        warnings: What people should know, such as conda packages that were left out.
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
    """An environment that is ready: a value, which changes nothing in this process.

    Attributes:
        variables: The whole environment of the child: what activation sets, with our own environment's traces removed.
        command_prefix: What stands before the shell that runs the command; mostly empty.
        plan: Which environment it is.
        reused: Whether it was there already.
        facts: What else its manager noted; ``release_environment`` finds there what keeps it from being removed.
    """

    variables: Mapping[str, str]
    plan: EnvironmentPlan
    command_prefix: tuple[str, ...] = ()
    reused: bool = True
    facts: Mapping[str, str] = field(default_factory=dict)


class EnvironmentManager(Protocol):
    """Makes the environment that a project asks for."""

    def plan(self, project: Project) -> EnvironmentPlan:
        """Finds out which environment the project will get; builds nothing and asks no network.

        Raises:
            EnvironmentBuildError: A file that the project names is missing or malformed, or no fitting Python was
                found.
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
        """Returns the environment, building it when it is not there; two processes that want the same build it once.

        Args:
            project: The project.
            plan: What ``plan`` returned for it.
            report: Takes the build's output, a line each (without its newline), from any thread.
            stop: Asks for the end: the build is ended and its leftovers removed.
            rebuild: Builds it even if it is cached.

        Raises:
            EnvironmentBuildError: The build failed, with the last lines it printed, or was stopped.
        """
