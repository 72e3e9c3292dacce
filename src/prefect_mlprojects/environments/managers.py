"""Selects the environment manager of a project; also the manager of the caller's own environment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from typing_extensions import assert_never

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.environments import EnvironmentManager, EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.environments.activation import local_variables, own_environment
from prefect_mlprojects.environments.cache import release_pin
from prefect_mlprojects.environments.conda import CondaManager, check_conda_environment
from prefect_mlprojects.environments.python import VirtualEnvironmentManager, read_contents
from prefect_mlprojects.exceptions import EnvironmentBuildError, Problem
from prefect_mlprojects.settings import default_env_manager
from prefect_mlprojects.spec.project import CondaEnvironment, DockerEnvironment, Project, PythonEnvironment
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal

MANAGER_NAMES: tuple[EnvironmentManagerName, ...] = get_args(EnvironmentManagerName)
"""The environment managers, in the order of messages."""


def choose_manager(project: Project, requested: str | None = None) -> EnvironmentManagerName:
    """Selects the environment manager as ``mlflow run`` does, except that uv builds Python environments.

    A project without an environment file gets an empty environment of the running Python (or, with ``pyproject.toml``
    and ``uv.lock``, the locked one): MLflow, too, treats it as a Python project. A Docker project gets ``local``, whatever
    was `requested` by ``env_manager``: the container is its environment.

    The default one, which a nested run inherits from the run that it is part of, counts where it fits the project.

    Raises:
        EnvironmentBuildError: The requested manager is unknown or can't build this kind of environment.
    """
    inherited = default_env_manager() if requested is None else None
    if inherited != "conda" or isinstance(project.environment, CondaEnvironment):
        requested = requested if inherited is None else inherited
    name = next((name for name in MANAGER_NAMES if name == requested), None)
    if requested is not None and name is None:
        near = nearest(requested.lower(), MANAGER_NAMES)
        raise EnvironmentBuildError(
            f"There is no environment manager {requested!r}; there are {', '.join(MANAGER_NAMES)}."
            + (f" Did you mean {near!r}?" if near else ""),
            manager=requested,
        )
    environment = project.environment
    if isinstance(environment, DockerEnvironment):
        return "local"
    if name == "conda" and not isinstance(environment, CondaEnvironment):
        what = environment.file.name if isinstance(environment, PythonEnvironment) else "no conda environment file"
        raise EnvironmentBuildError(
            f"Project '{project.display_name}' can't be run with --env-manager conda: it has {what}, and conda only "
            "makes environments from a conda.yaml. Use --env-manager uv, virtualenv or local, or give the project a "
            "conda_env.",
            manager="conda",
        )
    return name or ("conda" if isinstance(environment, CondaEnvironment) else "uv")


def check_environment(project: Project) -> tuple[Problem, ...]:
    """Returns the problems of a project's environment files; none for a Docker project."""
    if isinstance(project.environment, DockerEnvironment):
        return ()
    if isinstance(project.environment, CondaEnvironment):
        return check_conda_environment(project)
    contents = read_contents(project, "uv")
    return contents if isinstance(contents, tuple) else ()


def environment_manager(name: EnvironmentManagerName) -> EnvironmentManager:
    """Returns the environment manager with a name."""
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
    """Ends a run's use of its environment, so that ``mlprojects env prune`` may remove it. Idempotent.

    Only the process that prepared it can release it; otherwise it is in use until that process exits.
    """
    if environment.token is not None:
        release_pin(environment.token)


@dataclass(frozen=True)
class LocalManager:
    """Uses the caller's environment unchanged, like ``mlflow run --env-manager local``; an ``EnvironmentManager``.

    ``python`` is the one on PATH, not necessarily the one that runs this package: mlprojects may be installed as a tool
    in another environment. Without any ``python`` on PATH, the folder of our own interpreter is appended to it.
    """

    def plan(self, project: Project) -> EnvironmentPlan:  # noqa: ARG002 - the contract's signature
        """Implements ``EnvironmentManager.plan``. It never fails."""
        python = shutil.which("python", path=_local_variables()["PATH"])
        if python is None:
            return EnvironmentPlan("local", "local, no python on PATH")
        own = own_environment()
        warnings: tuple[str, ...] = ()
        if own is not None:
            is_running = os.path.realpath(Path(python).parent) == os.path.realpath(own / "bin")
            if not is_running:
                warnings = (
                    f"local: the project runs with {python}, the first python on PATH, not with {sys.executable}, which "
                    f"runs mlprojects; activate {own} to change that",
                )
        else:
            is_running = os.path.realpath(python) == os.path.realpath(sys.executable)
        version = "{}.{}.{}".format(*sys.version_info[:3]) if is_running else None
        description = f"local, {'Python ' + version + ' at ' if version else ''}{python}"
        return EnvironmentPlan("local", description, python_version=version, warnings=warnings)

    def prepare(
        self,
        project: Project,  # noqa: ARG002 - the contract's signature
        plan: EnvironmentPlan,
        report: Callable[[str], None],  # noqa: ARG002 - the contract's signature
        stop: StopSignal,  # noqa: ARG002 - the contract's signature
        *,
        rebuild: bool = False,  # noqa: ARG002 - the contract's signature
    ) -> PreparedEnvironment:
        """Implements ``EnvironmentManager.prepare``. It never fails."""
        return PreparedEnvironment(_local_variables(), plan)


def _local_variables() -> dict[str, str]:
    variables = local_variables(os.environ)
    path = variables.get("PATH") or os.defpath
    if shutil.which("python", path=path) is None and sys.executable:
        path = os.pathsep.join((path, str(Path(sys.executable).parent)))
    return variables | {"PATH": path}
