"""Virtual environments: the specification of one, and the managers that build it with uv or with virtualenv and pip."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from prefect_mlprojects.environments import Build, CachingManager, Specification, problems_error
from prefect_mlprojects.environments.activation import activated_variables, own_environment
from prefect_mlprojects.environments.cache import Report
from prefect_mlprojects.environments.python import files, installers, interpreters
from prefect_mlprojects.environments.python.declared import read_declared, usable_range
from prefect_mlprojects.environments.python.requirements import Installer, RequirementSet, expand_requirements
from prefect_mlprojects.exceptions import EnvironmentBuildError, Problem
from prefect_mlprojects.spec.project import CondaEnvironment, Project, PythonEnvironment
from prefect_mlprojects.types import StopSignal

VenvManagerName: TypeAlias = Literal["uv", "virtualenv"]

KEY_VERSION = "1"  # part of every cache key; raised when the same specification is built differently than before
_PROBES = "interpreters.json"  # in the cache directory


@dataclass(frozen=True)
class Contents:
    """The content of a project's environment files; the requirements of `build` are installed before those of `run`."""

    python: str | None  # the requested Python, as ``find_interpreter`` takes it
    python_range: str | None  # acceptable versions on a machine that can't have that one
    python_source: str  # the file and line that request it, for messages
    build: RequirementSet = field(default_factory=RequirementSet)
    run: RequirementSet = field(default_factory=RequirementSet)
    locked: tuple[files.LockedPackage, ...] | None = None  # the local packages of a ``uv.lock``, if it is installed
    source: Path | None = None  # the file, for people to read
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PythonSpecification(Specification):
    """The environment specification of a virtual environment; `interpreter` is None if uv must download it first."""

    manager: VenvManagerName
    contents: Contents
    interpreter: interpreters.Interpreter | None

    def describe(self, python_version: str | None) -> str:
        """Describes the environment in a few words."""
        contents = self.contents
        count = contents.build.count + contents.run.count
        content = f"{count} requirement{'' if count == 1 else 's'}" if count else "nothing installed"
        if contents.source is not None:
            file = contents.source.name
            content = f"{content} ({file})" if contents.locked is None else f"locked by {file}"
        download = "; uv will download this Python" if self.interpreter is None and python_version is None else ""
        return f"{self.manager}, Python {self.python_version}, {content}{download}"


def read_contents(project: Project, manager: VenvManagerName) -> Contents | tuple[Problem, ...]:
    """Reads a project's environment files."""
    environment = project.environment
    if problem := files.outside_problem(project):
        return (problem,)
    lock = files.uv_lock_of(project)
    if lock is not None and manager == "uv":
        return _locked_contents(project, lock)
    if isinstance(environment, PythonEnvironment):
        spec = read_declared(environment.file, project)
    elif isinstance(environment, CondaEnvironment):
        spec = files.read_conda_env(environment.file, manager)
    else:
        warning = f"{manager} does not install from uv.lock; the environment stays empty. Use --env-manager uv."
        spec = files.PythonSpec(warnings=(warning,) if lock is not None else ())
    if isinstance(spec, tuple):
        return spec
    installer: Installer = "uv" if manager == "uv" else "pip"
    build = expand_requirements(spec.build_dependencies, spec.source, project, installer)
    run = expand_requirements(spec.dependencies, spec.source, project, installer)
    if isinstance(build, tuple) or isinstance(run, tuple):
        return tuple(problem for found in (build, run) if isinstance(found, tuple) for problem in found)
    source = f"{spec.source}:{spec.python_line}" if spec.source is not None and spec.python_line else "the project"
    return Contents(spec.python, spec.python_range, source, build, run, source=spec.source, warnings=spec.warnings)


def _locked_contents(project: Project, lock: Path) -> Contents | tuple[Problem, ...]:
    found = files.read_lock(lock, project)
    if isinstance(found, Problem):
        return (found,)
    python, source, packages = usable_range(found[0]), str(lock), found[1]
    if (pinned := pinned_python(project)) is not None:
        python, source = pinned, str(project.directory / ".python-version")
    return Contents(python, None, source, locked=packages, source=lock)


def pinned_python(project: Project) -> str | None:
    """Returns the Python that a project's ``.python-version`` requests; None without one."""
    file = project.directory / ".python-version"
    text = files.read_text(file) if project.allows(file) else None
    return next(filter(files.is_python_request, text.split()[:1]), None) if isinstance(text, str) else None


def read_specification(
    project: Project, manager: VenvManagerName, environ: Mapping[str, str], cache: Path
) -> PythonSpecification:
    """Reads a project's environment files and finds its interpreter; raises an ``EnvironmentBuildError``."""
    contents = read_contents(project, manager)
    if isinstance(contents, tuple):
        raise problems_error(project, contents, manager)
    for request in _python_requests(contents):
        interpreter = interpreters.find_interpreter(request, environ, cache / _PROBES)
        version = interpreter.version if interpreter else installers.downloadable_version(request or "", environ)
        if version is not None:
            break
    else:
        raise EnvironmentBuildError(_no_python_message(contents, environ, cache), manager=manager)
    key, warnings = _key(manager, project, contents, version, environ), contents.warnings
    sources = contents.build.text_inputs, contents.run.text_inputs
    private = contents.build.private or contents.run.private or bool(installers.index_credentials(environ))
    return PythonSpecification(project, key, sources, private, version, warnings, manager, contents, interpreter)


def _python_requests(contents: Contents) -> Iterator[str | None]:
    """Yields what to look for: the Python itself, then in the range one of the same minor version, then any."""
    yield contents.python
    if contents.python is not None and contents.python_range is not None:
        yield f"{contents.python_range},=={'.'.join(contents.python.split('.')[:2])}.*"
        yield contents.python_range


def _key(
    manager: VenvManagerName, project: Project, contents: Contents, version: str, environ: Mapping[str, str]
) -> str:
    texts = [
        *(KEY_VERSION, manager, f"cpython {version}", f"{sys.platform}-{platform.machine()}-{libc_family()}"),
        *("build", *contents.build.key_inputs, "run", *contents.run.key_inputs),
    ]
    texts += files.digest_credentials((*contents.build.credentials, *contents.run.credentials))
    if contents.locked is not None and contents.source is not None:
        texts.append(f"lock {contents.source.read_bytes().decode('utf-8', 'surrogateescape')}")
        texts.append(f"project {files.digest_metadata(project.directory)}")
        installed = (package for package in contents.locked if package.installed)
        texts.extend(f"{package.name} {files.digest_package(package.path)}" for package in installed)
    return files.digest_text([*texts, "settings", *installers.key_settings(environ, manager, project.directory)])


def libc_family() -> str:
    """Returns the C library's name on Linux ("glibc"), for cache keys."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").split(" ")[0] if sys.platform == "linux" else ""
    except (ValueError, OSError):
        return "other"


def _no_python_message(contents: Contents, environ: Mapping[str, str], cache: Path) -> str:
    found = ", ".join(map(str, interpreters.list_interpreters(environ, cache / _PROBES)))
    wanted = contents.python or ""
    install = wanted if wanted[:1].isdigit() else f"'{wanted}'"
    return (
        f"There is no Python {wanted}, which {contents.python_source} asks for. Found: {found}. "
        f"{_nearest_python(wanted, environ, cache)}"
        f"Install it with 'uv python install {install}' or 'pyenv install {install}', put it on PATH, or ask for "
        "another version."
    )


def _nearest_python(wanted: str, environ: Mapping[str, str], cache: Path) -> str:
    """Returns a sentence that offers the Python of the same minor version, or of the nearest, that can be had."""
    match = re.search(r"(\d+)\.(\d+)", wanted)
    if match is None:
        return ""
    major, minor = int(match[1]), int(match[2])
    known = interpreters.list_interpreters(environ, cache / _PROBES)
    found = min(known, key=lambda each: (abs(each.parts[0] - major), abs(each.parts[1] - minor)))
    found = interpreters.find_interpreter(match[0], environ, cache / _PROBES) or found
    version, nearest = found.version, str(found)
    is_other = found.parts[:2] != (major, minor)
    if is_other and (download := installers.downloadable_version(match[0], environ)) is not None:
        version, nearest = download, f"{download}, which uv downloads"
    return f"The nearest that can be had is {nearest}: write {version} or {version.rpartition('.')[0]} instead. "


@dataclass(frozen=True)
class VirtualEnvironmentManager(CachingManager[PythonSpecification]):
    """Builds virtual environments with uv, or with virtualenv and pip."""

    name: VenvManagerName

    def specify(self, project: Project, cache: Path) -> PythonSpecification:
        """Implements ``CachingManager.specify``."""
        return read_specification(project, self.name, os.environ, cache)

    def activate(self, location: Path, report: Report, stop: StopSignal) -> Mapping[str, str]:  # noqa: ARG002
        """Implements ``CachingManager.activate``."""
        return activated_variables(os.environ, location, own_environment())

    def build(self, build: Build, specification: PythonSpecification) -> str:
        """Implements ``CachingManager.build``."""
        interpreter = specification.interpreter or _download(build, specification)
        install = installers.build_with_uv if self.name == "uv" else installers.build_with_virtualenv
        install(build, specification, interpreter, self.activate(build.location, build.report, build.stop))
        return str(specification.python_version)


def _download(build: Build, specification: PythonSpecification) -> interpreters.Interpreter:
    version = str(specification.python_version)
    build.report(f"Python {version} is not on this machine; uv downloads it")
    result = installers.download_python(version, os.environ, build.report, build.stop)
    build.check_stop()
    interpreter = interpreters.find_interpreter(version, os.environ, build.cache / _PROBES)
    if interpreter is None:
        message = _no_python_message(specification.contents, os.environ, build.cache)
        raise build.failure(f"{message}\nuv could not download it (exit code {result.exit_code}).", result.output_tail)
    return interpreter
