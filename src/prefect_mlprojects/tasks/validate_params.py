"""The ``validate-params`` task: project file + values -> the command line, with remote paths downloaded."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_mlprojects.runs.check import CheckedRun, RunContext, check_request, map_paths
from prefect_mlprojects.runs.request import RunRequest
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.sources.downloads.download import download_all
from prefect_mlprojects.spec import CheckedParameters, build_command
from prefect_mlprojects.tasks.steps import Step, run_step
from prefect_mlprojects.tracking.stores import download_artifacts
from prefect_mlprojects.types import StopSignal


@dataclass(frozen=True)
class Invocation:
    """The command that will run.

    Attributes:
        command: The shell command line.
        parameters: The values in it, with the local copies of remote paths.
        paths: By each local file or folder that the command needs, what it calls it where it runs.
    """

    command: str
    parameters: CheckedParameters
    paths: Mapping[str, str] = field(default_factory=dict)


@task(name="validate-params", cache_policy=NO_CACHE, persist_result=False)
async def validate_params(
    request: RunRequest,
    working_copy: WorkingCopy,
    context: RunContext,
    on_checked: Callable[[CheckedRun], None],
    stop: StopSignal,
) -> Invocation:
    """Checks the request, downloads remote ``path`` parameters and builds the command line.

    Args:
        request: The run request.
        working_copy: The project's files.
        context: What else belongs to the run.
        on_checked: Called once the request is checked, before anything is downloaded.
        stop: Ends the downloads.

    Raises:
        ProjectSpecError: The project file is malformed, or there is no such entry point.
        ParameterError: Parameters are missing or not of their type; all of them at once.
        BackendError: The backend can't run the request, or a ``path`` can't be reached from where it runs.
        FetchError: A remote path could not be downloaded.
    """
    async with run_step("validate-params") as step:
        checked = await asyncio.to_thread(check_request, request, working_copy, context)
        for problem in (*checked.project.warnings, *checked.parameters.warnings):
            step.report(f"Warning: {problem}")
        on_checked(checked)
        final = checked.parameters
        if final.downloads and checked.backend.downloads_paths:
            final = await _download(final, request.storage_dir, step, stop)
        final, paths = map_paths(checked, final)
        command = build_command(checked.entry_point, final)
        step.report(f"Command: {command}")
        step.detail = command
        return Invocation(command, final, paths)


async def _download(
    parameters: CheckedParameters, storage_dir: str | None, step: Step, stop: StopSignal
) -> CheckedParameters:
    # As MLflow does: a new folder for each run, below the one that was asked for.
    if storage_dir:
        Path(storage_dir).mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="mlprojects-", dir=storage_dir))
    local = await asyncio.to_thread(
        download_all,
        parameters.downloads,
        directory,
        report=step.report,
        stop=stop,
        fetch_artifact=lambda uri, folder: download_artifacts(uri, folder, step.session.tracking_uri),
    )
    return parameters.with_downloads({name: str(path) for name, path in local.items()})
