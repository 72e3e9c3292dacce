"""``run()``, as ``mlflow.projects`` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect_mlprojects.exceptions import ExecutionException, RunFailed
from prefect_mlprojects.request.tags import checked_tags
from prefect_mlprojects.runs.handles import SubmittedRun
from prefect_mlprojects.runs.start import make_request, preflight, start, wait_interruptibly
from prefect_mlprojects.tasks.session import RunResult, RunSession


def run(
    uri: str | Path,
    entry_point: str = "main",
    version: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    docker_args: Mapping[str, Any] | None = None,
    experiment_name: str | None = None,
    experiment_id: str | int | None = None,
    backend: str = "local",
    backend_config: Mapping[str, Any] | str | None = None,
    storage_dir: str | Path | None = None,
    synchronous: bool = True,
    run_id: str | None = None,
    run_name: str | None = None,
    env_manager: str | None = None,
    build_image: bool = False,
    docker_auth: Mapping[str, Any] | None = None,
    *,
    timeout: float | None = None,
    retries: int = 0,
    git_credentials: str | None = None,
    tracking: str | None = None,
    tags: Sequence[str] = (),
) -> SubmittedRun:
    """Runs an MLflow-Projects project as a Prefect flow; a drop-in for ``mlflow.projects.run``.

    Inside a Prefect flow the run is a child flow run; inside an active MLflow run, a nested run.

    Args:
        uri: Project folder or URI, with an optional #sub/directory; block://NAME for a project block.
        entry_point: Entry point, or the name of a .py, .sh or .R file of the project.
        version: Branch, tag or commit of a git project. Default: its default branch, or a folder as it is.
        parameters: Parameter values by name; undeclared ones are appended to the command as --NAME VALUE.
        docker_args: Arguments for the container, by their names in `docker run`.
        experiment_name: MLflow experiment by name; created if it does not exist.
        experiment_id: MLflow experiment by ID, instead of its name.
        backend: Backend that runs the command: local, kubernetes, databricks, or one of an installed package.
        backend_config: Configuration of the backend: a mapping, a .json or .yaml file, a JSON text, or
            block-type/block-name.
        storage_dir: Folder for downloads of remote 'path' parameters. Default: one that is deleted with the run.
        synchronous: Wait for the run to end. Otherwise it continues in this process, which waits for it at exit.
        run_id: ID of an existing MLflow run to continue. Default: a new run.
        run_name: Name of the MLflow run.
        env_manager: Environment manager: local, virtualenv, uv or conda. Default: chosen by the project's files.
        build_image: Build an image with the project's files for a Docker project.
        docker_auth: Credentials for the image registry; they stay in memory.
        timeout: Time limit for the command, in seconds. Default: no limit.
        retries: How often a failed command is retried.
        git_credentials: Name of a git-credentials block. Default: the one for the repository's host, if any.
        tracking: Name of an mlflow-tracking-server block. Default: MLflow's own setting where the run executes.
        tags: Tag of the flow run and of the MLflow run: NAME or NAME=VALUE.

    Returns:
        A handle on the run, which has ended if ``synchronous``.

    Raises:
        ExecutionException: The request is invalid, or (if ``synchronous``) the run did not finish successfully. The
            subclass says which.
    """
    arguments = dict(locals())
    from prefect_mlprojects.tracking import active_experiment_id

    if experiment_name is None and experiment_id is None and run_id is None:
        # As in MLflow: the experiment that mlflow.set_experiment() set in this process.
        arguments["experiment_id"] = active_experiment_id()
    try:
        request, secrets = make_request(arguments)
        handle = start(request, secrets, RunSession(tags=checked_tags(tags)), preflight(request, secrets))
        if synchronous:
            _raise_failure(wait_interruptibly(handle))
    except ExecutionException as error:
        # The frames of this package and of Prefect would only bury the message.
        raise error.with_traceback(None) from None
    return handle


def _raise_failure(result: RunResult) -> None:
    if result.status == "FINISHED":
        return
    if result.error is not None:
        raise result.error
    raise RunFailed(
        f"Run (ID '{result.run_id}') failed: {result.message}", run_id=result.run_id, flow_run_id=result.flow_run_id
    )
