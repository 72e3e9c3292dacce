"""The ``resolve-env`` task: what the project needs -> an environment that is ready."""

from __future__ import annotations

import asyncio

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_mlprojects.backends.contract import Preparation, PreparingBackend
from prefect_mlprojects.environments.base import PreparedEnvironment
from prefect_mlprojects.environments.managers import environment_manager
from prefect_mlprojects.runs.check import CheckedCall
from prefect_mlprojects.tasks.steps import Step, run_step
from prefect_mlprojects.types import StopSignal


@task(name="resolve-env", cache_policy=NO_CACHE, persist_result=False)
async def resolve_env(checked: CheckedCall, stop: StopSignal) -> PreparedEnvironment | Preparation:
    """Returns what the project needs to run: built when it is not in the cache.

    Args:
        checked: The call.
        stop: Tells the build to end.

    Raises:
        EnvironmentBuildError: The environment's build failed.
        BackendError: The backend could not make ready what it needs.
    """
    async with run_step("resolve-env") as step:
        made = await asyncio.to_thread(_prepare, checked, step, stop)
        description = made.description if isinstance(made, Preparation) else made.plan.description
        step.detail = description + (" (reused)" if made.reused else "")
        return made


def _prepare(checked: CheckedCall, step: Step, stop: StopSignal) -> PreparedEnvironment | Preparation:
    if isinstance(checked.backend, PreparingBackend):
        return checked.backend.prepare(checked.backend_call, step.report, stop)
    assert checked.env_manager is not None
    manager = environment_manager(checked.env_manager)
    plan = manager.plan(checked.project)
    for warning in plan.warnings:
        step.report(f"Warning: {warning}")
    return manager.prepare(checked.project, plan, step.report, stop, rebuild=step.session.rebuild_environment)
