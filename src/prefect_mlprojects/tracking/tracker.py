"""The tracker: creates, continues and finishes MLflow runs with the MLflow of this process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from prefect_mlprojects._support.retry import Backoff, retry
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import InvalidTrackingError, TrackingError
from prefect_mlprojects.tracking._mlflow_internals import MlflowStore
from prefect_mlprojects.tracking.records import (
    DESCRIPTION_TAG,
    FinalStatus,
    TrackedRun,
    TrackingRequest,
    is_our_description,
    project_tags,
    storable,
)
from prefect_mlprojects.tracking.stores import is_transient, store_of
from prefect_mlprojects.tracking.uris import EXPERIMENT_ID_VARIABLE, EXPERIMENT_NAME_VARIABLE, display_uri, run_page

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run

# A continued run keeps its own user and parent.
_TAGS_OF_A_NEW_RUN = ("mlflow.user", "mlflow.parentRunId")

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Tracker:
    """Keeps MLflow runs; every method may be called from many threads at once, and raises ``TrackingError``.

    MLflow is imported at the first use (some seconds); no environment variable and no state of MLflow's is changed: no
    active run, no tracking URI. Instances share MLflow's connections, so they are cheap. Transient errors (a locked
    database, a server that restarts) are retried for `retry_seconds`.
    """

    def __init__(self, retry_seconds: float = 30.0) -> None:
        self._retry_seconds = retry_seconds
        self._finished: dict[str, FinalStatus] = {}

    def warm_up(self, tracking_uri: Secret) -> None:
        """Imports MLflow and opens a store ahead of its first use."""
        self._call(tracking_uri, "open the tracking store", lambda _store: None, once=True)

    def start(self, request: TrackingRequest) -> TrackedRun:
        """Creates the run with its tags and parameters, or continues ``request.run_id``; its status is RUNNING.

        What MLflow can't store is changed, with a warning: long values are shortened, characters that names may not have
        are replaced. Parameters that a continued run has with another value keep it, with a warning.
        """
        uri = request.tracking_uri
        if request.experiment_name and request.experiment_id:
            raise InvalidTrackingError(
                f"Both an experiment name ({request.experiment_name!r}) and an experiment ID "
                f"({request.experiment_id!r}) were given. Give only one of them.",
                tracking_uri=display_uri(uri),
            )
        if not request.run_id:
            return _tracked(self._create(request), request)
        run_id = request.run_id
        run = self._call(uri, "continue the run", lambda store: _resume(store, run_id, request), once=True)
        self._finished.pop(run_id, None)
        return _tracked(run, request)

    def resolve_experiment(self, uri: Secret, name: str | None, experiment_id: str | None) -> str:
        """Returns the ID of an experiment by name, ID or MLflow's default; creates one that is given by name."""
        find = partial(_experiment_id, uri=uri, name=name, experiment_id=experiment_id)
        return self._call(uri, "find the experiment", find, once=True)

    def adopt(self, run_id: str, tracking_uri: Secret) -> TrackedRun:
        """Returns an MLflow run that another program created and will finish; changes nothing."""
        return _of_store(self._read(run_id, tracking_uri), tracking_uri)

    def set_tags(self, run: TrackedRun, tags: Mapping[str, str]) -> None:
        """Sets tags of a run; no-op without tags."""
        if tags:
            entries = storable("tag", tags)
            self._call(run.tracking_uri, "set tags of the run", lambda store: store.log(run.run_id, {}, entries))

    def log_text(self, run: TrackedRun, name: str, text: str) -> None:
        """Stores a text as an artifact of a run; `name` is its path: ``source/uncommitted-changes.patch``."""
        self._call(run.tracking_uri, f"store {name}", lambda store: store.log_text(run.run_id, name, text))

    def finish(
        self,
        run: TrackedRun,
        status: FinalStatus,
        tags: Mapping[str, str] = MappingProxyType({}),
        description: str = "",
    ) -> None:
        """Logs the run's late parameters, sets its final status and end time, then tags and description. Idempotent.

        A run that the project's own code ended as FAILED or KILLED is not made FINISHED. Unless it finished, RUNNING runs
        nested in it are ended too: nothing executes them any more. The project's run has ended even if this fails: report
        the error, but don't let it replace the run's result.
        """
        if self._finished.get(run.run_id) != status:
            # Hours may have passed since the last call.
            store_of(run.tracking_uri).distrust()
            end = partial(_end_run, run=run, status=status, end_time=_now_milliseconds(), description=description)
            self._call(run.tracking_uri, f"set the run {run.run_id} to {status}", end)
            self._finished[run.run_id] = status
        self.set_tags(run, tags)

    def metrics(self, run: TrackedRun) -> Mapping[str, float]:
        """Returns the last value of each of the run's metrics, sorted by name."""
        return dict(sorted(self._read(run.run_id, run.tracking_uri).data.metrics.items()))

    def metric_history(self, run: TrackedRun, name: str) -> list[tuple[int, int, float]]:
        """Returns the values that a metric had, with their steps and times (in milliseconds since 1970)."""
        what = f"read the history of {name!r}"
        return self._call(run.tracking_uri, what, lambda store: store.metric_history(run.run_id, name))

    def experiment_name(self, run: TrackedRun) -> str:
        """Returns the name of a run's experiment; empty if it is unknown."""
        experiment = self._call(
            run.tracking_uri, "read the experiment", lambda store: store.experiment(run.experiment_id)
        )
        return "" if experiment is None else str(experiment.name)

    def close(self) -> None:
        """Releases what the tracker holds; idempotent. MLflow's connections stay open for other trackers."""

    def _read(self, run_id: str, tracking_uri: Secret) -> Run:
        return self._call(tracking_uri, "read the run", lambda store: _existing_run(store, run_id, tracking_uri))

    def _create(self, request: TrackingRequest) -> Run:
        uri = request.tracking_uri
        tags = project_tags(request)
        parameters = storable("parameter", request.parameters)

        def create(store: MlflowStore) -> Run:
            chosen = request.experiment_name, request.experiment_id
            experiment_id = _experiment_id(store, uri, *chosen, project_default=request.project_experiment)
            try:
                return store.create_run(experiment_id, tags["mlflow.user"], _now_milliseconds(), tags, request.run_name)
            except Exception:
                _usable_id(store.experiment(experiment_id), experiment_id, uri)
                raise

        run = self._call(uri, "create the run", create, once=True)
        try:
            self._call(uri, "log the parameters", lambda store: store.log(run.info.run_id, parameters, {}))
        except BaseException:
            # The caller never learns of this run: it must not stay RUNNING.
            try:
                self.finish(_of_store(run, uri), "FAILED")
            except TrackingError as error:
                _logger.warning("The run %s can't be marked as failed: %s", run.info.run_id, error)
            raise
        return run

    def _call(self, uri: Secret, action_name: str, action: Callable[[MlflowStore], _T], *, once: bool = False) -> _T:
        return retry(
            partial(store_of(uri).call, action_name, action),
            is_transient=partial(is_transient, once=once),
            seconds=self._retry_seconds,
            backoff=Backoff(0.1, 2.0),
        )


def _end_run(store: MlflowStore, run: TrackedRun, status: FinalStatus, end_time: int, description: str) -> None:
    found = store.get_run(run.run_id)
    if found is not None:
        late = {name: value for name, value in run.late_parameters.items() if name not in found.data.params}
        tags = storable("tag", {DESCRIPTION_TAG: description}) if description else {}
        if tags and not is_our_description(found.data.tags.get(DESCRIPTION_TAG)):
            tags = {}
        if late or tags:
            store.log(run.run_id, late, tags)
    if status != "FINISHED":
        for nested in store.running_below(run.run_id):
            store.set_status(nested, status, end_time)
    elif found is not None and found.info.status in ("FAILED", "KILLED"):
        return
    store.set_status(run.run_id, status, end_time)


def _now_milliseconds() -> int:
    return int(time.time() * 1000)


def _tracked(run: Run, request: TrackingRequest) -> TrackedRun:
    found = _of_store(run, request.tracking_uri)
    late = storable("parameter", request.late_parameters)
    return replace(found, run_name=request.run_name or found.run_name, late_parameters=late)


def _of_store(run: Run, uri: Secret) -> TrackedRun:
    run_id, experiment_id = str(run.info.run_id), str(run.info.experiment_id)
    url, hint = run_page(uri, experiment_id, run_id)
    return TrackedRun(run_id, experiment_id, uri, url, hint, run.info.run_name, run.info.artifact_uri or "")


def _resume(store: MlflowStore, run_id: str, request: TrackingRequest) -> Run:
    """Continues an existing run: RUNNING again, the project's tags set, its own parameters kept."""
    run = _existing_run(store, run_id, request.tracking_uri)
    if run.info.lifecycle_stage != "active":
        raise _unusable(
            request.tracking_uri,
            f"The MLflow run {run_id} was deleted",
            f"Restore it with `mlflow runs restore --run-id {run_id}`, or leave the run ID out to start a new run.",
        )
    logged, parameters = run.data.params, storable("parameter", request.parameters)
    for name, value in parameters.items():
        if not _same(logged.get(name, value), value):
            message = "The run %s has the parameter %r = %r already; MLflow never changes one, so %r is not recorded."
            _logger.warning(message, run_id, name, logged[name], value)
    tags = {name: value for name, value in project_tags(request).items() if name not in _TAGS_OF_A_NEW_RUN}
    store.set_status(run_id, "RUNNING", None, request.run_name)
    store.log(run_id, {name: value for name, value in parameters.items() if name not in logged}, tags)
    return run


def _same(one: str, other: str) -> bool:
    """Whether two texts are the same value: also 5 and 5.0, which the project's code may have logged."""
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def _experiment_id(
    store: MlflowStore, uri: Secret, name: str | None, experiment_id: str | None, project_default: str | None = None
) -> str:
    """The experiment's ID, found in MLflow's order (mlflow/tracking/fluent.py, ``_get_experiment_id``), and the project's name."""
    if experiment_id:
        return experiment_id
    name = name or os.environ.get(EXPERIMENT_NAME_VARIABLE)
    if not os.environ.get(EXPERIMENT_ID_VARIABLE):
        name = name or project_default
    if name:
        experiment = store.experiment_by_name(name)
        if experiment is None:
            # If that returns None, another run created it a moment ago.
            experiment_id = store.create_experiment(name)
            experiment = None if experiment_id else store.experiment_by_name(name)
        return experiment_id or _usable_id(experiment, "unknown", uri)
    experiment_id = os.environ.get(EXPERIMENT_ID_VARIABLE) or store.default_experiment_id()
    if experiment_id is None:
        raise InvalidTrackingError(
            "Databricks has no default experiment. Give one by name, such as "
            "experiment_name='/Users/you@example.com/name'.",
            tracking_uri=display_uri(uri),
        )
    return experiment_id


def _existing_run(store: MlflowStore, run_id: str, uri: Secret) -> Run:
    run = store.get_run(run_id)
    if run is None:
        problem = f"No MLflow run with the ID {run_id!r} exists"
        raise _unusable(uri, problem, "Leave the run ID out to start a new run.")
    return run


def _usable_id(experiment: Experiment | None, experiment_id: str, uri: Secret) -> str:
    if experiment is None:
        raise _unusable(
            uri,
            f"No MLflow experiment with the ID {experiment_id!r} exists",
            "`mlflow experiments search` lists those that exist; one given by name is created if it is missing.",
        )
    experiment_id = str(experiment.experiment_id)
    if experiment.lifecycle_stage != "active":
        raise _unusable(
            uri,
            f"The MLflow experiment {experiment.name!r} (ID {experiment_id}) was deleted",
            f"Restore it with `mlflow experiments restore --experiment-id {experiment_id}`, or name another experiment.",
        )
    return experiment_id


def _unusable(uri: Secret, problem: str, advice: str) -> TrackingError:
    shown = display_uri(uri)
    return InvalidTrackingError(f"{problem} at {shown}. {advice}", tracking_uri=shown)
