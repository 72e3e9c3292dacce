"""What the driver builds for a project's environment: pure reading of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect_mlprojects.backends.databricks.config import DatabricksRequest
from prefect_mlprojects.environments.detection import uv_lock_of
from prefect_mlprojects.environments.fingerprint import digest_metadata, digest_package, digest_text
from prefect_mlprojects.environments.python_files import (
    PythonSpec,
    is_python_request,
    read_conda_env,
    read_lock,
    read_python_env,
)
from prefect_mlprojects.environments.requirements import RequirementSet, expand_requirements
from prefect_mlprojects.exceptions import EnvironmentBuildError, Problem
from prefect_mlprojects.spec.project import CondaEnvironment, NoEnvironment, PythonEnvironment

BUILD_FILE = ".mlprojects-build.txt"
REQUIREMENTS_FILE = ".mlprojects-requirements.txt"


@dataclass(frozen=True)
class DriverEnvironment:
    """An environment that is built on the driver.

    Attributes:
        description: For people to read.
        job: What the bootstrap is told of it.
        files: Further files of the archive, by name.
        warnings: What people should know, such as conda packages that are left out.
    """

    description: str
    job: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def driver_environment(request: DatabricksRequest) -> DriverEnvironment | None:
    """Reads what the driver is to build; None when the command runs in the driver's own Python.

    That it does for a project without an environment file, for a Spark job, and when ``env_manager`` is ``local``.

    Raises:
        EnvironmentBuildError: A file is malformed, names what is not in the project, or the environment manager does not fit.
    """
    project = request.project
    if request.env_manager == "local" or project.databricks_spark_job is not None:
        return None
    if request.env_manager == "conda":
        raise EnvironmentBuildError(
            f"Project '{project.display_name}' can't be run with --env-manager conda on Databricks: its drivers have no conda. "
            "Leave it out, so that uv installs the pip section of the conda.yaml, or use --env-manager local.",
            manager="conda",
        )
    environment = project.environment
    if isinstance(environment, NoEnvironment):
        lock = uv_lock_of(project)
        return _locked(request, lock) if lock is not None and request.env_manager != "virtualenv" else None
    if isinstance(environment, PythonEnvironment):
        spec = read_python_env(environment.file)
    else:
        assert isinstance(environment, CondaEnvironment)  # the backend refuses containers before
        spec = read_conda_env(environment.file, "uv")
    if not isinstance(spec, PythonSpec):
        raise _problems(request, spec)
    build = expand_requirements(spec.build_dependencies, spec.source, project.directory)
    run = expand_requirements(spec.dependencies, spec.source, project.directory)
    if not isinstance(build, RequirementSet) or not isinstance(run, RequirementSet):
        raise _problems(request, tuple(each for part in (build, run) if isinstance(part, tuple) for each in part))
    files = {BUILD_FILE: _lines(request, build), REQUIREMENTS_FILE: _lines(request, run)}
    return DriverEnvironment(
        _description(spec, build.count + run.count),
        {
            "installer": "pip" if request.env_manager == "virtualenv" else "uv",
            "python": spec.python,
            "key": _key(spec, build, run),
            "files": [name for name, content in files.items() if content],
        },
        {name: content for name, content in files.items() if content},
        spec.warnings,
    )


def _description(spec: PythonSpec, count: int) -> str:
    name = spec.source.name if spec.source is not None else "no file"
    python = f"Python {spec.python}" if spec.python else "the driver's Python"
    return f"{python}, {count} requirement{'' if count == 1 else 's'} ({name}), built on the driver"


def _key(spec: PythonSpec, build: RequirementSet, run: RequirementSet) -> str | None:
    if any(package.editable for package in (*build.local_packages, *run.local_packages)):
        # It refers to the unpacked project, which goes when the run ends: the environment can't be kept.
        return None
    return digest_text(["python", spec.python or "", "build", *build.facts, "run", *run.facts])


def _lines(request: DatabricksRequest, requirements: RequirementSet) -> bytes:
    """The requirements file for the archive; what it names must be in the project."""
    lines = list(requirements.lines)
    flags, paths = requirements.arguments[::2], requirements.arguments[1::2]
    for flag, path in zip(flags, paths, strict=True):
        lines.append(f"{flag} {_inside(request, Path(path))}")
    for package in requirements.local_packages:
        _inside(request, package.directory)
    for file in requirements.files:
        _inside(request, file)
    return "".join(f"{line}\n" for line in lines).encode()


def _inside(request: DatabricksRequest, path: Path) -> Path:
    folder = request.project.directory
    if not path.is_relative_to(folder):
        raise EnvironmentBuildError(
            f"The environment of project '{request.project.display_name}' names {path}, which is not in the project's folder and "
            "so does not get to Databricks. Put it into the project.",
            manager="uv",
        )
    return path.relative_to(folder)


def _locked(request: DatabricksRequest, lock: Path) -> DriverEnvironment:
    found = read_lock(lock)
    if isinstance(found, Problem):
        raise _problems(request, (found,))
    requires, packages = found
    folder = request.project.directory
    facts = ["lock", lock.read_bytes().decode("utf-8", "surrogateescape"), digest_metadata(folder)]
    for package in packages:
        _inside(request, package.path)
        if package.installed:
            facts += [package.name, digest_package(package.path)]
    try:
        named = (folder / ".python-version").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        named = []
    python = named[0] if named and is_python_request(named[0]) else requires
    return DriverEnvironment(
        f"Python {python}, locked by {lock.name}, built on the driver",
        {"installer": "uv", "python": python, "key": digest_text([*facts, python or ""]), "locked": True},
    )


def _problems(request: DatabricksRequest, problems: tuple[Problem, ...]) -> EnvironmentBuildError:
    told = "; ".join(str(each) for each in problems)
    return EnvironmentBuildError(
        f"The environment of project '{request.project.display_name}' can't be built: {told}", manager="uv"
    )
