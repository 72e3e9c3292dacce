"""The tracker: its request, its value, its methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources.base import WorkingCopy

FinalStatus: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]
"""How an MLflow run can end; the names are MLflow's."""


@dataclass(frozen=True)
class TrackingRequest:
    """The MLflow run that a project run asks for.

    Attributes:
        tracking_uri: The absolute tracking URI, as ``resolve_tracking_uri`` gives it; it may hold a password.
        working_copy: The project's files and which version of them runs.
        entry_point: The entry point's name.
        parameters: Declared (defaults included) and extra parameters as text, unquoted.
        experiment_name: The experiment by name; it is created when it does not exist.
        experiment_id: The experiment by id. With neither, MLflow's own default is used: the variables
            ``MLFLOW_EXPERIMENT_NAME`` and ``MLFLOW_EXPERIMENT_ID``, else the experiment ``Default``.
        run_id: An existing run to continue; None creates a new one.
        run_name: The run's name; without one MLflow makes one up.
        parent_run_id: The run that this one is nested in.
        version: The requested branch, tag or commit; the working copy has the resolved one.
        backend: The backend's name.
        environment: The environment's kind: an environment manager's name or ``docker``. For ``local`` MLflow records
            nothing, and so do we.
        docker_image: The image's name, when the project runs in a container.
        flow_run_id: The Prefect flow run's id.
        flow_run_url: The flow run's page in Prefect's UI.
        tags: Further tags; they win over those made from the other fields.
    """

    tracking_uri: str = field(repr=False)
    working_copy: WorkingCopy
    entry_point: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    experiment_name: str | None = None
    experiment_id: str | None = None
    run_id: str | None = None
    run_name: str | None = None
    parent_run_id: str | None = None
    version: str | None = None
    backend: str = "local"
    environment: str | None = None
    docker_image: str | None = None
    flow_run_id: str | None = None
    flow_run_url: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run.

    Attributes:
        run_id: The run's id.
        experiment_id: The id of its experiment.
        tracking_uri: The absolute tracking URI; it may hold a password, so show ``masked_tracking_uri`` instead.
        url: The run's page in MLflow's UI; None when the store is not behind a server.
        hint: How to see the run when there is no ``url`` ("mlflow ui --backend-store-uri …"); else None.
        run_name: The run's name, when it is known.
    """

    run_id: str
    experiment_id: str
    tracking_uri: str = field(repr=False)
    url: str | None = None
    hint: str | None = None
    run_name: str | None = None

    @property
    def masked_tracking_uri(self) -> str:
        """The tracking URI with its password masked."""
        return redact(self.tracking_uri)


class Tracker(Protocol):
    """Keeps MLflow runs; every method may be called from many threads at once.

    Passing errors (a locked database, a server that restarts) are retried for some seconds before an error is raised.
    """

    def start(self, request: TrackingRequest) -> TrackedRun:
        """Creates the run with its tags and parameters, or continues ``request.run_id``; its status is RUNNING.

        What MLflow can't store is made to fit, with a warning in the log: long values are shortened, characters that
        are not allowed in names are replaced. Parameters that an existing run has with another value stay as they are,
        with a warning.

        Raises:
            TrackingError: The store can't be reached, opened or written; the experiment is deleted, unknown, or given
                by name and id at once; or the run to continue is unknown or deleted.
        """

    def adopt(self, run_id: str, tracking_uri: Secret) -> TrackedRun:
        """Returns an MLflow run that somebody else created and will end; changes nothing.

        Raises:
            TrackingError: The store can't be reached, or it has no such run.
        """

    def set_tags(self, run: TrackedRun, tags: Mapping[str, str]) -> None:
        """Sets tags of a run; nothing to set does nothing.

        Raises:
            TrackingError: The store can't be reached or written, or the run is gone.
        """

    def log_text(self, run: TrackedRun, name: str, text: str) -> None:
        """Keeps a text as an artifact of a run.

        Args:
            run: The run.
            name: The artifact's path, such as ``source/uncommitted-changes.patch``.
            text: What it holds.

        Raises:
            TrackingError: The store or its artifacts can't be reached or written, or the run is gone.
        """

    def finish(self, run: TrackedRun, status: FinalStatus, tags: Mapping[str, str] = MappingProxyType({})) -> None:
        """Sets the run's final status and end time, whatever the project's own code set, then the tags. Idempotent.

        Raises:
            TrackingError: The store could not be reached or written for some seconds. The project's run has ended all
                the same: report this, but don't let it replace the run's own result.
        """

    def metrics(self, run: TrackedRun) -> Mapping[str, float]:
        """Returns the last value of each of the run's metrics, in the order of their names.

        Raises:
            TrackingError: The store can't be reached or read, or the run is gone.
        """

    def close(self) -> None:
        """Lets go of what the tracker holds; a closed tracker must not be used. Calling it again does nothing."""
