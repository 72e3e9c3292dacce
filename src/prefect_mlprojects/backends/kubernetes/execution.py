"""Stays with a Job until it has ended: its log, its troubles, its end, and ours."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.contract import ExecutionEvents
from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Cluster
from prefect_mlprojects.backends.kubernetes.cleanup import delete_job, wait_until_gone
from prefect_mlprojects.backends.kubernetes.diagnosis import (
    Diagnosis,
    Trouble,
    explain_end,
    explain_pod,
    explain_refusal,
    failed_init_container,
    find_trouble,
    job_finished,
    project_ended_beside_others,
)
from prefect_mlprojects.backends.kubernetes.events import EventWatch
from prefect_mlprojects.backends.kubernetes.job import project_container
from prefect_mlprojects.backends.kubernetes.names import ENDED_LABEL, WATCHED_ANNOTATION
from prefect_mlprojects.backends.kubernetes.pod_logs import PodLogs
from prefect_mlprojects.backends.kubernetes.submission import Submission, now
from prefect_mlprojects.backends.kubernetes.watch import Change, Watcher
from prefect_mlprojects.backends.outcome import Outcome
from prefect_mlprojects.types import FailureCategory, StopSignal

HEARTBEAT_SECONDS = 30.0
_REMOVAL_SECONDS = 60.0
"""What the cluster may take beyond a pod's own grace period to remove it."""


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds.

    Attributes:
        start: For a pod that fails to start.
        scheduling: For a pod that waits for a node.
        timeout: For the whole run, from the Job's creation; None for no limit.
    """

    start: float
    scheduling: float
    timeout: float | None


class JobRun:
    """One Job on its way; made for one call of ``follow``.

    Args:
        cluster: The cluster.
        submission: The Job.
        selector: The label selector of its pods.
        limits: How long things may take.
        output: Takes the log.
        events: Takes what happens.
        stop: Asks for the end.
    """

    def __init__(
        self,
        cluster: Cluster,
        submission: Submission,
        selector: str,
        limits: Limits,
        output: TailedOutput,
        events: ExecutionEvents,
        stop: StopSignal,
    ) -> None:
        job = submission.job
        self._cluster = cluster
        self._job = dict(job)
        self._name: str = job["metadata"]["name"]
        self._uid: str = job["metadata"]["uid"]
        self._selector = selector
        self._limits = limits
        self._output = output
        self._events = events
        self._stop = stop
        pod_spec = job["spec"]["template"]["spec"]
        self._container: str = project_container(pod_spec)["name"]
        grace = pod_spec.get("terminationGracePeriodSeconds")
        self._termination_grace = 30.0 if grace is None else float(grace)
        several = max(job["spec"].get("parallelism") or 1, job["spec"].get("completions") or 1) > 1
        self._changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._pods: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, dict[str, Any]] = {}
        self._logs = PodLogs(cluster, self._container, several=several, output=output, report=events.report)
        self._event_watch = EventWatch(cluster, self._changes, events.report)
        self._told: set[tuple[str, str]] = set()
        self._trouble: tuple[Trouble, float] | None = None
        self._beside_since: float | None = None
        self._next_heartbeat = 0.0
        # Only a Job that was found has an age: the clocks of this machine and the cluster may differ.
        age = _age(job) if submission.attached else 0.0
        self._deadline = None if limits.timeout is None else time.monotonic() + limits.timeout - age

    def follow(self) -> Outcome:
        """Returns when the Job has ended and its log was read; a Job that was told to end is gone with its pods then.

        Raises:
            ApiRefusal: The API server refuses to show the Job or its pods; the Job was deleted then, if that was allowed.
        """
        batch, core = self._cluster.batch, self._cluster.core
        job_query, pod_query = {"field_selector": f"metadata.name={self._name}"}, {"label_selector": self._selector}
        changes, report = self._changes, self._events.report
        watchers = [
            Watcher("job", batch.list_namespaced_job, self._cluster, job_query, changes, report),
            Watcher("pods", core.list_namespaced_pod, self._cluster, pod_query, changes, report),
        ]
        forget = self._stop.on_request(lambda: self._changes.put(Change("stop")))
        for watcher in watchers:
            watcher.start()
        try:
            diagnosis = self._follow()
        except ApiRefusal as refusal:
            if not refusal.transient:
                self._ended_by_us(Diagnosis("not-started", explain_refusal(refusal, self._cluster.name)[0]))
            raise
        finally:
            forget()
            for watcher in watchers:
                watcher.request_stop()
            self._event_watch.stop()
            for watcher in watchers:
                watcher.stop()
            self._logs.abandon()
        return Outcome(
            diagnosis.ending,
            diagnosis.exit_code,
            diagnosis.signal,
            diagnosis.cause,
            diagnosis.advice,
            self._output.close(),
            diagnosis.category,
        )

    def _follow(self) -> Diagnosis:
        while True:
            if self._stop.requested:
                return self._ended_by_us(Diagnosis("stopped", str(self._stop.reason)))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                limit = f"it took longer than its timeout of {self._limits.timeout:g} s"
                return self._ended_by_us(Diagnosis("timed-out", limit))
            if job_finished(self._job):
                return self._ended_by_itself()
            given_up = self._check_trouble() or self._check_company()
            if given_up is not None:
                return self._ended_by_us(given_up)
            self._heartbeat()
            try:
                change = self._changes.get(timeout=self._seconds_to_wait())
            except queue.Empty:
                continue
            gone = self._take(change)
            if gone is not None:
                return gone

    def _seconds_to_wait(self) -> float:
        times = [self._next_heartbeat]
        if self._deadline is not None:
            times.append(self._deadline)
        if self._trouble is not None:
            times.append(self._trouble[1] + self._patience(self._trouble[0]))
        if self._beside_since is not None:
            times.append(self._beside_since + self._limits.start)
        return max(0.0, min(times) - time.monotonic())

    def _patience(self, trouble: Trouble) -> float:
        return self._limits.start if trouble.patience == "start" else self._limits.scheduling

    def _take(self, change: Change) -> Diagnosis | None:
        if change.kind == "events":
            self._event_watch.take(change)
        elif change.refusal is not None:
            raise change.refusal
        elif change.kind == "job":
            job = change.items.get(self._name)
            if job is None or job["metadata"].get("uid") != self._uid:
                return self._deleted_by_others()
            if job["metadata"].get("deletionTimestamp"):
                self._tell(self._name, "deleted", f"Job {self._name} is being deleted by somebody else.")
            self._job = job
        elif change.kind == "pods":
            self._take_pods(change.items)
        return None

    def _take_pods(self, pods: Mapping[str, dict[str, Any]]) -> None:
        self._pods = dict(pods)
        self._seen |= self._pods
        for name, pod in self._pods.items():
            node = (pod.get("spec") or {}).get("nodeName")
            if node:
                self._tell(name, "node", f"Pod {name} was given to node {node}.")
        self._logs.take(self._pods)

    def _tell(self, name: str, what: str, line: str) -> None:
        if (name, what) not in self._told:
            self._told.add((name, what))
            self._events.report(line)

    def _check_trouble(self) -> Diagnosis | None:
        pending = [name for name, pod in self._pods.items() if (pod.get("status") or {}).get("phase") == "Pending"]
        # Only events can tell why there is no pod, or why one gets no volume; all else is in a pod's status.
        self._event_watch.watch([*pending, self._name] if pending or not self._pods else ())
        trouble = find_trouble(self._job, self._pods.values(), self._event_watch.known, self._container)
        moment = time.monotonic()
        if trouble is None:
            self._trouble = None
            return None
        same = self._trouble is not None and self._trouble[0].patience == trouble.patience
        since = self._trouble[1] if self._trouble is not None and same else moment
        self._trouble = (trouble, since)
        patience = self._patience(trouble)
        self._tell(self._name, trouble.kind, f"Waiting: {trouble.cause}. The run fails if that lasts {patience:g} s.")
        if moment - since < patience:
            return None
        return Diagnosis("not-started", trouble.cause, trouble.advice, category=trouble.category)

    def _check_company(self) -> Diagnosis | None:
        found = project_ended_beside_others(self._pods.values(), self._container)
        if found is None:
            self._beside_since = None
            return None
        pod, diagnosis, others = found
        if self._beside_since is None:
            self._beside_since = time.monotonic()
        if time.monotonic() - self._beside_since < self._limits.start:
            return None
        self._events.report(
            f"The project ended in pod {pod['metadata']['name']}, but {', '.join(others)} went on for "
            f"{self._limits.start:g} s, so the Job would never end: it is deleted. Make it a sidecar that "
            "Kubernetes ends by itself: an init container with restartPolicy: Always."
        )
        return diagnosis

    def _heartbeat(self) -> None:
        moment = time.monotonic()
        if moment < self._next_heartbeat:
            return
        self._next_heartbeat = moment + HEARTBEAT_SECONDS
        self._patch({"annotations": {WATCHED_ANNOTATION: now()}}, patience=0.0)

    def _patch(self, metadata: dict[str, Any], patience: float) -> None:
        try:
            self._cluster.call(
                "patch jobs",
                self._cluster.batch.patch_namespaced_job,
                self._name,
                self._cluster.namespace,
                body={"metadata": {"uid": self._uid, **metadata}},
                patience=patience,
            )
        except ApiRefusal as refusal:
            if refusal.status == 403:
                cause, advice = explain_refusal(refusal, self._cluster.name)
                self._tell(self._name, "patch", f"Warning: {cause}. {advice}")

    def _deleted_by_others(self) -> Diagnosis:
        self._logs.expect_removal()
        self._logs.finish()
        if job_finished(self._job):
            return explain_end(self._job, self._seen.values(), self._container)
        ends = [explain_pod(pod, self._container) for pod in self._seen.values()]
        succeeded = next((end for end in ends if end is not None and end.exit_code == 0), None)
        if succeeded is not None:
            # A Job that is removed as soon as it has finished (ttlSecondsAfterFinished: 0) may be gone before it is seen so.
            return succeeded
        return Diagnosis(
            "exited",
            f"the Job {self._name} was deleted while it ran, and not by this run",
            "Somebody deleted it, or its namespace; 'kubectl get events' may tell who.",
            category=FailureCategory.INFRASTRUCTURE,
        )

    def _ended_by_itself(self) -> Diagnosis:
        self._read_pods_until_ended()
        diagnosis = explain_end(self._job, self._seen.values(), self._container)
        failed = failed_init_container(self._seen.values()) if diagnosis.ending == "not-started" else None
        if failed is not None:
            self._logs.report_tail(*failed)
        self._logs.finish()
        self._patch({"labels": {ENDED_LABEL: "true"}}, patience=10.0)
        return diagnosis

    def _read_pods_until_ended(self) -> None:
        """Reads the pods until none runs: a Job's end may be known before its pods' are, and before they have ended."""
        deadline, backoff = time.monotonic() + self._termination_grace + _REMOVAL_SECONDS, Backoff()
        while True:
            try:
                answer = self._cluster.call(
                    "list pods",
                    self._cluster.core.list_namespaced_pod,
                    self._cluster.namespace,
                    label_selector=self._selector,
                )
            except ApiRefusal as refusal:
                # The Job's end is known; what was seen of its pods has to do.
                self._events.report(f"Warning: {explain_refusal(refusal, self._cluster.name)[0]}.")
                return
            self._take_pods({pod["metadata"]["name"]: pod for pod in answer.get("items") or []})
            running = [
                pod for pod in self._pods.values() if pod.get("status", {}).get("phase") in ("Running", "Pending")
            ]
            if not running or time.monotonic() >= deadline:
                return
            time.sleep(min(2.0, backoff.next()))

    def _ended_by_us(self, diagnosis: Diagnosis) -> Diagnosis:
        """Deletes the Job, and returns when its pods are gone or can't be waited for any longer."""
        self._events.report(f"Deleting Job {self._name}: {diagnosis.cause}.")
        self._logs.expect_removal()
        try:
            delete_job(self._cluster, self._name, self._uid)
            left = wait_until_gone(
                self._cluster, self._name, self._uid, self._selector, self._termination_grace + _REMOVAL_SECONDS
            )
        except ApiRefusal as refusal:
            cause, _ = explain_refusal(refusal, self._cluster.name)
            left = (f"Job {self._name} ({cause})",)
        self._logs.finish()
        if not left:
            return diagnosis
        return replace(
            diagnosis,
            cause=f"{diagnosis.cause}; still there: {', '.join(left)}",
            advice=f"{diagnosis.advice} Look after it: kubectl -n {self._cluster.namespace} delete job {self._name}".strip(),
        )


def _age(job: Mapping[str, Any]) -> float:
    """Seconds since the Job was created; clocks may differ, so a negative age counts as none."""
    text = job["metadata"].get("creationTimestamp")
    if not text:
        return 0.0
    created = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    age = (datetime.now(timezone.utc) - created).total_seconds()
    # The timestamp has whole seconds: a Job of this moment may look a second old.
    return age if age > 2 else 0.0
