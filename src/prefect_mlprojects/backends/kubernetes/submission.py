"""Creates, finds, lists and deletes the Jobs of runs, with the Secrets and ConfigMaps that they own."""

from __future__ import annotations

import base64
import copy
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.contract import Report, RunIdentity
from prefect_mlprojects.backends.kubernetes.api import RETRY_SECONDS, ApiError, Cluster, connect
from prefect_mlprojects.backends.kubernetes.config import parse_kubernetes_config
from prefect_mlprojects.backends.kubernetes.delivery import ARCHIVE_FILE
from prefect_mlprojects.backends.kubernetes.diagnosis import job_finished, refused
from prefect_mlprojects.backends.kubernetes.job import (
    ATTEMPT_LABEL,
    ENDED_LABEL,
    FLOW_RUN_LABEL,
    MANAGED_BY_LABEL,
    MLFLOW_RUN_LABEL,
    PLAIN_VARIABLES,
    PREFIX,
    PREPARING_ANNOTATION,
    WATCHED_ANNOTATION,
    JobRequest,
    build_job,
    job_name,
    label_value,
)
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

JobState: TypeAlias = Literal["watched", "unwatched", "ended"]
_Kind: TypeAlias = Literal["Secret", "ConfigMap"]

HEARTBEAT_SECONDS = 30.0
_UNWATCHED_SECONDS = 4 * HEARTBEAT_SECONDS
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_NOT_FOUND = 404
_CONFLICT = 409


@dataclass(frozen=True)
class Submission:
    """A run's Job as the API server returned it; `attached` is true if it was submitted earlier."""

    job: dict[str, Any]
    attached: bool


def timestamp() -> str:
    """Returns the current time in Kubernetes' format."""
    return datetime.now(timezone.utc).strftime(_TIME_FORMAT)


def parse_time(text: str) -> datetime:
    """Parses a time in Kubernetes' format; returns the epoch for any other text."""
    try:
        return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=timezone.utc)
    except ValueError:
        return datetime.fromtimestamp(0, timezone.utc)


class Submitter:
    """Submits the Job of one flow run; `stop` ends the retries, `report` receives progress."""

    def __init__(self, cluster: Cluster, identity: RunIdentity, stop: StopSignal, report: Report) -> None:
        self._cluster = cluster
        self._identity = identity
        self._stop = stop
        self._report = report

    def submit(
        self, make_request: Callable[[str, int], JobRequest], make_archive: Callable[[], bytes | None]
    ) -> Submission:
        """Returns the flow run's Job: the one whose end nobody has observed yet, or a new one.

        The Job is created suspended, then the Secrets and the ConfigMap that it owns, then it is started: after a failure in
        between, deleting the Job removes everything, and a later call continues. Its name is derived from the flow run, so two
        callers can't both create it.

        Args:
            make_request: Returns the Job's inputs for a name and an attempt (from 1).
            make_archive: Returns the project's archive, if it is delivered as one.

        Raises:
            ApiError: The API server refused a request.
            BackendError: The Job can't be built.
        """
        identity, batch = self._identity, self._cluster.batch
        selector = f"{MANAGED_BY_LABEL}={PREFIX},{FLOW_RUN_LABEL}={label_value(identity.flow_run_id)}"
        answer = self._call("list jobs", batch.list_namespaced_job, self._cluster.namespace, label_selector=selector)
        jobs: list[dict[str, Any]] = sorted(answer.get("items") or [], key=_attempt)
        unfinished = [
            job
            for job in jobs
            if ENDED_LABEL not in job["metadata"].get("labels", {}) and not job["metadata"].get("deletionTimestamp")
        ]
        if unfinished:
            job, attached, attempt = unfinished[-1], True, _attempt(unfinished[-1])
            request = make_request(job["metadata"]["name"], attempt)
        else:
            attempt = max(map(_attempt, jobs), default=0) + 1
            request = make_request(job_name(identity, attempt), attempt)
            job, attached = self._create(request)
        if PREPARING_ANNOTATION in (job["metadata"].get("annotations") or {}):
            try:
                job = self._start(request, job, make_archive())
            except (ApiError, BackendError):
                # A suspended Job never ends, so nothing would remove it.
                with suppress(ApiError):
                    delete_job(self._cluster, request.name, job["metadata"]["uid"], retry_seconds=10.0)
                raise
        return Submission(job, attached)

    def _call(self, action: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        def on_retry(error: ApiError, delay: float) -> None:
            answer = error.status or error.message
            self._report(f"The API server answered {answer} to {error.action}; retrying in {delay:.1f} s.")

        return self._cluster.call(action, function, *arguments, stop=self._stop, on_retry=on_retry, **options)

    def _create(self, request: JobRequest) -> tuple[dict[str, Any], bool]:
        job = build_job(request)
        suspended = copy.deepcopy(job)
        suspended["metadata"]["annotations"] |= {
            PREPARING_ANNOTATION: "keep-suspended" if job["spec"].get("suspend") else "true",
            WATCHED_ANNOTATION: timestamp(),
        }
        suspended["spec"]["suspend"] = True
        batch, namespace = self._cluster.batch, self._cluster.namespace
        create, options = batch.create_namespaced_job, {"body": suspended, "field_validation": "Strict"}
        try:
            self._call("create jobs", create, namespace, dry_run="All", **options)
            return self._call("create jobs", create, namespace, **options), False
        except ApiError as error:
            if error.status != _CONFLICT or error.reason != "AlreadyExists":
                raise
        # An earlier request of ours whose answer was lost, or another process that runs the same flow run.
        return self._call("get jobs", batch.read_namespaced_job, request.name, namespace), True

    def _start(self, request: JobRequest, job: dict[str, Any], archive: bytes | None) -> dict[str, Any]:
        core, namespace = self._cluster.core, self._cluster.namespace
        for kind, body in build_dependents(request, archive, job):
            create = core.create_namespaced_secret if kind == "Secret" else core.create_namespaced_config_map
            try:
                self._call(f"create {kind.lower()}s", create, namespace, body=body)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
        patch: dict[str, Any] = {
            "metadata": {"uid": job["metadata"]["uid"], "annotations": {PREPARING_ANNOTATION: None}}
        }
        if job["metadata"]["annotations"][PREPARING_ANNOTATION] != "keep-suspended":
            patch["spec"] = {"suspend": False}
        return self._call("patch jobs", self._cluster.batch.patch_namespaced_job, request.name, namespace, body=patch)


def _attempt(job: dict[str, Any]) -> int:
    label = (job["metadata"].get("labels") or {}).get(ATTEMPT_LABEL, "")
    return int(label) if label.isdigit() else 1


def build_dependents(
    request: JobRequest, archive: bytes | None, owner: Mapping[str, Any]
) -> list[tuple[_Kind, dict[str, Any]]]:
    """Returns the manifests of the Secrets and the ConfigMap that the Job `owner` owns. Pure."""
    reference = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "blockOwnerDeletion": False,
        "controller": True,
    }
    dependents: list[tuple[_Kind, dict[str, Any]]] = []

    def add(kind: _Kind, name: str, **content: Any) -> None:
        labels = {**request.labels, MANAGED_BY_LABEL: PREFIX}
        metadata = {"name": name, "namespace": request.namespace, "labels": labels, "ownerReferences": [reference]}
        dependents.append((kind, {"apiVersion": "v1", "kind": kind, "metadata": metadata, **content}))

    variables = {name: value for name, value in request.child_env.items() if name not in PLAIN_VARIABLES}
    if request.checkout is not None:
        variables |= request.checkout.child_env
    if variables:
        data = {name: _base64(value.encode()) for name, value in variables.items()}
        add("Secret", request.variables_secret, type="Opaque", data=data)
    if request.registry_auth:
        login = {".dockerconfigjson": _base64(_docker_config(request.registry_auth).encode())}
        add("Secret", request.registry_secret, type="kubernetes.io/dockerconfigjson", data=login)
    if archive is not None:
        add("ConfigMap", request.archive_map, binaryData={ARCHIVE_FILE: _base64(archive)})
    return dependents


def _docker_config(auth: Mapping[str, Any]) -> str:
    """Returns ``docker_auth`` as the text of Docker's ``config.json``; secret."""
    username, password = str(auth.get("username", "")), str(auth.get("password", ""))
    registry = str(auth.get("registry") or auth.get("serveraddress") or "https://index.docker.io/v1/")
    login = {"username": username, "password": password, "auth": _base64(f"{username}:{password}".encode())}
    return json.dumps({"auths": {registry: login}})


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def delete_job(cluster: Cluster, name: str, uid: str | None = None, *, retry_seconds: float = RETRY_SECONDS) -> None:
    """Deletes a Job after its pods and Secrets; no-op if it is gone or was replaced by a Job with another `uid`.

    Raises:
        ApiError: The API server refused it.
    """
    body: dict[str, object] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
    if uid is not None:
        body["preconditions"] = {"uid": uid}
    delete = cluster.batch.delete_namespaced_job
    try:
        cluster.call("delete jobs", delete, name, cluster.namespace, body=body, retry_seconds=retry_seconds)
    except ApiError as error:
        if error.status not in (_NOT_FOUND, _CONFLICT):
            raise


def wait_until_gone(cluster: Cluster, name: str, uid: str, selector: str, seconds: float) -> tuple[str, ...]:
    """Waits until a Job and the pods that `selector` matches are gone, `seconds` at most.

    Returns:
        What still exists: each pod with its node, else the Job; empty when all is gone.

    Raises:
        ApiError: The API server refused a request.
    """
    deadline, backoff = time.monotonic() + seconds, Backoff(longest=2.0)
    while True:
        remaining = _remaining(cluster, name, uid, selector)
        if not remaining or time.monotonic() >= deadline:
            return remaining
        time.sleep(min(backoff.next(), max(0.0, deadline - time.monotonic())))


def _remaining(cluster: Cluster, name: str, uid: str, selector: str) -> tuple[str, ...]:
    pods = tuple(
        f"pod {pod['metadata']['name']} on node {(pod.get('spec') or {}).get('nodeName') or '?'}"
        for pod in cluster.list_pods(label_selector=selector)
    )
    if pods:
        return pods
    try:
        job = cluster.call("get jobs", cluster.batch.read_namespaced_job, name, cluster.namespace)
    except ApiError as error:
        if error.status == _NOT_FOUND:
            return ()
        raise
    return (f"Job {name}",) if job["metadata"].get("uid") == uid else ()


@dataclass(frozen=True)
class RunJob:
    """A run's Job on a cluster.

    Attributes:
        name: Name of the Job.
        namespace: Its namespace.
        state: ``watched`` while a process watches it, ``unwatched`` if that process is gone, ``ended`` once its end was observed.
        finished: Whether it has finished.
        created: Time of creation, RFC 3339.
        flow_run_id: ID of the flow run.
        mlflow_run_id: ID of the MLflow run.
        uid: Kubernetes' uid of the Job.
    """

    name: str
    namespace: str
    state: JobState
    finished: bool
    created: str
    flow_run_id: str
    mlflow_run_id: str
    uid: str


def _run_job(job: Mapping[str, Any], moment: datetime) -> RunJob:
    metadata = job["metadata"]
    labels, created = metadata.get("labels") or {}, metadata.get("creationTimestamp") or ""
    heartbeat = (metadata.get("annotations") or {}).get(WATCHED_ANNOTATION) or created
    state: JobState = "ended" if ENDED_LABEL in labels else "watched"
    if state == "watched" and (moment - parse_time(heartbeat)).total_seconds() > _UNWATCHED_SECONDS:
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


class RunJobs:
    """The Jobs of runs in a namespace, for ``mlprojects kubernetes``.

    Args:
        config: The backend's configuration, for the connection.

    Raises:
        BackendError: The configuration names no usable cluster.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._cluster = connect(parse_kubernetes_config(config))

    def list(self) -> list[RunJob]:
        """Returns the Jobs, the oldest first.

        Raises:
            BackendError: The API server refused it.
        """
        cluster, selector = self._cluster, f"{MANAGED_BY_LABEL}={PREFIX}"
        try:
            answer = cluster.call(
                "list jobs",
                cluster.batch.list_namespaced_job,
                cluster.namespace,
                label_selector=selector,
                retry_seconds=15.0,
            )
        except ApiError as error:
            raise refused(error, cluster.name) from None
        moment = datetime.now(timezone.utc)
        return sorted((_run_job(job, moment) for job in answer.get("items") or []), key=lambda job: job.created)

    def delete(self, job: RunJob) -> None:
        """Deletes a Job with its pods and Secrets.

        Raises:
            BackendError: The API server refused it.
        """
        try:
            delete_job(self._cluster, job.name, job.uid)
        except ApiError as error:
            raise refused(error, self._cluster.name) from None
