"""Ends Jobs: deletes them with all that belongs to them, and waits until their pods are gone."""

from __future__ import annotations

import time

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.kubernetes.api import PATIENCE_SECONDS, ApiRefusal, Cluster

_NOT_FOUND = 404
_CONFLICT = 409


def delete_job(cluster: Cluster, name: str, uid: str | None = None, *, patience: float = PATIENCE_SECONDS) -> None:
    """Deletes a Job; its pods and Secrets go first. One that is gone, or was replaced by another, is left alone.

    Args:
        cluster: The cluster.
        name: The Job's name.
        uid: The Job's uid, so that no other of the same name is deleted.
        patience: Seconds to try again for while the server is away.

    Raises:
        ApiRefusal: It was refused.
    """
    body: dict[str, object] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
    if uid is not None:
        body["preconditions"] = {"uid": uid}
    try:
        delete = cluster.batch.delete_namespaced_job
        cluster.call("delete jobs", delete, name, cluster.namespace, body=body, patience=patience)
    except ApiRefusal as refusal:
        if refusal.status not in (_NOT_FOUND, _CONFLICT):
            raise


def wait_until_gone(cluster: Cluster, name: str, uid: str, selector: str, seconds: float) -> tuple[str, ...]:
    """Waits until a Job and its pods are gone.

    Args:
        cluster: The cluster.
        name: The Job's name.
        uid: The Job's uid.
        selector: The label selector of its pods.
        seconds: How long to wait.

    Returns:
        What is still there: nothing when all is gone, else each pod with its node, or the Job.

    Raises:
        ApiRefusal: The API server refused to tell.
    """
    deadline, backoff = time.monotonic() + seconds, Backoff()
    while True:
        left = _left(cluster, name, uid, selector)
        if not left or time.monotonic() >= deadline:
            return left
        # A pod ends within its grace period: the first looks are soon, later ones are rare.
        time.sleep(min(backoff.next(), 2.0, max(0.0, deadline - time.monotonic())))


def _left(cluster: Cluster, name: str, uid: str, selector: str) -> tuple[str, ...]:
    answer = cluster.call("list pods", cluster.core.list_namespaced_pod, cluster.namespace, label_selector=selector)
    pods = tuple(
        f"pod {pod['metadata']['name']} on node {(pod.get('spec') or {}).get('nodeName') or '?'}"
        for pod in answer.get("items") or []
    )
    if pods:
        return pods
    try:
        job = cluster.call("get jobs", cluster.batch.read_namespaced_job, name, cluster.namespace)
    except ApiRefusal as refusal:
        if refusal.status == _NOT_FOUND:
            return ()
        raise
    return (f"Job {name}",) if job["metadata"].get("uid") == uid else ()
