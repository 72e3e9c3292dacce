"""Stays with a Job until it has ended: its log, its troubles, its end, and ours."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from prefect_mlprojects._output import TailedOutput
from prefect_mlprojects.backends.base import ExecutionEvents, ExecutionOutcome
from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Backoff, Cluster
from prefect_mlprojects.backends.kubernetes.cleanup import delete_job, wait_until_gone
from prefect_mlprojects.backends.kubernetes.diagnosis import (
    Diagnosis,
    Trouble,
    explain_end,
    explain_refusal,
    find_trouble,
    job_finished,
    project_ended_beside_others,
)
from prefect_mlprojects.backends.kubernetes.job import project_container
from prefect_mlprojects.backends.kubernetes.logs import ContainerLog
from prefect_mlprojects.backends.kubernetes.names import ENDED_LABEL, WATCHED_ANNOTATION
from prefect_mlprojects.backends.kubernetes.submission import now
from prefect_mlprojects.backends.kubernetes.watch import Change, Watcher
from prefect_mlprojects.types import StopSignal

HEARTBEAT_SECONDS = 30.0
_EVENTS_SECONDS = 5.0
_LOG_SECONDS = 180.0
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
        job: The Job.
        selector: The label selector of its pods.
        limits: How long things may take.
        output: Takes the log.
        events: Takes what happens.
        stop: Asks for the end.
    """

    def __init__(
        self,
        cluster: Cluster,
        job: Mapping[str, Any],
        selector: str,
        limits: Limits,
        output: TailedOutput,
        events: ExecutionEvents,
        stop: StopSignal,
    ) -> None:
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
        self._termination_grace = float(pod_spec.get("terminationGracePeriodSeconds") or 30)
        self._several = max(job["spec"].get("parallelism") or 1, job["spec"].get("completions") or 1) > 1
        self._changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._pods: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, dict[str, Any]] = {}
        self._logs: dict[tuple[str, int], ContainerLog] = {}
        self._told: set[tuple[str, str]] = set()
        self._trouble: tuple[Trouble, float] | None = None
        self._beside_since: float | None = None
        self._known_events: list[dict[str, Any]] = []
        self._next_events = 0.0
        self._next_heartbeat = 0.0
        self._deadline = None if limits.timeout is None else time.monotonic() + limits.timeout - _age(job)

    def follow(self) -> ExecutionOutcome:
        """Returns when the Job has ended and its log was read; a Job that was told to end is gone with its pods then.

        Raises:
            ApiRefusal: The API server refuses to show the Job or its pods.
        """
        batch, core = self._cluster.batch, self._cluster.core
        watchers = [
            Watcher(
                "job",
                batch.list_namespaced_job,
                self._cluster,
                {"field_selector": f"metadata.name={self._name}"},
                self._changes,
                self._events.report,
            ),
            Watcher(
                "pods",
                core.list_namespaced_pod,
                self._cluster,
                {"label_selector": self._selector},
                self._changes,
                self._events.report,
            ),
        ]
        forget = self._stop.on_request(lambda: self._changes.put(Change("stop")))
        for watcher in watchers:
            watcher.start()
        try:
            diagnosis = self._follow()
        finally:
            forget()
            for watcher in watchers:
                watcher.stop()
            for log in self._logs.values():
                log.abandon()
        return ExecutionOutcome(
            diagnosis.ending,
            diagnosis.exit_code,
            diagnosis.signal,
            diagnosis.cause,
            diagnosis.advice,
            self._output.close(),
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
        moment = time.monotonic()
        times = [self._next_heartbeat]
        if self._deadline is not None:
            times.append(self._deadline)
        if self._trouble is not None:
            times.append(self._trouble[1] + self._patience(self._trouble[0]))
        if self._beside_since is not None:
            times.append(self._beside_since + self._limits.start)
        if self._wants_events():
            times.append(self._next_events)
        return max(0.0, min(times) - moment)

    def _patience(self, trouble: Trouble) -> float:
        return self._limits.start if trouble.patience == "start" else self._limits.scheduling

    def _take(self, change: Change) -> Diagnosis | None:
        if change.refusal is not None:
            raise change.refusal
        if change.kind == "job":
            job = change.items.get(self._name)
            if job is None or job["metadata"].get("uid") != self._uid:
                return self._deleted_by_others()
            if job["metadata"].get("deletionTimestamp"):
                self._tell(self._name, "deleted", f"Job {self._name} is being deleted by somebody else.")
            self._job = job
        elif change.kind == "pods":
            self._pods = dict(change.items)
            self._seen |= self._pods
            for pod in sorted(self._pods.values(), key=lambda each: each["metadata"].get("creationTimestamp") or ""):
                self._take_pod(pod)
        return None

    def _take_pod(self, pod: dict[str, Any]) -> None:
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        node = (pod.get("spec") or {}).get("nodeName")
        if node:
            self._tell(name, "node", f"Pod {name} was given to node {node}.")
        for container in status.get("containerStatuses") or []:
            if container.get("name") != self._container:
                continue
            state, instance = container.get("state") or {}, int(container.get("restartCount") or 0)
            for (log_pod, log_instance), log in self._logs.items():
                if log_pod == name and log_instance < instance:
                    log.container_ended(instance)
            crashed = "waiting" in state and (container.get("lastState") or {}).get("terminated")
            if "running" in state or "terminated" in state or crashed:
                self._follow_log(name, instance)
            if "terminated" in state or crashed:
                self._logs[name, instance].container_ended(instance)

    def _follow_log(self, pod: str, instance: int) -> None:
        if (pod, instance) in self._logs:
            return
        again = f" (restart {instance})" if instance else ""
        self._events.report(f"Pod {pod} runs the project{again}.")
        # The first pod's lines need no mark: only when it fails, others follow.
        first = not self._logs and not self._several
        mark = "" if first or (len({name for name, _ in self._logs} | {pod}) == 1) else f"[{pod}] "
        if self._several:
            mark = f"[{pod}] "
        self._logs[pod, instance] = ContainerLog(
            self._cluster, pod, self._container, instance, self._output, mark, self._events.report
        )

    def _tell(self, name: str, what: str, line: str) -> None:
        if (name, what) not in self._told:
            self._told.add((name, what))
            self._events.report(line)

    def _wants_events(self) -> bool:
        """Whether only the cluster's events can tell why nothing runs: a pod that starts shows the rest in its status."""
        if self._next_events == float("inf"):
            return False
        if not self._pods:
            return True
        return any((pod.get("status") or {}).get("phase") == "Pending" for pod in self._pods.values())

    def _read_events(self) -> None:
        if not self._wants_events() or time.monotonic() < self._next_events:
            return
        names = [
            self._name,
            *(name for name, pod in self._pods.items() if pod.get("status", {}).get("phase") == "Pending"),
        ]
        found: list[dict[str, Any]] = []
        try:
            for name in names[:5]:
                answer = self._cluster.call(
                    "list events",
                    self._cluster.core.list_namespaced_event,
                    self._cluster.namespace,
                    field_selector=f"involvedObject.name={name}",
                    patience=0.0,
                )
                found += answer.get("items") or []
        except ApiRefusal as refusal:
            # Without them the diagnosis has fewer words; nothing else depends on them.
            if not refusal.transient:
                self._next_events = float("inf")
                self._events.report(explain_refusal(refusal, self._cluster.name)[0] + "; going on without events.")
                return
        self._known_events = found or self._known_events
        self._next_events = time.monotonic() + _EVENTS_SECONDS

    def _check_trouble(self) -> Diagnosis | None:
        self._read_events()
        trouble = find_trouble(self._job, self._pods.values(), self._known_events)
        moment = time.monotonic()
        if trouble is None:
            self._trouble = None
            return None
        since = (
            self._trouble[1] if self._trouble is not None and self._trouble[0].patience == trouble.patience else moment
        )
        self._trouble = (trouble, since)
        patience = self._patience(trouble)
        self._tell(self._name, trouble.kind, f"Waiting: {trouble.cause}. The run fails if that lasts {patience:g} s.")
        if moment - since < patience:
            return None
        return Diagnosis("not-started", trouble.cause, trouble.advice)

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
        self._finish_logs(quiet=True)
        return Diagnosis(
            "exited",
            f"the Job {self._name} was deleted while it ran, and not by this run",
            "Somebody deleted it, or its namespace; 'kubectl get events' may tell who.",
        )

    def _ended_by_itself(self) -> Diagnosis:
        self._read_pods_until_ended()
        diagnosis = explain_end(self._job, self._seen.values(), self._container)
        self._finish_logs()
        self._patch({"labels": {ENDED_LABEL: "true"}}, patience=10.0)
        return diagnosis

    def _read_pods_until_ended(self) -> None:
        """Reads the pods until none runs: a Job's end may be known before its pods' are, and before they have ended."""
        deadline, backoff = time.monotonic() + self._termination_grace + _REMOVAL_SECONDS, Backoff()
        while True:
            answer = self._cluster.call(
                "list pods",
                self._cluster.core.list_namespaced_pod,
                self._cluster.namespace,
                label_selector=self._selector,
            )
            self._take(Change("pods", {pod["metadata"]["name"]: pod for pod in answer.get("items") or []}))
            running = [
                pod for pod in self._pods.values() if pod.get("status", {}).get("phase") in ("Running", "Pending")
            ]
            if not running or time.monotonic() >= deadline:
                return
            time.sleep(min(2.0, backoff.next()))

    def _finish_logs(self, *, quiet: bool = False) -> None:
        for (pod, instance), log in self._logs.items():
            if quiet:
                log.expect_removal()
            log.container_ended(instance)
            if not log.finish(_LOG_SECONDS):
                self._events.report(f"Warning: the log of pod {pod} could not be read to its end.")

    def _ended_by_us(self, diagnosis: Diagnosis) -> Diagnosis:
        """Deletes the Job, and returns when its pods are gone or can't be waited for any longer."""
        self._events.report(f"Deleting Job {self._name}: {diagnosis.cause}.")
        for log in self._logs.values():
            log.expect_removal()
        try:
            delete_job(self._cluster, self._name, self._uid)
            left = wait_until_gone(
                self._cluster, self._name, self._uid, self._selector, self._termination_grace + _REMOVAL_SECONDS
            )
        except ApiRefusal as refusal:
            cause, _ = explain_refusal(refusal, self._cluster.name)
            left = (f"Job {self._name} ({cause})",)
        self._finish_logs(quiet=True)
        if not left:
            return diagnosis
        return Diagnosis(
            diagnosis.ending,
            f"{diagnosis.cause}; still there: {', '.join(left)}",
            f"{diagnosis.advice} Look after it: kubectl -n {self._cluster.namespace} delete job {self._name}".strip(),
            diagnosis.exit_code,
            diagnosis.signal,
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
