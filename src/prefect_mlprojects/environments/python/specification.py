"""Reads what decides the content of a virtual environment into its specification, with its cache key."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from prefect_mlprojects.environments.python.files import (
    LockedPackage,
    PythonSpec,
    is_python_request,
    read_conda_env,
    read_lock,
    read_python_env,
    uv_lock_of,
)
from prefect_mlprojects.environments.python.installers import deciding_settings
from prefect_mlprojects.environments.python.interpreters import (
    Interpreter,
    current_interpreter,
    find_interpreter,
    interpreter_allowed,
    list_interpreters,
)
from prefect_mlprojects.environments.python.requirements import (
    RequirementSet,
    digest_metadata,
    digest_package,
    digest_text,
    expand_requirements,
)
from prefect_mlprojects.exceptions import EnvironmentBuildError, Problem
from prefect_mlprojects.spec.project import CondaEnvironment, Project, PythonEnvironment

VenvManagerName: TypeAlias = Literal["uv", "virtualenv"]

KEY_VERSION = "1"
"""Part of every key; raised when environments are built otherwise than before."""


@dataclass(frozen=True)
class LockedProject:
    """A project that its ``uv.lock`` describes.

    Attributes:
        file: The lock file.
        packages: The packages in it whose code lies in the project.
    """

    file: Path
    packages: tuple[LockedPackage, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What an environment is to hold, whichever Python it has.

    Attributes:
        python: The wanted Python, as ``find_interpreter`` takes it.
        python_place: Where that is written, for messages.
        build: What is installed first.
        run: What is installed then.
        locked: The lock that says what is installed, in place of the two; None without one.
        source: The file it comes from, for people to read; None without one.
        warnings: What people should know.
    """

    python: str | None
    python_place: str
    build: RequirementSet = field(default_factory=RequirementSet)
    run: RequirementSet = field(default_factory=RequirementSet)
    locked: LockedProject | None = None
    source: Path | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what an environment holds.

    Attributes:
        manager: Who makes it.
        project: The project it is for.
        contents: What it is to hold.
        python_version: Its Python's version.
        interpreter: The Python it is made from; None when that must be downloaded first.
        key: The content hash that names it.
    """

    manager: VenvManagerName
    project: Project
    contents: Contents
    python_version: str
    interpreter: Interpreter | None
    key: str

    @property
    def description(self) -> str:
        """The environment in a few words."""
        contents = self.contents
        if contents.locked is not None:
            what = f"locked by {contents.locked.file.name}"
        else:
            count = contents.build.count + contents.run.count
            what = f"{count} requirement{'' if count == 1 else 's'}" if count else "nothing installed"
            what += f" ({contents.source.name})" if contents.source is not None else ""
        return f"{self.manager}, Python {self.python_version}, {what}"


def read_contents(project: Project, manager: VenvManagerName) -> Contents | tuple[Problem, ...]:
    """Reads what a project's environment is to hold.

    Returns:
        The contents, or everything that is wrong with the files.
    """
    environment = project.environment
    if isinstance(environment, PythonEnvironment):
        spec = read_python_env(environment.file)
    elif isinstance(environment, CondaEnvironment):
        spec = read_conda_env(environment.file, manager)
    else:
        lock = uv_lock_of(project)
        if lock is not None and manager == "uv":
            return _locked_contents(project, lock)
        warning = f"{manager} does not install from uv.lock; the environment stays empty. Use --env-manager uv."
        spec = PythonSpec(warnings=(warning,) if lock is not None else ())
    if isinstance(spec, tuple):
        return spec
    build = expand_requirements(spec.build_dependencies, spec.source, project.directory)
    run = expand_requirements(spec.dependencies, spec.source, project.directory)
    if isinstance(build, tuple) or isinstance(run, tuple):
        return (*(build if isinstance(build, tuple) else ()), *(run if isinstance(run, tuple) else ()))
    place = f"{spec.source}:{spec.python_line}" if spec.source is not None and spec.python_line else "the project"
    return Contents(spec.python, place, build, run, source=spec.source, warnings=spec.warnings)


def _locked_contents(project: Project, lock: Path) -> Contents | tuple[Problem, ...]:
    found = read_lock(lock)
    if isinstance(found, Problem):
        return (found,)
    requires, packages = found
    python, place = requires, str(lock)
    if requires is not None and interpreter_allowed(requires, current_interpreter().version):
        python = None
    try:
        named = (project.directory / ".python-version").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        named = []
    if named and is_python_request(named[0]):
        python, place = named[0], str(project.directory / ".python-version")
    return Contents(python, place, locked=LockedProject(lock, packages), source=lock)


def make_recipe(
    project: Project, manager: VenvManagerName, environ: Mapping[str, str], cache_directory: Path
) -> Recipe:
    """Finds out everything that decides what a project's environment holds.

    Returns:
        The recipe.

    Raises:
        EnvironmentBuildError: A file is missing or malformed, or there is no fitting Python and none that uv could
            download.
    """
    contents = read_contents(project, manager)
    if isinstance(contents, tuple):
        raise EnvironmentBuildError(_describe_problems(project, contents), manager=manager)
    probes = cache_directory / "interpreters.json"
    interpreter = find_interpreter(contents.python, environ, probes)
    if interpreter is not None:
        version = interpreter.version
    else:
        from prefect_mlprojects.environments.python.installers import downloadable_version

        assert contents.python is not None
        downloadable = downloadable_version(contents.python, environ)
        if downloadable is None:
            raise EnvironmentBuildError(no_python_message(contents, environ, probes), manager=manager)
        version = downloadable
    return Recipe(manager, project, contents, version, interpreter, _key(manager, project, contents, version, environ))


def _key(
    manager: VenvManagerName, project: Project, contents: Contents, version: str, environ: Mapping[str, str]
) -> str:
    facts = [
        KEY_VERSION,
        manager,
        f"cpython {version}",
        _platform(),
        "build",
        *contents.build.facts,
        "run",
        *contents.run.facts,
    ]
    if contents.locked is not None:
        facts.append(f"lock {contents.locked.file.read_bytes().decode('utf-8', 'surrogateescape')}")
        facts.append(f"project {digest_metadata(project.directory)}")
        installed = (package for package in contents.locked.packages if package.installed)
        facts.extend(f"{package.name} {digest_package(package.path)}" for package in installed)
    facts.append("settings")
    facts.extend(deciding_settings(environ, manager, project.directory))
    return digest_text(facts)


def _platform() -> str:
    try:
        libc = (os.confstr("CS_GNU_LIBC_VERSION") or "").split(" ")[0] if sys.platform == "linux" else ""
    except (ValueError, OSError):
        libc = "other"
    return f"{sys.platform}-{platform.machine()}-{libc}"


def _describe_problems(project: Project, problems: tuple[Problem, ...]) -> str:
    headline = f"The environment of project '{project.display_name}' can't be made"
    if len(problems) == 1:
        return f"{headline}: {problems[0]}"
    return "\n".join([f"{headline}:", *(f"  - {problem}" for problem in problems)])


def no_python_message(contents: Contents, environ: Mapping[str, str], probes: Path) -> str:
    """What to say when there is no Python that a project wants."""
    found = ", ".join(str(interpreter) for interpreter in list_interpreters(environ, probes))
    wanted = contents.python or ""
    install = wanted if wanted[:1].isdigit() else f"'{wanted}'"
    return (
        f"There is no Python {wanted}, which {contents.python_place} asks for. Found: {found}. "
        f"Install it with 'uv python install {install}' or 'pyenv install {install}', put it on PATH, or ask for "
        "another version."
    )
