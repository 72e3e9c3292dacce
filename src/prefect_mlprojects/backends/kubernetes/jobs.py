"""Finds the Jobs that runs left on a cluster, and removes those that nobody watches any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Cluster
from prefect_mlprojects.backends.kubernetes.cleanup import delete_job
from prefect_mlprojects.backends.kubernetes.config import BACKEND, parse_kubernetes_config
from prefect_mlprojects.backends.kubernetes.connection import connect
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal, job_finished
from prefect_mlprojects.backends.kubernetes.execution import HEARTBEAT_SECONDS
from prefect_mlprojects.backends.kubernetes.names import (
    ENDED_LABEL,
    FLOW_RUN_LABEL,
    MANAGED_BY_LABEL,
    MLFLOW_RUN_LABEL,
    PREFIX,
    WATCHED_ANNOTATION,
)
from prefect_mlprojects.exceptions import BackendError

JobState: TypeAlias = Literal["watched", "unwatched", "ended"]

_UNWATCHED_SECONDS = 4 * HEARTBEAT_SECONDS


@dataclass(frozen=True)
class RunJob:
    """A run's Job on a cluster.

    Attributes:
        name: Its name.
        namespace: Its namespace.
        state: ``watched`` while a process stays with it, ``unwatched`` when that process has gone, ``ended`` once its end was
            seen.
        finished: Whether it has ended.
        created: When it was created, RFC 3339.
        flow_run_id: The flow run's id.
        mlflow_run_id: The MLflow run's id.
        uid: Its uid.
    """

    name: str
    namespace: str
    state: JobState
    finished: bool
    created: str
    flow_run_id: str
    mlflow_run_id: str
    uid: str


def describe_job(job: Mapping[str, Any], moment: datetime) -> RunJob:
    """Returns what there is to say of a Job; pure.

    Args:
        job: The Job.
        moment: The time now.
    """
    metadata = job["metadata"]
    labels, created = metadata.get("labels") or {}, metadata.get("creationTimestamp") or ""
    watched = (metadata.get("annotations") or {}).get(WATCHED_ANNOTATION) or created
    state: JobState = "ended" if ENDED_LABEL in labels else "watched"
    if state == "watched" and (moment - _time(watched)).total_seconds() > _UNWATCHED_SECONDS:
        state = "unwatched"
    return RunJob(
        metadata["name"],
        metadata["namespace"],
        state,
        job_finished(job),
        created,
        labels.get(FLOW_RUN_LABEL, ""),
        labels.get(MLFLOW_RUN_LABEL, ""),
        metadata["uid"],
    )


def _time(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return datetime.fromtimestamp(0, timezone.utc)


class RunJobs:
    """The Jobs of runs in a namespace.

    Args:
        config: The backend's configuration, for the way into the cluster.

    Raises:
        BackendError: There is no way into the cluster.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        parsed = parse_kubernetes_config(config)
        self._cluster = Cluster(*connect(parsed))

    def list(self) -> list[RunJob]:
        """Returns the Jobs, the oldest first.

        Raises:
            BackendError: The cluster refused to list them.
        """
        try:
            answer = self._cluster.call(
                "list jobs",
                self._cluster.batch.list_namespaced_job,
                self._cluster.namespace,
                label_selector=f"{MANAGED_BY_LABEL}={PREFIX}",
                patience=15.0,
            )
        except ApiRefusal as refusal:
            raise self._error(refusal) from None
        moment = datetime.now(timezone.utc)
        return sorted((describe_job(job, moment) for job in answer.get("items") or []), key=lambda job: job.created)

    def delete(self, job: RunJob) -> None:
        """Deletes a Job with its pods and Secrets.

        Raises:
            BackendError: The cluster refused it.
        """
        try:
            delete_job(self._cluster, job.name, job.uid)
        except ApiRefusal as refusal:
            raise self._error(refusal) from None

    def _error(self, refusal: ApiRefusal) -> BackendError:
        cause, advice = explain_refusal(refusal, self._cluster.name)
        return BackendError(f"{cause[:1].upper()}{cause[1:]}. {advice}".strip(), backend=BACKEND)
