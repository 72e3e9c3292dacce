"""MLflow's side: ``mlflow run URI --backend prefect``, and ``mlflow.projects.run(backend="prefect")``.

MLflow finds the class by the entry point group ``mlflow.project_backend``
(https://mlflow.org/docs/latest/ml/plugins/#project-backend-plugins).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow.entities import RunStatus
from mlflow.exceptions import ExecutionException as MlflowExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun as MlflowSubmittedRun

from prefect_mlprojects.exceptions import ExecutionException, ParameterError, Problem

if TYPE_CHECKING:
    from prefect_mlprojects.runs.handles import SubmittedRun

DEPLOYMENT_KEY = "deployment"
WORK_POOL_KEY = "work-pool"
BACKEND_KEY = "backend"
BACKEND_CONFIG_KEY = "backend-config"
_KEYS = (DEPLOYMENT_KEY, WORK_POOL_KEY, BACKEND_KEY, BACKEND_CONFIG_KEY)

# What MLflow adds to the configuration on its own (mlflow/projects/__init__.py, ``_run``).
_FROM_MLFLOW = ("ENV_MANAGER", "SYNCHRONOUS", "DOCKER_ARGS", "STORAGE_DIR", "build_image", "docker_auth")


class PrefectSubmittedRun(MlflowSubmittedRun):
    """MLflow's handle on one of our runs.

    Args:
        run: Ours.
    """

    def __init__(self, run: SubmittedRun) -> None:
        self._run = run

    @property
    def run_id(self) -> str:
        """The MLflow run's id; waits for the MLflow run to exist."""
        return str(self._run.run_id)

    @property
    def flow_run_id(self) -> str:
        """The Prefect flow run's id."""
        return self._run.flow_run_id

    def wait(self) -> bool:
        """Waits for the run's end and tells whether it finished successfully."""
        return self._run.wait()

    def get_status(self) -> str:
        """Returns the run's status by MLflow's name."""
        return str(RunStatus.to_string(RunStatus.from_string(self._run.get_status())))

    def cancel(self) -> None:
        """Cancels the run and waits until it has ended."""
        self._run.cancel()


class PrefectProjectBackend(AbstractBackend):
    """Runs MLflow projects as Prefect flows.

    The backend configuration may hold ``deployment`` (``flow/name`` or ``name``: the run goes to its work pool), ``work-pool``
    (the project is deployed to it first), ``backend`` and ``backend-config`` (ours, such as ``kubernetes``). Without the first
    two the run goes on in this process.
    """

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, Any] | None,
        version: str | None,
        backend_config: Mapping[str, Any] | str | None,
        tracking_uri: str,  # noqa: ARG002 - this process's own, which ``run()`` finds by itself
        experiment_id: str | int | None,
    ) -> PrefectSubmittedRun:
        """Starts a run; MLflow waits for it when it was called synchronously.

        Args:
            project_uri: The project's URI.
            entry_point: The entry point's name.
            params: Values by parameter name.
            version: The version of a git project.
            backend_config: See the class; with what MLflow adds.
            tracking_uri: The tracking URI that MLflow uses.
            experiment_id: The experiment's id.

        Raises:
            mlflow.exceptions.ExecutionException: The run could not be started; with our message.
        """
        config = dict(backend_config) if isinstance(backend_config, Mapping) else {}
        mlflow_options = {name: config.pop(name, None) for name in _FROM_MLFLOW}
        try:
            _check_keys(config)
            run = _start(project_uri, entry_point, params, version, config, mlflow_options, experiment_id)
            # MLflow sets tags on the run right after this: it must exist by then.
            submitted = PrefectSubmittedRun(run)
            _ = submitted.run_id
        except ExecutionException as error:
            raise MlflowExecutionException(error.message) from None
        return submitted


def _check_keys(config: Mapping[str, Any]) -> None:
    from prefect_mlprojects._support.text import nearest

    problems = []
    for name in config:
        if name not in _KEYS:
            near = nearest(name, _KEYS)
            problems.append(
                Problem(
                    f"unknown key {name!r}", fix=f"did you mean {near!r}?" if near else f"known: {', '.join(_KEYS)}"
                )
            )
    if DEPLOYMENT_KEY in config and WORK_POOL_KEY in config:
        problems.append(Problem(f"give only one of {DEPLOYMENT_KEY!r} and {WORK_POOL_KEY!r}"))
    if problems:
        raise ParameterError("The configuration of the backend prefect does not fit", problems)


def _start(
    uri: str,
    entry_point: str,
    params: Mapping[str, Any] | None,
    version: str | None,
    config: Mapping[str, Any],
    mlflow_options: Mapping[str, Any],
    experiment_id: str | int | None,
) -> SubmittedRun:
    options = {
        "env_manager": mlflow_options["ENV_MANAGER"],
        "docker_args": mlflow_options["DOCKER_ARGS"] or None,
        "storage_dir": mlflow_options["STORAGE_DIR"],
        "build_image": mlflow_options["build_image"] or None,
        "experiment_id": None if experiment_id is None else str(experiment_id),
    }
    if DEPLOYMENT_KEY in config:
        return _run_deployment(str(config[DEPLOYMENT_KEY]), entry_point, params, version, options)
    backend = str(config.get(BACKEND_KEY, "local"))
    if WORK_POOL_KEY in config:
        from prefect_mlprojects.deployments import deploy

        made = deploy(
            uri,
            entry_point,
            work_pool=str(config[WORK_POOL_KEY]),
            version=version,
            backend=backend,
            backend_config=config.get(BACKEND_CONFIG_KEY),
        )
        return made.run(params, options={name: value for name, value in options.items() if value is not None})
    from prefect_mlprojects.projects import run

    return run(
        uri,
        entry_point,
        version,
        params,
        docker_args=mlflow_options["DOCKER_ARGS"],
        experiment_id=experiment_id,
        backend=backend,
        backend_config=config.get(BACKEND_CONFIG_KEY),
        storage_dir=mlflow_options["STORAGE_DIR"],
        # MLflow waits by itself, and sets tags before it does.
        synchronous=False,
        env_manager=mlflow_options["ENV_MANAGER"],
        build_image=bool(mlflow_options["build_image"]),
        docker_auth=mlflow_options["docker_auth"],
    )


def _run_deployment(
    name: str, entry_point: str, params: Mapping[str, Any] | None, version: str | None, options: Mapping[str, Any]
) -> SubmittedRun:
    from prefect_mlprojects.deployments.creation import run_deployment

    given = {key: value for key, value in {**options, "version": version}.items() if value is not None}
    return run_deployment(name, entry_point=entry_point, parameters=params, options=given)
