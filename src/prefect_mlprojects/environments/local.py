"""The ``local`` manager: the project runs in the caller's own environment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefect_mlprojects.environments.activation import local_variables, own_environment
from prefect_mlprojects.environments.base import EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import StopSignal


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
