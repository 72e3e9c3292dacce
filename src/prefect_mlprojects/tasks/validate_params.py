"""The ``validate-params`` task: project file + values -> the command line, with remote paths downloaded."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_mlprojects.environments.detection import choose_manager
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.sources.downloads import download_all
from prefect_mlprojects.spec import (
    CheckedParameters,
    EntryPoint,
    Project,
    build_command,
    check_parameters,
    find_entry_point,
    load_project,
)
from prefect_mlprojects.tasks.steps import run_step
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal


@dataclass(frozen=True)
class CheckedCall:
    """A call whose project, entry point, parameters and environment manager fit together.

    Attributes:
        project: The project.
        entry_point: The entry point.
        parameters: The values, defaults filled in.
        env_manager: The environment manager that will be used.
    """

    project: Project
    entry_point: EntryPoint
    parameters: CheckedParameters
    env_manager: EnvironmentManagerName


@dataclass(frozen=True)
class Invocation:
    """What will run.

    Attributes:
        command: The shell command line.
        parameters: The values in it, remote paths replaced by where they were downloaded to.
    """

    command: str
    parameters: CheckedParameters


def check_call(
    directory: Path, entry_point: str, parameters: Mapping[str, Any] | None, env_manager: str | None
) -> CheckedCall:
    """Checks a call against the project in a folder; pure reading, no network, nothing built.

    Args:
        directory: The project's folder.
        entry_point: The entry point's name.
        parameters: Values by parameter name.
        env_manager: The environment manager asked for; None chooses by the project.

    Raises:
        ProjectSpecError: The project file is malformed, or there is no such entry point.
        ParameterError: Parameters are missing or not of their type; all of them at once.
        EnvironmentBuildError: The environment manager is unknown or does not fit the project.
    """
    project = load_project(directory)
    found = find_entry_point(project, entry_point)
    return CheckedCall(
        project=project,
        entry_point=found,
        parameters=check_parameters(found, parameters),
        env_manager=choose_manager(project, env_manager),
    )


@task(name="validate-params", cache_policy=NO_CACHE, persist_result=False)
async def validate_params(
    working_copy: WorkingCopy,
    entry_point: str,
    parameters: Mapping[str, Any] | None,
    env_manager: str | None,
    storage_dir: str | None,
    on_checked: Callable[[CheckedCall], None],
    stop: StopSignal,
) -> Invocation:
    """Checks the call, downloads what its ``path`` parameters name, and builds the command line.

    Args:
        working_copy: The project's files.
        entry_point: The entry point's name.
        parameters: Values by parameter name.
        env_manager: The environment manager asked for.
        storage_dir: Where remote ``path`` parameters are downloaded to; None for a temporary folder.
        on_checked: Called once the call is known to be right, before anything is downloaded.
        stop: Tells the downloads to end.

    Raises:
        ProjectSpecError: The project file is malformed, or there is no such entry point.
        ParameterError: Parameters are missing or not of their type; all of them at once.
        FetchError: A remote path could not be downloaded.
    """
    async with run_step("validate-params") as step:
        checked = await asyncio.to_thread(check_call, working_copy.directory, entry_point, parameters, env_manager)
        for problem in (*checked.project.warnings, *checked.parameters.warnings):
            step.report(f"Warning: {problem}")
        on_checked(checked)
        final = checked.parameters
        if final.downloads:
            # As MLflow does: a new folder for each run, below the one that was asked for.
            if storage_dir:
                Path(storage_dir).mkdir(parents=True, exist_ok=True)
            directory = Path(tempfile.mkdtemp(prefix="mlprojects-", dir=storage_dir))
            local = await asyncio.to_thread(
                download_all,
                final.downloads,
                directory,
                report=step.report,
                stop=stop,
                tracking_uri=step.session.tracking_uri,
            )
            final = final.with_downloads({name: str(path) for name, path in local.items()})
        command = build_command(checked.entry_point, final)
        step.report(f"Command: {command}")
        step.detail = command
        return Invocation(command, final)
