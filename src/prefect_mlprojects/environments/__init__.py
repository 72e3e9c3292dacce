"""Environments: a project's environment files -> a prepared environment. The contract of the managers, and their common part."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from prefect_mlprojects.environments.cache import (
    EnvironmentCache,
    EnvironmentRecord,
    Report,
    cache_errors,
    disk_full_message,
    last_output,
    release_pin,
    stopped_error,
    user_cache,
)
from prefect_mlprojects.exceptions import EnvironmentBuildError, InvalidEnvironmentError, Problem
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal


@dataclass(frozen=True)
class EnvironmentPlan:
    """The environment that a project will get, determined without building it; ``local`` has no key and location."""

    manager: EnvironmentManagerName
    description: str  # for people to read: "uv, Python 3.11.7, 3 requirements"
    key: str | None = None  # the cache key
    location: Path | None = None  # its folder, now or once it is built
    ready: bool = True  # whether it is built
    python_version: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedEnvironment:
    """An environment that commands can run in: a value, which changes nothing in this process."""

    variables: Mapping[str, str]  # all of a command's: the environment activated, without traces of our own
    plan: EnvironmentPlan
    command_prefix: tuple[str, ...] = ()  # arguments before the shell that runs the command
    reused: bool = True  # whether it came from the cache
    token: str | None = None  # identifies this use of a cached environment; ``release_environment`` ends it


class EnvironmentManager(Protocol):
    """Prepares the environment that a project asks for."""

    def plan(self, project: Project) -> EnvironmentPlan:
        """Determines the environment without building it or using the network.

        Raises:
            EnvironmentBuildError: An environment file is missing or malformed, or no Python matches.
        """

    def prepare(
        self, project: Project, plan: EnvironmentPlan, report: Report, stop: StopSignal, *, rebuild: bool = False
    ) -> PreparedEnvironment:
        """Returns the environment and builds it first if necessary; concurrent processes build it once.

        A cached environment is protected from removal until it is passed to ``release_environment`` or this process
        exits. `report` receives each line of the build's output, from any thread. `stop` interrupts the build, which then
        removes what it has written.

        Raises:
            EnvironmentBuildError: The build failed (the message has its last output) or was stopped.
        """


_DISK_FULL = ("No space left on device", "os error 28", "Disk quota exceeded")


@dataclass(frozen=True)
class Specification(ABC):
    """An environment specification: all that determines the content of a prepared environment."""

    project: Project
    key: str
    sources: object = field(repr=False)  # the content of the files that the installer reads; compared after a build
    private: bool  # whether it holds passwords, which installers may write into the environment
    python_version: str | None  # None if the specification does not determine it
    warnings: tuple[str, ...]

    @abstractmethod
    def describe(self, python_version: str | None) -> str:
        """Describes the environment in a few words; `python_version` is that of a finished build, else None."""


SpecificationT = TypeVar("SpecificationT", bound=Specification)


@dataclass(frozen=True)
class Build:
    """A build in progress in `location`, which does not exist at first; `cache` is the cache directory."""

    manager: EnvironmentManagerName
    project: Project
    location: Path
    cache: Path
    report: Report
    stop: StopSignal

    def failure(self, cause: str, output: tuple[str, ...] = ()) -> EnvironmentBuildError:
        """The error of this build, with the last `output` of a tool and advice if the disk is full."""
        kind = "conda environment" if self.manager == "conda" else "environment"
        message = f"The {kind} of project '{self.project.display_name}' can't be built: {cause}"
        if any(sign in line for line in (cause, *output) for sign in _DISK_FULL):
            message += "\n" + disk_full_message(self.cache)
        message += last_output(output)
        return EnvironmentBuildError(message, manager=self.manager, output_tail=output or cause.splitlines()[-10:])

    def check_stop(self) -> None:
        """Raises an ``EnvironmentBuildError`` once a stop was requested."""
        if self.stop.requested:
            raise stopped_error(self.manager, self.stop)


class CachingManager(ABC, Generic[SpecificationT]):
    """An ``EnvironmentManager`` that builds environments in the cache."""

    name: EnvironmentManagerName

    @abstractmethod
    def specify(self, project: Project, cache: Path) -> SpecificationT:
        """Reads the environment specification; raises an ``EnvironmentBuildError`` if it is malformed."""

    def check(self, specification: SpecificationT) -> None:
        """Checks a specification before its first build; raises an ``EnvironmentBuildError``."""

    @abstractmethod
    def build(self, build: Build, specification: SpecificationT) -> str:
        """Builds the environment and returns its Python version, or "" without Python."""

    @abstractmethod
    def activate(self, location: Path, report: Report, stop: StopSignal) -> Mapping[str, str]:
        """Returns the variables of a command in the environment."""

    def plan(self, project: Project) -> EnvironmentPlan:
        """Implements ``EnvironmentManager.plan``."""
        cache = user_cache()
        specification = self.specify(project, cache.root)
        plan = self._plan(specification, cache)
        if not plan.ready:
            self.check(specification)
        return plan

    def prepare(
        self, project: Project, plan: EnvironmentPlan, report: Report, stop: StopSignal, *, rebuild: bool = False
    ) -> PreparedEnvironment:
        """Implements ``EnvironmentManager.prepare``."""
        cache, token = user_cache(), uuid.uuid4().hex
        record = cache.use(plan.key, token) if plan.key is not None and not rebuild else None
        reused = record is not None
        if record is None:
            if stop.requested:
                raise stopped_error(self.name, stop)
            # The project's files may have changed since they were planned; the build must match its key.
            specification = self.specify(project, cache.root)
            record, reused = self._obtain(specification, cache, token, report, stop, rebuild=rebuild)
            plan = self._plan(specification, cache)
        location = cache.location(record)
        try:
            variables = self.activate(location, report, stop)
        except BaseException:
            release_pin(token)
            raise
        plan = replace(plan, location=location, ready=True, python_version=record.python_version or None)
        return PreparedEnvironment(variables, plan, (), reused, token)

    def _obtain(
        self,
        found: SpecificationT,
        cache: EnvironmentCache,
        token: str,
        report: Report,
        stop: StopSignal,
        *,
        rebuild: bool,
    ) -> tuple[EnvironmentRecord, bool]:
        """Uses the environment, built under its lock; returns its record and whether it was built before."""
        before = cache.read(found.key)
        with cache.lock(found.key, self.name, report, stop):
            record = cache.use(found.key, token)
            # Another process may have built or rebuilt it while this one waited.
            if record is not None and (not rebuild or record != before):
                return record, True
            record = cache.use(self._build(found, cache, report, stop).key, token)
        if record is None:
            folder = cache.folder / found.key
            message = f"The environment in {folder} vanished right after it was built; was the cache folder emptied?"
            raise EnvironmentBuildError(message, manager=self.name)
        return record, False

    def _build(
        self, specification: SpecificationT, cache: EnvironmentCache, report: Report, stop: StopSignal
    ) -> EnvironmentRecord:
        key, project = specification.key, specification.project
        report(f"Building an environment: {specification.describe(None)}")
        with cache_errors(cache.root, self.name):
            location = cache.begin(key, private=specification.private)
        try:
            version = self.build(Build(self.name, project, location, cache.root, report, stop), specification)
            if self.specify(project, cache.root).sources != specification.sources:
                name = f"The requirements of project '{project.display_name}'"
                message = f"{name} changed while its environment was built from them. Run it again."
                raise EnvironmentBuildError(message, manager=self.name)
            build, description = int(location.name), specification.describe(version)
            record = EnvironmentRecord(key, build, self.name, description, version, project=project.display_name)
            with cache_errors(cache.root, self.name):
                return cache.complete(record)
        except BaseException:
            cache.abandon(key, location)
            raise

    def _plan(self, specification: SpecificationT, cache: EnvironmentCache) -> EnvironmentPlan:
        key, warnings = specification.key, specification.warnings
        record = cache.find(key)
        location = cache.next_location(key) if record is None else cache.location(record)
        built = None if record is None else record.python_version or None
        python = specification.python_version if record is None else built
        description, ready = specification.describe(built), record is not None
        return EnvironmentPlan(self.name, description, key, location, ready, python, warnings)


def problems_error(project: Project, problems: tuple[Problem, ...], manager: str) -> EnvironmentBuildError:
    """The error of malformed environment files."""
    headline = f"The environment of project '{project.display_name}' can't be made:"
    listed = f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
    return InvalidEnvironmentError(headline + listed, manager=manager)
