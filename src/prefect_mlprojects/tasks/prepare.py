"""The tasks before ``execute``: ``fetch``, ``validate-params`` and ``resolve-env``."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_mlprojects._support.process_folders import sweep_private_folders
from prefect_mlprojects.backends.contract import AnyPrepared
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.request.check import CheckedRun, RunContext, check_request, map_paths
from prefect_mlprojects.sources import Source, WorkingCopy, describe_working_copy
from prefect_mlprojects.sources.base import create_run_folder
from prefect_mlprojects.sources.downloads import download_all
from prefect_mlprojects.spec import CheckedParameters, build_command
from prefect_mlprojects.tasks.steps import Step, run_step
from prefect_mlprojects.tracking.stores import download_artifacts
from prefect_mlprojects.types import StopSignal


@task(name="fetch", cache_policy=NO_CACHE, persist_result=False)
async def fetch(source: Source) -> WorkingCopy:
    """Returns the project's working copy with a resolved version; raises `FetchError`."""
    async with run_step("fetch") as step:
        await asyncio.to_thread(sweep_private_folders)
        copy = await asyncio.to_thread(source.fetch, step.stop, step.report)
        step.detail = describe_working_copy(copy)
        return copy


@dataclass(frozen=True)
class Invocation:
    """The command that will run; `paths` maps local files and folders to their names where it runs."""

    command: str
    parameters: CheckedParameters
    paths: Mapping[str, str]


@task(name="validate-params", cache_policy=NO_CACHE, persist_result=False)
async def validate_params(
    request: RunRequest,
    working_copy: WorkingCopy,
    context: RunContext,
    on_checked: Callable[[CheckedRun], None],
    stop: StopSignal,
) -> Invocation:
    """Checks the request, calls `on_checked`, downloads remote ``path`` parameters and builds the command line.

    Raises:
        ExecutionException: As `check_request` and `map_paths` do.
        FetchError: A remote path could not be downloaded.
    """
    async with run_step("validate-params") as step:
        checked = await asyncio.to_thread(check_request, request, working_copy, context)
        for problem in (*checked.project.warnings, *checked.parameters.warnings):
            step.report(f"Warning: {problem}")
        on_checked(checked)
        final = checked.parameters
        if final.downloads and checked.backend.downloads_paths:
            final = await _download(final, working_copy.uri, request.storage_dir, step, stop)
        final, paths = map_paths(checked, final)
        final = await asyncio.to_thread(final.with_secrets, context.resolve_secret)
        command = build_command(checked.entry_point, final)
        step.report(f"Command: {command}")
        step.detail = command
        return Invocation(command, final, paths)


async def _download(
    parameters: CheckedParameters, uri: str, storage_dir: str | None, step: Step, stop: StopSignal
) -> CheckedParameters:
    if storage_dir:
        # As in MLflow: a new folder for each run, in the requested one.
        Path(storage_dir).mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="mlprojects-", dir=storage_dir))
    else:
        directory = step.session.downloads = create_run_folder(uri, "downloads")
    local = await asyncio.to_thread(
        download_all,
        parameters.downloads,
        directory,
        report=step.report,
        stop=stop,
        fetch_artifact=lambda uri, folder: download_artifacts(uri, folder, step.session.tracking_uri),
    )
    return parameters.with_downloads({name: str(path) for name, path in local.items()})


@task(name="resolve-env", cache_policy=NO_CACHE, persist_result=False)
async def resolve_env(checked: CheckedRun, stop: StopSignal) -> AnyPrepared:
    """Prepares the environment, image or upload; raises `EnvironmentBuildError` or `BackendError`."""
    async with run_step("resolve-env") as step:
        prepared = await asyncio.to_thread(checked.backend.prepare, checked.backend_request, step.report, stop)
        step.detail = prepared.description + (" (reused)" if prepared.reused else "")
        return prepared
