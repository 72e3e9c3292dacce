"""The family of environment managers."""

from __future__ import annotations

from typing_extensions import assert_never

from prefect_mlprojects.environments.base import EnvironmentManager, PreparedEnvironment
from prefect_mlprojects.environments.conda.manager import CondaManager
from prefect_mlprojects.environments.local import LocalManager
from prefect_mlprojects.environments.pins import release_pin
from prefect_mlprojects.environments.provision import PIN
from prefect_mlprojects.environments.virtual import VirtualEnvironmentManager
from prefect_mlprojects.types import EnvironmentManagerName


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
