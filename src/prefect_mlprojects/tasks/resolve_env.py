"""The ``resolve-env`` task: what the project needs -> an environment that is ready."""

from __future__ import annotations

import asyncio

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_mlprojects.environments.base import PreparedEnvironment
from prefect_mlprojects.environments.detection import choose_manager
from prefect_mlprojects.environments.managers import environment_manager
from prefect_mlprojects.spec import Project
from prefect_mlprojects.tasks.steps import Step, run_step
from prefect_mlprojects.types import StopSignal


@task(name="resolve-env", cache_policy=NO_CACHE, persist_result=False)
async def resolve_env(project: Project, env_manager: str | None, stop: StopSignal) -> PreparedEnvironment:
    """Returns the environment of the project, building it when it is not in the cache.

    Args:
        project: The project.
        env_manager: The environment manager asked for; None chooses by the project.
        stop: Tells the build to end.

    Raises:
        EnvironmentBuildError: The manager does not fit the project, or the build failed.
    """
    async with run_step("resolve-env") as step:
        environment = await asyncio.to_thread(_prepare, project, env_manager, step, stop)
        step.detail = environment.plan.description + (" (reused)" if environment.reused else "")
        return environment


def _prepare(project: Project, env_manager: str | None, step: Step, stop: StopSignal) -> PreparedEnvironment:
    manager = environment_manager(choose_manager(project, env_manager))
    plan = manager.plan(project)
    for warning in plan.warnings:
        step.report(f"Warning: {warning}")
    return manager.prepare(project, plan, step.report, stop, rebuild=step.session.rebuild_environment)
