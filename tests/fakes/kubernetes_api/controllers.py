"""What the controller manager does: Jobs make pods, deleted owners take their dependents with them."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone

from .store import ApiError, Json, Store, now

POD_RETRY_SECONDS = 0.3
"""The first pause before a failed pod's successor; ten seconds in the real controller."""


ACCOUNT_SECONDS = 0.3
"""How long a new namespace has no service account."""


class Controllers:
    """The controllers of Jobs, garbage, namespaces and service accounts, in one thread.

    Args:
        store: The cluster's objects.
        create_pod: Creates a pod as the API server does, with its admission.
        record: Records an event.
    """

    def __init__(
        self, store: Store, create_pod: Callable[[Json], Json], record: Callable[[str, Json, str, str, str], None]
    ) -> None:
        self._store = store
        self._create_pod = create_pod
        self._record = record
        self._stopping = threading.Event()
        self._retry_at: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._ends: dict[str, tuple[str, str, str]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        with self._store.changed:
            self._store.changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            version = self._store.version
            for job in self._store.list("jobs"):
                with contextlib.suppress(ApiError):
                    self._sync_job(job)
            self._collect()
            self._finalize()
            self._add_accounts()
            with self._store.changed:
                if self._store.version == version:
                    self._store.changed.wait(0.2)

    def _sync_job(self, job: Json) -> None:  # noqa: C901 - the controller's cases, one after another
        metadata, spec = job["metadata"], job["spec"]
        uid, namespace = metadata["uid"], metadata["namespace"]
        if "deletionTimestamp" in metadata or self._expire(job):
            return
        if _done(job):
            return
        pods = [each for each in self._store.list("pods", namespace) if _owned(each, uid)]
        alive = [each for each in pods if each["status"].get("phase") not in ("Succeeded", "Failed")]
        active = [each for each in alive if "deletionTimestamp" not in each["metadata"]]
        succeeded = sum(each["status"].get("phase") == "Succeeded" for each in pods)
        failed = sum(each["status"].get("phase") == "Failed" for each in pods)
        failed += sum(
            status.get("restartCount", 0) for each in pods for status in each["status"].get("containerStatuses") or []
        )
        if spec.get("suspend"):
            for pod in active:
                self._delete_pod(pod)
            self._set(job, _suspend)
            return
        if "startTime" not in job["status"]:
            self._set(job, lambda status: status.update(startTime=now(), active=0))
            return
        # What was found first stays the reason, as the real controller's condition FailureTarget does.
        end = self._ends.get(uid)
        if end is not None:
            pass
        elif succeeded >= spec["completions"]:
            end = ("Complete", "CompletionsReached", "Reached expected number of succeeded pods")
        elif failed > spec["backoffLimit"]:
            end = ("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        elif spec.get("activeDeadlineSeconds") and _age(job["status"]["startTime"]) > spec["activeDeadlineSeconds"]:
            end = ("Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
        if end is not None:
            self._ends[uid] = end
            for pod in active:
                self._delete_pod(pod)
            # Its final condition comes when its pods have ended; until then there is only the target.
            if not alive:
                self._finish(job, end, succeeded, failed)
            return
        self._set(
            job, lambda status: status.update(active=len(active), succeeded=succeeded, failed=failed, ready=len(active))
        )
        wanted = min(spec["parallelism"], spec["completions"] - succeeded)
        if len(active) < wanted and len(alive) < wanted:
            self._add_pod(job, failed)

    def _finish(self, job: Json, end: tuple[str, str, str], succeeded: int, failed: int) -> None:
        kind, reason, message = end
        conditions = [
            {"type": each, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now()}
            for each in ({"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[kind], kind)
        ]

        def change(status: Json) -> None:
            status.update(conditions=conditions, active=0, succeeded=succeeded, failed=failed)
            if kind == "Complete":
                status["completionTime"] = now()

        self._set(job, change)
        self._record("Normal" if kind == "Complete" else "Warning", job, "Job", reason, message)

    def _expire(self, job: Json) -> bool:
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        done = _done(job)
        if ttl is None or done is None or _age(done["lastTransitionTime"]) < ttl:
            return False
        self._store.remove("jobs", job["metadata"]["namespace"], job["metadata"]["name"])
        return True

    def _add_pod(self, job: Json, failed: int) -> None:
        uid, name = job["metadata"]["uid"], job["metadata"]["name"]
        moment = time.monotonic()
        # One round without change after a failure: the pause doubles with each.
        key = f"{uid}/{failed}"
        if failed and key not in self._retry_at:
            self._retry_at[key] = moment + POD_RETRY_SECONDS * 2 ** min(failed - 1, 6)
        if moment < max(self._retry_at.get(key, 0.0), self._retry_at.get(f"{uid}/refused", 0.0)):
            return
        template = job["spec"]["template"]
        labels = {
            **(template.get("metadata", {}).get("labels") or {}),
            "job-name": name,
            "controller-uid": uid,
            "batch.kubernetes.io/job-name": name,
            "batch.kubernetes.io/controller-uid": uid,
        }
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": name,
            "uid": uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
        suffix = "".join(random.choice("bcdfghjklmnpqrstvwxz2456789") for _ in range(5))
        pod = {
            "metadata": {
                "name": f"{name[:57]}-{suffix}",
                "namespace": job["metadata"]["namespace"],
                "labels": labels,
                "annotations": dict(template.get("metadata", {}).get("annotations") or {}),
                "ownerReferences": [owner],
            },
            "spec": template["spec"],
        }
        try:
            created = self._create_pod(pod)
        except ApiError as error:
            self._retry_at[f"{uid}/refused"] = moment + 1.0
            if self._refused.get(uid) != error.message:
                self._refused[uid] = error.message
                self._record("Warning", job, "Job", "FailedCreate", f"Error creating: {error.message}")
            return
        self._record("Normal", job, "Job", "SuccessfulCreate", f"Created pod: {created['metadata']['name']}")

    def _set(self, job: Json, change: Callable[[Json], object]) -> None:
        self._store.update(
            "jobs", job["metadata"]["namespace"], job["metadata"]["name"], lambda body: change(body["status"])
        )

    def _delete_pod(self, pod: Json) -> None:
        delete_gracefully(self._store, pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _collect(self) -> None:
        """Removes dependents whose owner is gone or is being deleted in the foreground."""
        jobs = {job["metadata"]["uid"]: job for job in self._store.list("jobs")}
        for plural in ("pods", "secrets", "configmaps"):
            for each in self._store.list(plural):
                owners = each["metadata"].get("ownerReferences") or []
                if not owners or any(
                    owner["uid"] in jobs and "deletionTimestamp" not in jobs[owner["uid"]]["metadata"]
                    for owner in owners
                ):
                    continue
                if plural == "pods":
                    self._delete_pod(each)
                else:
                    self._store.remove(plural, each["metadata"]["namespace"], each["metadata"]["name"])
        for job in jobs.values():
            metadata = job["metadata"]
            if "foregroundDeletion" in (metadata.get("finalizers") or []) and not self._blocking(job):
                self._store.remove("jobs", metadata["namespace"], metadata["name"])

    def _blocking(self, job: Json) -> bool:
        return any(
            owner["uid"] == job["metadata"]["uid"] and owner.get("blockOwnerDeletion")
            for plural in ("pods", "secrets", "configmaps")
            for each in self._store.list(plural, job["metadata"]["namespace"])
            for owner in each["metadata"].get("ownerReferences") or []
        )

    def _finalize(self) -> None:
        for namespace in self._store.list("namespaces"):
            if "deletionTimestamp" not in namespace["metadata"]:
                continue
            name, left = namespace["metadata"]["name"], 0
            for plural in (
                "jobs",
                "pods",
                "secrets",
                "configmaps",
                "events",
                "serviceaccounts",
                "resourcequotas",
                "roles",
                "rolebindings",
            ):
                for each in self._store.list(plural, name):
                    if plural == "pods":
                        self._delete_pod(each)
                        left += 1
                    else:
                        self._store.remove(plural, name, each["metadata"]["name"])
            if not left:
                self._store.remove("namespaces", "", name)

    def _add_accounts(self) -> None:
        """Gives each namespace its service account, a moment after it was made; until then no pod can be."""
        for namespace in self._store.list("namespaces"):
            metadata = namespace["metadata"]
            if "deletionTimestamp" in metadata or self._store.find("serviceaccounts", metadata["name"], "default"):
                continue
            key = f"{metadata['uid']}/account"
            if time.monotonic() >= self._retry_at.setdefault(key, time.monotonic() + ACCOUNT_SECONDS):
                self._store.create("serviceaccounts", {"metadata": {"name": "default", "namespace": metadata["name"]}})


def delete_gracefully(store: Store, namespace: str, name: str, grace: int | None = None) -> None:
    """Marks a pod as being deleted; the kubelet ends it and removes it."""

    def change(body: Json) -> None:
        if "deletionTimestamp" not in body["metadata"]:
            seconds = body["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace
            body["metadata"] |= {"deletionTimestamp": now(seconds), "deletionGracePeriodSeconds": seconds}

    with contextlib.suppress(ApiError):
        store.update("pods", namespace, name, change)


def _owned(body: Json, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in body["metadata"].get("ownerReferences") or [])


def _done(job: Json) -> Json | None:
    conditions: list[Json] = job["status"].get("conditions") or []
    return next((each for each in conditions if each["type"] in ("Complete", "Failed")), None)


def _age(text: str) -> float:
    then = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    return (datetime.now(timezone.utc) - then).total_seconds()


def _suspend(status: Json) -> None:
    status["active"] = 0
    status.pop("startTime", None)
