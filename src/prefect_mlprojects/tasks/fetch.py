"""The ``fetch`` task: URI -> a working copy with a resolved version."""

from __future__ import annotations

import asyncio

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_mlprojects.sources import Source, WorkingCopy, describe_working_copy
from prefect_mlprojects.tasks.steps import run_step


@task(name="fetch", cache_policy=NO_CACHE, persist_result=False)
async def fetch(source: Source) -> WorkingCopy:
    """Returns the working copy of the project.

    Raises:
        FetchError: It could not be fetched, or was stopped.
    """
    async with run_step("fetch") as step:
        copy = await asyncio.to_thread(source.fetch, step.stop, step.report)
        step.detail = describe_working_copy(copy)
        return copy
