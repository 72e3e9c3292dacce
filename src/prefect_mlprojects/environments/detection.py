"""Which environment manager makes a project's environment."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from typing_extensions import assert_never

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import (
    CondaEnvironment,
    DockerEnvironment,
    NoEnvironment,
    Project,
    ProjectEnvironment,
    PythonEnvironment,
)
from prefect_mlprojects.types import EnvironmentManagerName

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


def uv_lock_of(project: Project) -> Path | None:
    """The ``uv.lock`` that decides the project's environment.

    It does when the project has it beside a ``pyproject.toml``, and no environment file.

    Returns:
        The lock file's path, or None.
    """
    if not isinstance(project.environment, NoEnvironment):
        return None
    lock = project.directory / "uv.lock"
    return lock if lock.is_file() and (project.directory / "pyproject.toml").is_file() else None
