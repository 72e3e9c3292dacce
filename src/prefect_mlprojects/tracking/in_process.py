"""The tracker that uses MLflow in this process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.tracking.base import FinalStatus, TrackedRun, TrackingRequest
from prefect_mlprojects.tracking.mlflow_store import MlflowStore, StoredExperiment, StoredRun, log_artifact_text
from prefect_mlprojects.tracking.stores import (
    check_reachable,
    did_nothing,
    gate,
    may_pass,
    open_store,
    quiet,
    tracking_error,
)
from prefect_mlprojects.tracking.tags import batches, fitting_parameters, fitting_tags, project_tags
from prefect_mlprojects.tracking.uris import EXPERIMENT_ID_VARIABLE, EXPERIMENT_NAME_VARIABLE, run_page

RETRY_SECONDS = 30.0
"""How long passing errors are retried, unless another time is given."""

TRUSTED_SECONDS = 1.0
"""How long after an answer a server is taken to be still there: asking costs one small request."""

# These describe who made the run and where it hangs; a run that is gone on with keeps its own.
_TAGS_OF_A_NEW_RUN = ("mlflow.user", "mlflow.parentRunId")

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class InProcessTracker:
    """Keeps MLflow runs with the MLflow of this process, which is imported at the first use (some seconds).

    It changes no environment variable and no state of MLflow's: no active run, no tracking URI. Instances share
    MLflow's connections, so they are cheap; ``close`` leaves those open for the next one.
    """

    def __init__(self, retry_seconds: float = RETRY_SECONDS) -> None:
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._answered: dict[str, float] = {}
        self._finished: dict[str, FinalStatus] = {}

    def warm_up(self, tracking_uri: str) -> None:
        """Imports MLflow and opens a store ahead of its first use.

        Args:
            tracking_uri: An absolute tracking URI.

        Raises:
            TrackingError: The store can't be opened.
        """
        self._call(tracking_uri, "open the tracking store", lambda _store: None, patient=False)

    def start(self, request: TrackingRequest) -> TrackedRun:
        """Creates the run, or continues one; see ``Tracker``."""
        uri = request.tracking_uri
        if request.experiment_name and request.experiment_id:
            raise TrackingError(
                f"Both an experiment name ({request.experiment_name!r}) and an experiment ID "
                f"({request.experiment_id!r}) were given. Give only one of them.",
                tracking_uri=redact(uri),
            )
        if request.run_id:
            run_id = request.run_id
            run = self._call(uri, "go on with the run", lambda store: _resume(store, run_id, request), patient=False)
            with self._lock:
                self._finished.pop(run_id, None)
        else:
            run = self._create(request)
        url, hint = run_page(uri, run.experiment_id, run.run_id)
        return TrackedRun(
            run_id=run.run_id,
            experiment_id=run.experiment_id,
            tracking_uri=uri,
            url=url,
            hint=hint,
            run_name=request.run_name or run.name,
        )

    def resolve_experiment(self, request: TrackingRequest) -> str:
        """Returns the id of the experiment that a request means; creates one that is given by name.

        Raises:
            TrackingError: The store can't be reached, or the experiment is unknown or deleted.
        """
        return self._call(
            request.tracking_uri, "find the experiment", lambda store: _experiment_id(store, request), patient=False
        )

    def adopt(self, run_id: str, tracking_uri: Secret) -> TrackedRun:
        """Returns a run that somebody else created; see ``Tracker``."""
        uri = reveal(tracking_uri)
        run = self._call(uri, "read the run", lambda store: store.get_run(run_id))
        if run is None:
            raise _no_such_run(run_id, uri)
        url, hint = run_page(uri, run.experiment_id, run.run_id)
        return TrackedRun(run.run_id, run.experiment_id, uri, url, hint, run.name)

    def set_tags(self, run: TrackedRun, tags: Mapping[str, str]) -> None:
        """Sets tags of a run; see ``Tracker``."""
        if tags:
            fitting = fitting_tags(tags)
            self._call(run.tracking_uri, "set tags of the run", lambda store: _log(store, run.run_id, fitting, {}))

    def log_text(self, run: TrackedRun, name: str, text: str) -> None:
        """Keeps a text as an artifact of a run; see ``Tracker``."""
        self._call(
            run.tracking_uri, f"keep {name}", lambda _: log_artifact_text(run.tracking_uri, run.run_id, name, text)
        )

    def finish(self, run: TrackedRun, status: FinalStatus, tags: Mapping[str, str] = MappingProxyType({})) -> None:
        """Sets the run's final status, then the tags; see ``Tracker``."""
        self._set_status(run, status)
        self.set_tags(run, tags)

    def _set_status(self, run: TrackedRun, status: FinalStatus) -> None:
        with self._lock:
            if self._finished.get(run.run_id) == status:
                return
        ended = int(time.time() * 1000)
        # Hours may have gone by; and MLflow would wait minutes for a server that went away a moment ago.
        self._answered.pop(run.tracking_uri, None)
        self._call(
            run.tracking_uri,
            f"set the run {run.run_id} to {status}",
            lambda store: store.set_status(run.run_id, status, ended),
        )
        with self._lock:
            self._finished[run.run_id] = status

    def metrics(self, run: TrackedRun) -> Mapping[str, float]:
        """Returns the run's metrics; see ``Tracker``."""
        stored = self._call(run.tracking_uri, "read the run's metrics", lambda store: store.get_run(run.run_id))
        if stored is None:
            raise _no_such_run(run.run_id, run.tracking_uri)
        return dict(sorted(stored.metrics.items()))

    def close(self) -> None:
        """Does nothing: MLflow's connections serve the whole process."""

    def _create(self, request: TrackingRequest) -> StoredRun:
        uri = request.tracking_uri
        tags = project_tags(request)
        parameters = fitting_parameters(request.parameters)

        def create(store: MlflowStore) -> StoredRun:
            experiment_id = _experiment_id(store, request)
            started = int(time.time() * 1000)
            try:
                return store.create_run(experiment_id, tags["mlflow.user"], started, tags, request.run_name)
            except Exception:
                _refuse_unusable(store.experiment(experiment_id), experiment_id, uri)
                raise

        run = self._call(uri, "create the run", create, patient=False)
        try:
            self._call(uri, "log the parameters", lambda store: _log(store, run.run_id, {}, parameters))
        except BaseException:
            # The caller never learns of this run: it must not stay RUNNING.
            self._abandon(uri, run.run_id)
            raise
        return run

    def _abandon(self, uri: str, run_id: str) -> None:
        try:
            self.finish(TrackedRun(run_id=run_id, experiment_id="", tracking_uri=uri), "FAILED")
        except TrackingError as error:
            _logger.warning("The run %s can't be marked as failed: %s", run_id, error)

    def _call(self, uri: str, what: str, action: Callable[[MlflowStore], _T], *, patient: bool = True) -> _T:
        """Does something with a store."""
        give_up = time.monotonic() + self._retry_seconds
        pause = 0.1
        while True:
            try:
                return self._try(uri, action)
            except Exception as error:  # noqa: BLE001 - stores raise whatever their drivers do
                failure = tracking_error(error, uri, what)
                self._answered.pop(uri, None)
                again = did_nothing(failure) or (patient and may_pass(failure))
                if not again or time.monotonic() + pause > give_up:
                    raise failure from None
            time.sleep(pause)
            pause = min(pause * 2, 2.0)

    def _try(self, uri: str, action: Callable[[MlflowStore], _T]) -> _T:
        store = open_store(uri)
        if time.monotonic() - self._answered.get(uri, -TRUSTED_SECONDS) >= TRUSTED_SECONDS:
            check_reachable(uri)
        with gate(uri), quiet():
            result = action(store)
        self._answered[uri] = time.monotonic()
        return result


def _log(store: MlflowStore, run_id: str, tags: Mapping[str, str], parameters: Mapping[str, str]) -> None:
    for part in batches(parameters):
        store.log(run_id, part, {})
    for part in batches(tags):
        store.log(run_id, {}, part)


def _resume(store: MlflowStore, run_id: str, request: TrackingRequest) -> StoredRun:
    """Goes on with a run that exists: RUNNING again, the project's tags set, its own parameters kept."""
    shown = redact(request.tracking_uri)
    run = store.get_run(run_id)
    if run is None:
        raise _no_such_run(run_id, request.tracking_uri)
    if run.deleted:
        raise TrackingError(
            f"The MLflow run {run_id} at {shown} is deleted. Restore it with `mlflow runs restore --run-id {run_id}`, "
            "or leave the run ID out to start a new run.",
            tracking_uri=shown,
        )
    logged = run.parameters
    parameters: dict[str, str] = {}
    for name, value in fitting_parameters(request.parameters).items():
        if name not in logged:
            parameters[name] = value
        elif logged[name] != value:
            _logger.warning(
                "The run %s has the parameter %r = %r already; MLflow never changes one, so %r is not recorded.",
                run_id,
                name,
                logged[name],
                value,
            )
    tags = {name: value for name, value in project_tags(request).items() if name not in _TAGS_OF_A_NEW_RUN}
    store.set_status(run_id, "RUNNING", None, request.run_name)
    _log(store, run_id, tags, parameters)
    return run


def _experiment_id(store: MlflowStore, request: TrackingRequest) -> str:
    """The experiment's id, found in MLflow's order (mlflow/tracking/fluent.py, ``_get_experiment_id``)."""
    if request.experiment_id:
        return request.experiment_id
    name = request.experiment_name or os.environ.get(EXPERIMENT_NAME_VARIABLE)
    if name:
        return _named_experiment(store, name, request)
    experiment_id = os.environ.get(EXPERIMENT_ID_VARIABLE)
    if experiment_id:
        return experiment_id
    if not request.tracking_uri.startswith("databricks"):
        return "0"
    from mlflow.tracking.default_experiment.registry import get_experiment_id

    experiment_id = get_experiment_id()
    if experiment_id is None:
        raise TrackingError(
            "Databricks has no default experiment. Give one by name, such as "
            "experiment_name='/Users/you@example.com/name'.",
            tracking_uri=redact(request.tracking_uri),
        )
    return str(experiment_id)


def _named_experiment(store: MlflowStore, name: str, request: TrackingRequest) -> str:
    experiment = store.experiment_by_name(name)
    if experiment is None:
        created = store.create_experiment(name)
        if created is not None:
            return created
        # Another run made it a moment ago.
        experiment = store.experiment_by_name(name)
    experiment_id = "unknown" if experiment is None else experiment.experiment_id
    _refuse_unusable(experiment, experiment_id, request.tracking_uri)
    return experiment_id


def _no_such_run(run_id: str, uri: str) -> TrackingError:
    shown = redact(uri)
    return TrackingError(
        f"There is no MLflow run with the ID {run_id!r} at {shown}. Leave the run ID out to start a new run.",
        tracking_uri=shown,
    )


def _refuse_unusable(experiment: StoredExperiment | None, experiment_id: str, uri: str) -> None:
    shown = redact(uri)
    if experiment is None:
        raise TrackingError(
            f"There is no MLflow experiment with the ID {experiment_id!r} at {shown}. "
            "`mlflow experiments search` lists those that exist; one given by name is created when it is missing.",
            tracking_uri=shown,
        )
    if experiment.deleted:
        raise TrackingError(
            f"The MLflow experiment {experiment.name!r} (ID {experiment_id}) at {shown} is deleted. Restore it with "
            f"`mlflow experiments restore --experiment-id {experiment_id}`, or name another experiment.",
            tracking_uri=shown,
        )
