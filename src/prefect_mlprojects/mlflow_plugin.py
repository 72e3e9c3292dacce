"""The backend plugin of MLflow: ``mlflow run URI --backend prefect``, and ``mlflow.projects.run(backend="prefect")``.

MLflow finds the class by the entry point group ``mlflow.project_backend``
(https://mlflow.org/docs/latest/ml/plugins/#project-backend-plugins).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import ExecutionException as MlflowExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun as MlflowSubmittedRun

from prefect_mlprojects.exceptions import ExecutionException, ParameterError, Problem
from prefect_mlprojects.request import CALL_OPTIONS, OPTIONS, options_of

if TYPE_CHECKING:
    from prefect_mlprojects.runs.handles import SubmittedRun

DEPLOYMENT_KEY = "deployment"
WORK_POOL_KEY = "work-pool"
_OPTION_KEYS: Mapping[str, str] = {option.name.replace("_", "-"): option.name for option in options_of("plugin")}
_KEYS = (DEPLOYMENT_KEY, WORK_POOL_KEY, *_OPTION_KEYS)
_MLFLOW_KEYS: Mapping[str, str] = {
    option.mlflow_key: option.name for option in (*OPTIONS.values(), *CALL_OPTIONS.values()) if option.mlflow_key
}
"""Run options by the keys under which MLflow adds them to the configuration (mlflow/projects/__init__.py, ``_run``)."""


class PrefectSubmittedRun(MlflowSubmittedRun):
    """An ``mlflow.projects.SubmittedRun`` that wraps one of our handles."""

    def __init__(self, run: SubmittedRun) -> None:
        self._run = run

    @property
    def run_id(self) -> str:
        """The MLflow run's ID; waits until the MLflow run exists."""
        return str(self._run.run_id)

    @property
    def flow_run_id(self) -> str:
        """The Prefect flow run's ID."""
        return self._run.flow_run_id

    def wait(self) -> bool:
        """Waits for the run to end and returns whether it finished successfully."""
        return self._run.wait()

    def get_status(self) -> str:
        """Returns the run's status."""
        return self._run.get_status()

    def cancel(self) -> None:
        """Cancels the run and waits until it has ended."""
        self._run.cancel()


class PrefectProjectBackend(AbstractBackend):
    """Runs MLflow projects as Prefect flows.

    Keys of the backend configuration: ``deployment`` (``flow/name`` or ``name``: the run goes to its work pool),
    ``work-pool`` (the project is deployed to it first), and run options: ``backend`` (such as ``kubernetes``),
    ``backend-config``, ``timeout``, ``retries`` and ``git-credentials``. Without the first two the run executes in this
    process.
    """

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, Any] | None,
        version: str | None,
        backend_config: Mapping[str, Any] | str | None,
        tracking_uri: str,  # noqa: ARG002 - this process's own; run() resolves it itself
        experiment_id: str | int | None,
    ) -> PrefectSubmittedRun:
        """Starts a run; MLflow waits for it unless it was called with ``synchronous=False``.

        `backend_config` has the keys listed with the class and those that MLflow adds. Raises MLflow's `ExecutionException`.
        """
        config = dict(backend_config) if isinstance(backend_config, Mapping) else {}
        options = {name: value for key, name in _MLFLOW_KEYS.items() if (value := config.pop(key, None))}
        try:
            _check_keys(config)
            options |= {name: config[key] for key, name in _OPTION_KEYS.items() if key in config}
            options |= {"version": version, "experiment_id": experiment_id}
            run = _start(project_uri, entry_point, params, config, options)
            # MLflow sets tags on the run right after this, so it must exist.
            submitted = PrefectSubmittedRun(run)
            _ = submitted.run_id
        except ExecutionException as error:
            raise MlflowExecutionException(error.message) from None
        return submitted


def _check_keys(config: Mapping[str, Any]) -> None:
    from prefect_mlprojects._support.text import nearest

    problems = []
    for name in (each for each in config if each not in _KEYS):
        near = nearest(name, _KEYS)
        fix = f"did you mean {near!r}?" if near else f"known: {', '.join(_KEYS)}"
        problems.append(Problem(f"unknown key {name!r}", fix=fix))
    if DEPLOYMENT_KEY in config and WORK_POOL_KEY in config:
        problems.append(Problem(f"give only one of {DEPLOYMENT_KEY!r} and {WORK_POOL_KEY!r}"))
    if problems:
        raise ParameterError("The configuration of the backend prefect is not valid", problems)


def _start(
    uri: str,
    entry_point: str,
    parameters: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> SubmittedRun:
    if DEPLOYMENT_KEY not in config and WORK_POOL_KEY not in config:
        from prefect_mlprojects.projects import run

        # MLflow waits by itself, and sets tags before it does.
        return run(uri, entry_point, parameters=parameters, **{**options, "synchronous": False})
    if options.get("docker_auth"):
        fix = "keep it in a docker-registry block and name that in backend-config: {'credentials': NAME}"
        problem = Problem("docker_auth would be stored on the Prefect server", parameter="docker_auth", fix=fix)
        raise ParameterError("The run can't go to a work pool", [problem])
    given = {name: value for name, value in options.items() if value is not None and name in OPTIONS}
    if "experiment_id" in given:
        given["experiment_id"] = str(given["experiment_id"])
    if DEPLOYMENT_KEY in config:
        from prefect_mlprojects.deployments import run_deployment

        return run_deployment(
            str(config[DEPLOYMENT_KEY]), entry_point=entry_point, parameters=parameters, options=given
        )
    from prefect_mlprojects.deployments import deploy

    # The other options are those of one run.
    of_deployment = {name: given.pop(name) for name in ("version", "backend", "backend_config") if name in given}
    return deploy(uri, entry_point, work_pool=str(config[WORK_POOL_KEY]), **of_deployment).run(parameters, **given)
