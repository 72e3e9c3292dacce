"""MLflow's store as this package uses it: the one module that touches its interface for plugins, ``AbstractStore``.

MLflow's client classes are not used: they read a run back before each change, and ``set_terminated`` prints to stdout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefect_mlprojects.tracking.base import FinalStatus

NOT_THERE_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""How stores say that an id is of nothing they have; the second for ids of a wrong shape."""


@dataclass(frozen=True)
class StoredRun:
    """A run as a store knows it.

    Attributes:
        run_id: Its id.
        experiment_id: Its experiment's id.
        name: Its name.
        deleted: Whether it is in the trash.
        parameters: Its parameters.
        metrics: The last value of each metric.
    """

    run_id: str
    experiment_id: str
    name: str | None
    deleted: bool
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class StoredExperiment:
    """An experiment as a store knows it.

    Attributes:
        experiment_id: Its id.
        name: Its name.
        deleted: Whether it is in the trash.
    """

    experiment_id: str
    name: str
    deleted: bool


def mlflow_store(uri: str) -> MlflowStore:
    """Returns the store of a tracking URI from MLflow's registry, which keeps those it made.

    Args:
        uri: An absolute tracking URI.
    """
    from mlflow.tracking._tracking_service import utils

    get_store: Any = utils._get_store
    return MlflowStore(get_store(uri))


def ask_server(uri: str, timeout: float) -> None:
    """Sends one small request to an MLflow server; any answer will do, also a refusal.

    Args:
        uri: The server's address.
        timeout: Seconds to wait for a connection, and for the answer.

    Raises:
        MlflowException: Nothing answered.
    """
    from mlflow.utils import credentials, rest_utils

    host_credentials: Any = credentials.get_default_host_creds
    http_request: Any = rest_utils.http_request
    http_request(
        host_credentials(uri), "/health", "GET", max_retries=0, timeout=timeout, raise_on_status=False, retry_codes=()
    )


def log_artifact_text(uri: str, run_id: str, name: str, text: str) -> None:
    """Keeps a text as an artifact of a run; here MLflow's client is used, which knows where artifacts go.

    Args:
        uri: The absolute tracking URI.
        run_id: The run's id.
        name: The artifact's path.
        text: What it holds.
    """
    from mlflow.tracking.client import MlflowClient

    client: Any = MlflowClient(tracking_uri=uri)
    client.log_text(run_id, text, name)


class MlflowStore:
    """One of MLflow's stores, typed; every method raises what MLflow and its drivers raise.

    Args:
        store: An object of MLflow's class ``AbstractStore``.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def create_run(
        self, experiment_id: str, user: str, start_time: int, tags: Mapping[str, str], name: str | None
    ) -> StoredRun:
        """Creates a run, in one transaction with its tags.

        Args:
            experiment_id: The experiment's id.
            user: The user's name.
            start_time: Milliseconds since 1970.
            tags: Values by tag name.
            name: The run's name; None lets MLflow make one up.
        """
        from mlflow import entities

        return _stored_run(
            self._store.create_run(
                experiment_id=experiment_id,
                user_id=user,
                start_time=start_time,
                tags=[_new(entities.RunTag, key, value) for key, value in tags.items()],
                run_name=name,
            )
        )

    def get_run(self, run_id: str) -> StoredRun | None:
        """Returns a run, or None if no such ID exists."""
        from mlflow.exceptions import MlflowException

        try:
            return _stored_run(self._store.get_run(run_id))
        except MlflowException as error:
            if error.error_code in NOT_THERE_CODES:
                return None
            raise

    def set_status(
        self, run_id: str, status: FinalStatus | Literal["RUNNING"], end_time: int | None, name: str | None = None
    ) -> None:
        """Sets a run's status.

        Args:
            run_id: The run's id.
            status: The status.
            end_time: Milliseconds since 1970; None for a run that continues.
            name: A new name; None keeps the one it has.
        """
        from mlflow import entities

        number = getattr(entities.RunStatus, status)
        self._store.update_run_info(run_id, number, end_time=end_time, run_name=name)

    def log(self, run_id: str, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Logs parameters and tags, not more than one request can hold."""
        from mlflow import entities

        self._store.log_batch(
            run_id,
            metrics=[],
            params=[_new(entities.Param, key, value) for key, value in parameters.items()],
            tags=[_new(entities.RunTag, key, value) for key, value in tags.items()],
        )

    def experiment(self, experiment_id: str) -> StoredExperiment | None:
        """Returns an experiment, deleted ones too, or None if no such ID exists."""
        from mlflow.exceptions import MlflowException

        try:
            return _stored_experiment(self._store.get_experiment(experiment_id))
        except MlflowException as error:
            if error.error_code in NOT_THERE_CODES:
                return None
            raise

    def experiment_by_name(self, name: str) -> StoredExperiment | None:
        """Returns an experiment, deleted ones too, or None if no such name exists."""
        return _stored_experiment(self._store.get_experiment_by_name(name))

    def create_experiment(self, name: str) -> str | None:
        """Creates an experiment.

        Returns:
            Its id, or None when there is one of that name already.
        """
        from mlflow.exceptions import MlflowException

        try:
            return str(self._store.create_experiment(name, artifact_location=None, tags=[]))
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":
                return None
            raise

    def disconnect(self) -> None:
        """Closes the connections of a database store."""
        self._store.engine.dispose()


def _new(cls: Any, key: str, value: str) -> Any:
    return cls(key, value)


def _stored_run(run: Any) -> StoredRun:
    return StoredRun(
        run_id=str(run.info.run_id),
        experiment_id=str(run.info.experiment_id),
        name=run.info.run_name,
        deleted=run.info.lifecycle_stage != "active",
        parameters=dict(run.data.params),
        metrics=dict(run.data.metrics),
    )


def _stored_experiment(experiment: Any) -> StoredExperiment | None:
    if experiment is None:
        return None
    return StoredExperiment(
        experiment_id=str(experiment.experiment_id),
        name=str(experiment.name),
        deleted=experiment.lifecycle_stage != "active",
    )
