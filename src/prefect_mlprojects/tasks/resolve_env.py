"""The ``resolve-env`` task: prepares what the project needs to run."""

from __future__ import annotations

import asyncio

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_mlprojects.backends.contract import AnyPrepared
from prefect_mlprojects.runs.check import CheckedRun
from prefect_mlprojects.tasks.steps import run_step
from prefect_mlprojects.types import StopSignal


@task(name="resolve-env", cache_policy=NO_CACHE, persist_result=False)
async def resolve_env(checked: CheckedRun, stop: StopSignal) -> AnyPrepared:
    """Returns what the run's backend prepared: an environment, an image, an upload.

    Raises:
        EnvironmentBuildError: The environment's build failed or was stopped.
        BackendError: The backend could not prepare what it needs.
    """
    async with run_step("resolve-env") as step:
        prepared = await asyncio.to_thread(checked.backend.prepare, checked.backend_request, step.report, stop)
        step.detail = prepared.description + (" (reused)" if prepared.reused else "")
        return prepared
