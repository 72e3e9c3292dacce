"""Run any MLflow-Projects project ("MLproject") as a Prefect 3 flow.

Importing this package is cheap: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_mlprojects.backends.contract import Backend
    from prefect_mlprojects.deployments import Deployment, deploy
    from prefect_mlprojects.environments import EnvironmentManager
    from prefect_mlprojects.exceptions import ExecutionException
    from prefect_mlprojects.flows.run_project import run_project
    from prefect_mlprojects.projects import run
    from prefect_mlprojects.runs.handles import LocalSubmittedRun, SubmittedRun
    from prefect_mlprojects.spec import Project, ProjectParameter, load_project
    from prefect_mlprojects.tasks.session import RunResult
    from prefect_mlprojects.types import BackendConfig, DockerArgs, FailureCategory, RunStatus

_NAMES_BY_MODULE = {
    "backends.contract": ("Backend",),
    "deployments": ("Deployment", "deploy"),
    "environments": ("EnvironmentManager",),
    "exceptions": ("ExecutionException",),
    "flows.run_project": ("run_project",),
    "projects": ("run",),
    "spec": ("Project", "ProjectParameter", "load_project"),
    "submitted_run": ("LocalSubmittedRun", "SubmittedRun"),
    "tasks.session": ("RunResult",),
    "types": ("BackendConfig", "DockerArgs", "FailureCategory", "RunStatus"),
}

__all__ = [
    "Backend",
    "BackendConfig",
    "Deployment",
    "DockerArgs",
    "EnvironmentManager",
    "ExecutionException",
    "FailureCategory",
    "LocalSubmittedRun",
    "Project",
    "ProjectParameter",
    "RunResult",
    "RunStatus",
    "SubmittedRun",
    "deploy",
    "load_project",
    "run",
    "run_project",
]


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _NAMES_BY_MODULE.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
