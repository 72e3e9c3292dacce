"""The family of environment managers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import assert_never

from prefect_mlprojects.environments.base import EnvironmentManager, EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.environments.local import LocalManager
from prefect_mlprojects.environments.pins import release_pin
from prefect_mlprojects.environments.virtual import PIN, VirtualEnvironmentManager
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal


def environment_manager(name: EnvironmentManagerName) -> EnvironmentManager:
    """The environment manager of a name; ``choose_manager`` chooses the name.

    Args:
        name: The name.

    Returns:
        The manager.
    """
    match name:
        case "local":
            return LocalManager()
        case "uv" | "virtualenv":
            return VirtualEnvironmentManager(name)
        case "conda":
            return _CondaRefusal()
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
class _CondaRefusal:
    """Says that conda environments can't be built by this version."""

    def plan(self, project: Project) -> EnvironmentPlan:
        raise _conda_error(project)

    def prepare(
        self,
        project: Project,
        plan: EnvironmentPlan,  # noqa: ARG002 - the contract's signature
        report: Callable[[str], None],  # noqa: ARG002 - the contract's signature
        stop: StopSignal,  # noqa: ARG002 - the contract's signature
        *,
        rebuild: bool = False,  # noqa: ARG002 - the contract's signature
    ) -> PreparedEnvironment:
        raise _conda_error(project)


def _conda_error(project: Project) -> EnvironmentBuildError:
    return EnvironmentBuildError(
        f"The conda environment of project '{project.display_name}' can't be built: conda environments can't be built "
        "by this version. With --env-manager uv the project gets the Python version and the pip section of its conda "
        "file; with --env-manager local it runs in your own environment.",
        manager="conda",
    )
