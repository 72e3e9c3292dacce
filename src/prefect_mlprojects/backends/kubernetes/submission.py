"""Submits a run's Job once: finds the one that is there already, else checks, creates and starts it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from prefect_mlprojects.backends.contract import RunIdentity
from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Cluster
from prefect_mlprojects.backends.kubernetes.cleanup import delete_job
from prefect_mlprojects.backends.kubernetes.job import JobRequest, build_job
from prefect_mlprojects.backends.kubernetes.names import (
    ATTEMPT_LABEL,
    ENDED_LABEL,
    PREPARING_ANNOTATION,
    WATCHED_ANNOTATION,
    flow_run_selector,
    job_name,
)
from prefect_mlprojects.backends.kubernetes.parts import build_parts
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

_ALREADY_EXISTS = 409


@dataclass(frozen=True)
class Submission:
    """A Job that runs for us.

    Attributes:
        job: The Job as the API server returned it.
        attached: Whether it had been submitted earlier.
    """

    job: dict[str, Any]
    attached: bool


def now() -> str:
    """Returns the time as Kubernetes writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def submit(
    cluster: Cluster,
    identity: RunIdentity,
    make_request: Callable[[str, int], JobRequest],
    make_archive: Callable[[], bytes | None],
    stop: StopSignal,
    report: Callable[[str], None],
) -> Submission:
    """Returns the Job of a flow run: the one that nobody has seen end yet, or a new one.

    A Job is created suspended, then the Secret and ConfigMap that it owns, then it is started: whatever fails in between,
    nothing is left that its deletion does not remove, and a later call goes on where this one stopped. Its name follows from the
    flow run, so that two callers can't both create it.

    Args:
        cluster: The cluster.
        identity: Who the run is.
        make_request: Makes the Job's parts for a name and an attempt, counted from 1.
        make_archive: Makes the project's archive, where one is delivered.
        stop: Ends the waiting for a server that is away.
        report: Takes lines about trouble.

    Raises:
        ApiRefusal: The API server refused something.
        BackendError: The Job can't be built.
    """

    def on_wait(refusal: ApiRefusal, delay: float) -> None:
        report(
            f"The API server answered {refusal.status or refusal.message} to {refusal.action}; again in {delay:.1f} s."
        )

    answer = cluster.call(
        "list jobs",
        cluster.batch.list_namespaced_job,
        cluster.namespace,
        label_selector=flow_run_selector(identity.flow_run_id),
        stop=stop,
        on_wait=on_wait,
    )
    jobs: list[dict[str, Any]] = sorted(answer.get("items") or [], key=_attempt)
    unfinished = [
        job
        for job in jobs
        if ENDED_LABEL not in job["metadata"].get("labels", {}) and not job["metadata"].get("deletionTimestamp")
    ]
    attempt = _attempt(unfinished[-1]) if unfinished else max(map(_attempt, jobs), default=0) + 1
    request = make_request(unfinished[-1]["metadata"]["name"] if unfinished else job_name(identity, attempt), attempt)
    if unfinished:
        job, attached = unfinished[-1], True
    else:
        job, attached = _create(cluster, request, stop, on_wait)
    if PREPARING_ANNOTATION in (job["metadata"].get("annotations") or {}):
        try:
            job = _start(cluster, request, job, make_archive(), stop, on_wait)
        except (ApiRefusal, BackendError):
            # What can't be started must not be left: a suspended Job never ends, and nothing removes it.
            with suppress(ApiRefusal):
                delete_job(cluster, request.name, job["metadata"]["uid"], patience=10.0)
            raise
    return Submission(job, attached)


def _attempt(job: dict[str, Any]) -> int:
    label = (job["metadata"].get("labels") or {}).get(ATTEMPT_LABEL, "")
    return int(label) if label.isdigit() else 1


def _create(cluster: Cluster, request: JobRequest, stop: StopSignal, on_wait: Any) -> tuple[dict[str, Any], bool]:
    job = build_job(request)
    suspended = copy.deepcopy(job)
    suspended["metadata"]["annotations"] |= {
        PREPARING_ANNOTATION: "keep-suspended" if job["spec"].get("suspend") else "true",
        WATCHED_ANNOTATION: now(),
    }
    suspended["spec"]["suspend"] = True
    options: dict[str, Any] = {"body": suspended, "field_validation": "Strict", "stop": stop, "on_wait": on_wait}
    create = cluster.batch.create_namespaced_job
    try:
        cluster.call("create jobs", create, cluster.namespace, dry_run="All", **options)
        return cluster.call("create jobs", create, cluster.namespace, **options), False
    except ApiRefusal as refusal:
        if refusal.status != _ALREADY_EXISTS or refusal.reason != "AlreadyExists":
            raise
    # An earlier try of ours whose answer was lost, or another process that goes for the same flow run.
    found = cluster.call("get jobs", cluster.batch.read_namespaced_job, request.name, cluster.namespace, stop=stop)
    return found, True


def _start(
    cluster: Cluster, request: JobRequest, job: dict[str, Any], archive: bytes | None, stop: StopSignal, on_wait: Any
) -> dict[str, Any]:
    creators = {
        "Secret": ("create secrets", cluster.core.create_namespaced_secret),
        "ConfigMap": ("create configmaps", cluster.core.create_namespaced_config_map),
    }
    for kind, body in build_parts(request, archive, job):
        action, create = creators[kind]
        try:
            cluster.call(action, create, cluster.namespace, body=body, stop=stop, on_wait=on_wait)
        except ApiRefusal as refusal:
            if refusal.reason != "AlreadyExists":
                raise
    stays = job["metadata"]["annotations"][PREPARING_ANNOTATION] == "keep-suspended"
    return cluster.call(
        "patch jobs",
        cluster.batch.patch_namespaced_job,
        request.name,
        cluster.namespace,
        body={
            "metadata": {"uid": job["metadata"]["uid"], "annotations": {PREPARING_ANNOTATION: None}},
            **({} if stays else {"spec": {"suspend": False}}),
        },
        stop=stop,
        on_wait=on_wait,
    )
