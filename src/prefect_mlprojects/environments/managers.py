"""The environment managers, and the only module of this package that other layers need to call."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from typing_extensions import assert_never

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.environments.activation import local_variables, own_environment
from prefect_mlprojects.environments.base import EnvironmentManager, EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.environments.building import PIN
from prefect_mlprojects.environments.cache import release_pin
from prefect_mlprojects.environments.conda.manager import CondaManager
from prefect_mlprojects.environments.conda.specification import check_conda_environment
from prefect_mlprojects.environments.python.manager import VirtualEnvironmentManager
from prefect_mlprojects.environments.python.specification import read_contents
from prefect_mlprojects.exceptions import EnvironmentBuildError, Problem
from prefect_mlprojects.spec.project import (
    CondaEnvironment,
    DockerEnvironment,
    NoEnvironment,
    Project,
    ProjectEnvironment,
    PythonEnvironment,
)
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal

MANAGER_NAMES: tuple[EnvironmentManagerName, ...] = get_args(EnvironmentManagerName)
"""The environment managers, in the order in which messages list them."""


def choose_manager(project: Project, requested: str | None = None) -> EnvironmentManagerName:
    """Chooses the environment manager as ``mlflow run`` does, except that a Python environment is made by uv.

    A project without any environment file gets an empty environment of the Python that runs this package (or, with a
    ``pyproject.toml`` and a ``uv.lock``, the locked one): MLflow, too, takes it for a Python project. For a Docker
    project the container is the environment, whatever was requested, so it gets ``local``.

    Args:
        project: The project.
        requested: What ``env_manager`` or ``--env-manager`` says; None to choose.

    Returns:
        The manager's name.

    Raises:
        EnvironmentBuildError: No manager has that name, or it can't make this kind of environment.
    """
    name = None if requested is None else _checked_name(requested)
    environment = project.environment
    if isinstance(environment, DockerEnvironment):
        return "local"
    if name is None:
        return _default_manager(environment)
    if name == "conda" and not isinstance(environment, CondaEnvironment):
        what = environment.file.name if isinstance(environment, PythonEnvironment) else "no conda environment file"
        raise EnvironmentBuildError(
            f"Project '{project.display_name}' can't be run with --env-manager conda: it has {what}, and conda only "
            "makes environments from a conda.yaml. Use --env-manager uv, virtualenv or local, or give the project a "
            "conda_env.",
            manager="conda",
        )
    return name


def _checked_name(requested: str) -> EnvironmentManagerName:
    for name in MANAGER_NAMES:
        if requested == name:
            return name
    near = nearest(requested.lower(), MANAGER_NAMES)
    raise EnvironmentBuildError(
        f"There is no environment manager {requested!r}; there are {', '.join(MANAGER_NAMES)}."
        + (f" Did you mean {near!r}?" if near else ""),
        manager=requested,
    )


def _default_manager(environment: ProjectEnvironment) -> EnvironmentManagerName:
    match environment:
        case PythonEnvironment() | NoEnvironment():
            return "uv"
        case CondaEnvironment():
            return "conda"
        case DockerEnvironment():
            return "local"
        case _:
            assert_never(environment)


def check_environment(project: Project) -> tuple[Problem, ...]:
    """Checks the files that describe a project's environment.

    Returns:
        Everything that is wrong with the files; nothing for a Docker project.
    """
    if isinstance(project.environment, DockerEnvironment):
        return ()
    if isinstance(project.environment, CondaEnvironment):
        return check_conda_environment(project)
    contents = read_contents(project, "uv")
    return contents if isinstance(contents, tuple) else ()


def environment_manager(name: EnvironmentManagerName) -> EnvironmentManager:
    """The environment manager of a name; ``choose_manager`` chooses the name.

    Returns:
        The manager.
    """
    match name:
        case "local":
            return LocalManager()
        case "uv" | "virtualenv":
            return VirtualEnvironmentManager(name)
        case "conda":
            return CondaManager()
        case _:
            assert_never(name)


def release_environment(environment: PreparedEnvironment) -> None:
    """Tells that a run no longer uses its environment, so that ``mlprojects env prune`` may remove it.

    Call it in the process that prepared it; doing so twice does nothing. An environment that is never released is kept
    until the process ends.

    Args:
        environment: What a manager's ``prepare`` returned.
    """
    token = environment.facts.get(PIN)
    if token is not None:
        release_pin(token)


@dataclass(frozen=True)
class LocalManager:
    """Uses the environment of the caller as it is, like ``mlflow run --env-manager local``; an ``EnvironmentManager``.

    ``python`` is the one that PATH finds, not necessarily the one that runs this package: mlprojects may be installed
    as a tool of its own, apart from the environment that the user works in. Where PATH has no ``python`` at all, the
    folder of the one that runs this package is put behind it.
    """

    def plan(self, project: Project) -> EnvironmentPlan:  # noqa: ARG002 - the contract's signature
        """Describes the caller's environment; see ``EnvironmentManager.plan``. It never fails."""
        variables = _variables(os.environ)
        python = shutil.which("python", path=variables["PATH"])
        if python is None:
            return EnvironmentPlan("local", "local, no python on PATH")
        own = own_environment()
        warnings: tuple[str, ...] = ()
        if own is not None and not _is_own(Path(python), own):
            warnings = (
                f"local: the project runs with {python}, the first python on PATH, not with {sys.executable}, which "
                f"runs mlprojects; activate {own} to change that",
            )
        version = "{}.{}.{}".format(*sys.version_info[:3]) if _is_running(Path(python)) else None
        return EnvironmentPlan(
            "local",
            f"local, {'Python ' + version + ' at ' if version else ''}{python}",
            python_version=version,
            warnings=warnings,
        )

    def prepare(
        self,
        project: Project,  # noqa: ARG002 - the contract's signature
        plan: EnvironmentPlan,
        report: Callable[[str], None],  # noqa: ARG002 - the contract's signature
        stop: StopSignal,  # noqa: ARG002 - the contract's signature
        *,
        rebuild: bool = False,  # noqa: ARG002 - the contract's signature
    ) -> PreparedEnvironment:
        """Returns the caller's environment; see ``EnvironmentManager.prepare``. It never fails."""
        return PreparedEnvironment(_variables(os.environ), plan)


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    variables = local_variables(environ)
    path = variables.get("PATH") or os.defpath
    if shutil.which("python", path=path) is None and sys.executable:
        path = os.pathsep.join((path, str(Path(sys.executable).parent)))
    variables["PATH"] = path
    return variables


def _is_own(python: Path, own: Path) -> bool:
    return os.path.realpath(python.parent) == os.path.realpath(own / "bin")


def _is_running(python: Path) -> bool:
    own = own_environment()
    if own is not None:
        return _is_own(python, own)
    return os.path.realpath(python) == os.path.realpath(sys.executable)
