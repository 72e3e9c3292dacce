"""Watches a Job until it has ended: forwards its log, reports problems, and deletes it on a stop request or time-out."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.contract import ExecutionEvents, Report
from prefect_mlprojects.backends.kubernetes import diagnosis, manifest
from prefect_mlprojects.backends.kubernetes.api import ApiError, Change, Cluster, Json, Watcher, nested
from prefect_mlprojects.backends.kubernetes.config import KubernetesConfig
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal, final_condition
from prefect_mlprojects.backends.kubernetes.logs import PodLogs
from prefect_mlprojects.backends.kubernetes.submission import HEARTBEAT_SECONDS, seconds_since, timestamp
from prefect_mlprojects.backends.outcome import Outcome, stopped_outcome, timed_out_outcome
from prefect_mlprojects.types import FailureCategory, StopSignal

_REMOVAL_SECONDS = 60.0  # how long the cluster may take to remove a pod beyond its grace period
_MAX_EVENT_WATCHES = 5  # how many objects' events are watched, a connection each; many pods have the same problem


@dataclass(eq=False)
class EventWatch:
    """Watches the events about a Job and its pending pods: only they explain why a pod is not created or not mounted.

    Without permission to read events, diagnoses are less detailed. Changes about events, which are put into `changes`, are to be
    passed to `apply`. For one thread.
    """

    cluster: Cluster
    changes: queue.SimpleQueue[Change]
    report: Report

    def __post_init__(self) -> None:
        self._refused = False
        self._watchers: dict[str, Watcher] = {}
        self._ended: list[Watcher] = []
        self._known: dict[str, Mapping[str, Json]] = {}

    @property
    def known(self) -> list[Json]:
        """All events seen about the watched objects."""
        return [event for events in self._known.values() for event in events.values()]

    def watch(self, names: Sequence[str]) -> None:
        """Watches the events about these objects instead of the previous ones."""
        wanted = set() if self._refused else set(names[:_MAX_EVENT_WATCHES])
        for name in self._watchers.keys() - wanted:
            self._ended.append(self._watchers.pop(name))
            self._ended[-1].stop(wait=False)
            self._known.pop(name, None)
        for name in wanted - self._watchers.keys():
            query = {"field_selector": f"involvedObject.name={name}"}
            # The watchers of the Job and its pods report the same interruptions.
            self._watchers[name] = Watcher(self.cluster, "events", query, self.changes, lambda _: None, name)

    def apply(self, change: Change) -> None:
        """Applies a change about events."""
        if change.error is None:
            if change.about in self._watchers:
                self._known[change.about] = change.items
        elif not self._refused:
            self._refused = True
            self.report(explain_refusal(change.error, self.cluster.name)[0] + "; continuing without events.")
            self.watch(())

    def stop(self) -> None:
        """Stops all watchers and waits for them."""
        self.watch(())
        for watcher in self._ended:
            watcher.stop()


@dataclass(eq=False)
class JobRun:
    """A Job while it is watched; for one call of `follow`.

    `attached` is true if the Job was submitted earlier; `timeout` is in seconds since the Job's creation.
    """

    cluster: Cluster
    job: Json
    attached: bool
    config: KubernetesConfig
    timeout: float | None
    events: ExecutionEvents
    stop: StopSignal

    def __post_init__(self) -> None:
        metadata, spec = self.job["metadata"], self.job["spec"]
        pod_spec = spec["template"]["spec"]
        self._name, self._uid = metadata["name"], metadata["uid"]
        labels = (manifest.FLOW_RUN_LABEL, manifest.ATTEMPT_LABEL)
        self._selector = ",".join(f"{label}={metadata['labels'][label]}" for label in labels)
        self._container: str = manifest.project_container(pod_spec)["name"]
        grace = pod_spec.get("terminationGracePeriodSeconds")
        self._removal_seconds = (30.0 if grace is None else float(grace)) + _REMOVAL_SECONDS
        several = max(spec.get("parallelism") or 1, spec.get("completions") or 1) > 1
        self._changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._pods: dict[str, Json] = {}
        self._seen: dict[str, Json] = {}
        """The last state of every pod that ever was in `_pods`."""
        self._output = TailedOutput(self.events)
        self._logs = PodLogs(self.cluster, self._container, several, self._output, self.events.report)
        self._event_watch = EventWatch(self.cluster, self._changes, self.events.report)
        self._reported: set[tuple[str, str]] = set()
        self._problem_deadline: float | None = None
        self._waits_for_node = False
        self._blocked_deadline: float | None = None
        self._next_heartbeat = 0.0
        # Only a Job that was found has an age: the clocks of this machine and the cluster may differ, and its timestamp has whole
        # seconds, so that a new Job may look a second old.
        age = seconds_since(metadata.get("creationTimestamp") or timestamp())
        started = time.monotonic() - (age if self.attached and age > 2 else 0.0)
        self._deadline = None if self.timeout is None else started + self.timeout

    def follow(self) -> Outcome:
        """Returns once the Job has ended and its log was read; a Job that was cancelled is gone with its pods by then.

        Raises `ApiError` if the server refuses access to the Job or its pods; the Job was deleted then, if that was permitted.
        """
        cluster, changes, report = self.cluster, self._changes, self.events.report
        forget = self.stop.on_request(lambda: changes.put(Change("stop")))
        watchers = [
            Watcher(cluster, "jobs", {"field_selector": f"metadata.name={self._name}"}, changes, report),
            Watcher(cluster, "pods", {"label_selector": self._selector}, changes, report),
        ]
        try:
            outcome = self._follow()
        except ApiError as error:
            if not error.transient:
                self._delete(Outcome("not-started", cause=explain_refusal(error, cluster.name)[0]))
            raise
        finally:
            forget()
            for watcher in watchers:
                watcher.stop(wait=False)
            self._event_watch.stop()
            for watcher in watchers:
                watcher.stop()
            self._logs.abandon()
        return replace(outcome, output_tail=self._output.close())

    def _follow(self) -> Outcome:
        while True:
            if self.stop.requested:
                return self._delete(stopped_outcome(self.stop))
            if self.timeout is not None and self._deadline is not None and time.monotonic() >= self._deadline:
                return self._delete(timed_out_outcome(self.timeout))
            if final_condition(self.job) is not None:
                return self._finish()
            failure = self._check_problems() or self._check_blocked()
            if failure is not None:
                return self._delete(failure)
            self._heartbeat()
            try:
                change = self._changes.get(timeout=self._seconds_to_wait())
            except queue.Empty:
                continue
            outcome = self._apply(change)
            if outcome is not None:
                return outcome

    def _seconds_to_wait(self) -> float:
        times = (self._next_heartbeat, self._deadline, self._problem_deadline, self._blocked_deadline)
        return max(0.0, min(each for each in times if each is not None) - time.monotonic())

    def _apply(self, change: Change) -> Outcome | None:
        """Applies a watcher's change; returns the outcome if the Job was deleted."""
        if change.kind == "events":
            self._event_watch.apply(change)
        elif change.error is not None:
            raise change.error
        elif change.kind == "jobs":
            job = change.items.get(self._name)
            if job is None or job["metadata"].get("uid") != self._uid:
                return self._explain_deletion()
            if job["metadata"].get("deletionTimestamp"):
                self._report_once(self._name, "deleted", f"Job {self._name} is being deleted, but not by this run.")
            self.job = job
        elif change.kind == "pods":
            self._apply_pods(change.items)
        return None

    def _apply_pods(self, pods: Mapping[str, Json]) -> None:
        self._pods = dict(pods)
        self._seen |= self._pods
        for name, pod in self._pods.items():
            if node := nested(pod, "spec.nodeName"):
                self._report_once(name, "node", f"Pod {name} was assigned to node {node}.")
        self._logs.update(self._pods)

    def _report_once(self, name: str, what: str, line: str) -> None:
        if (name, what) not in self._reported:
            self._reported.add((name, what))
            self.events.report(line)

    def _check_problems(self) -> Outcome | None:
        """Returns the outcome of a run whose problem outlasted its limit."""
        pending = [name for name, pod in self._pods.items() if nested(pod, "status.phase") == "Pending"]
        # Only events explain a missing pod or volume; all else is in a pod's status.
        self._event_watch.watch([*pending, self._name] if pending or not self._pods else ())
        problem = diagnosis.find_problem(self.job, self._pods.values(), self._event_watch.known, self._container)
        if problem is None:
            self._problem_deadline = None
            return None
        grace = self.config.scheduling_grace if problem.of_nodes else self.config.start_grace
        if self._problem_deadline is None or self._waits_for_node != problem.of_nodes:
            self._problem_deadline, self._waits_for_node = time.monotonic() + grace, problem.of_nodes
        limit = f"The run fails if this lasts {grace:g} s."
        self._report_once(self._name, problem.kind, f"Waiting: {problem.cause}. {limit}")
        if time.monotonic() < self._problem_deadline:
            return None
        return Outcome("not-started", cause=problem.cause, advice=problem.advice, reason=problem.category)

    def _check_blocked(self) -> Outcome | None:
        """Returns the project's outcome if other containers of its pod keep running beyond the limit."""
        found = diagnosis.find_blocked_pod(self._pods.values(), self._container)
        if found is None:
            self._blocked_deadline = None
            return None
        pod, outcome, others = found
        self._blocked_deadline = self._blocked_deadline or time.monotonic() + self.config.start_grace
        if time.monotonic() < self._blocked_deadline:
            return None
        self.events.report(
            f"The project ended in pod {pod}, but {', '.join(others)} kept running for {self.config.start_grace:g} s, so the Job "
            "would never end: it is deleted. Make it a sidecar, which Kubernetes ends by itself: an init container with "
            "restartPolicy: Always."
        )
        return outcome

    def _heartbeat(self) -> None:
        if time.monotonic() >= self._next_heartbeat:
            self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
            self._patch({"annotations": {manifest.WATCHED_ANNOTATION: timestamp()}}, retry_seconds=0.0)

    def _patch(self, metadata: dict[str, Any], retry_seconds: float) -> None:
        body = {"metadata": {"uid": self._uid, **metadata}}
        try:
            self.cluster.call("patch jobs", self._name, body=body, retry_seconds=retry_seconds)
        except ApiError as error:
            if error.status == HTTPStatus.FORBIDDEN:
                cause, advice = explain_refusal(error, self.cluster.name)
                self._report_once(self._name, "patch", f"Warning: {cause}. {advice}")

    def _explain_deletion(self) -> Outcome:
        """Returns the outcome of a Job that was not deleted by this run."""
        self._logs.removal_expected = True
        self._logs.finish()
        if final_condition(self.job) is not None:
            return diagnosis.explain_end(self.job, self._seen.values(), self._container)
        outcomes = [diagnosis.explain_pod(pod, self._container) for pod in self._seen.values()]
        succeeded = next((each for each in outcomes if each is not None and each.exit_code == 0), None)
        cause = f"the Job {self._name} was deleted while it ran, and not by this run"
        advice = "Another client deleted it, or its namespace; 'kubectl get events' may show which."
        # With ttlSecondsAfterFinished: 0, the Job may be gone before its final state was observed.
        return succeeded or Outcome("exited", cause=cause, advice=advice, reason=FailureCategory.INFRASTRUCTURE)

    def _finish(self) -> Outcome:
        """Returns the outcome of the finished Job, with its logs read, and labels it as ended."""
        self._read_pods_until_ended()
        outcome = diagnosis.explain_end(self.job, self._seen.values(), self._container)
        failed = diagnosis.failed_init_container(self._seen.values()) if outcome.ending == "not-started" else None
        if failed is not None:
            self._logs.report_tail(*failed)
        self._logs.finish()
        self._patch({"labels": {manifest.ENDED_LABEL: "true"}}, retry_seconds=10.0)
        return outcome

    def _read_pods_until_ended(self) -> None:
        """Polls the pods until none runs: a Job's final condition may precede its pods' end."""
        deadline, backoff = time.monotonic() + self._removal_seconds, Backoff(longest=2.0)
        while True:
            try:
                pods = self.cluster.items("pods", label_selector=self._selector)
            except ApiError as error:
                # The Job's end is known; the pods' last observed states must do.
                self.events.report(f"Warning: {explain_refusal(error, self.cluster.name)[0]}.")
                return
            self._apply_pods({pod["metadata"]["name"]: pod for pod in pods})
            running = any(nested(pod, "status.phase") in ("Running", "Pending") for pod in pods)
            if not running or time.monotonic() >= deadline:
                return
            time.sleep(backoff.next())

    def _delete(self, outcome: Outcome) -> Outcome:
        """Deletes the Job and waits for its pods; returns `outcome` with what still exists."""
        self.events.report(f"Deleting Job {self._name}: {outcome.cause}.")
        self._logs.removal_expected = True
        try:
            self.cluster.delete_job(self._name, self._uid)
            remaining = self._wait_until_gone()
        except ApiError as error:
            remaining = [f"Job {self._name} ({explain_refusal(error, self.cluster.name)[0]})"]
        self._logs.finish()
        if not remaining:
            return outcome
        advice = f"{outcome.advice} Delete it: kubectl -n {self.cluster.namespace} delete job {self._name}"
        return replace(outcome, cause=f"{outcome.cause}; still there: {', '.join(remaining)}", advice=advice.strip())

    def _wait_until_gone(self) -> list[str]:
        """Waits until the Job and its pods are gone; returns what still exists at the time-out."""
        deadline, backoff = time.monotonic() + self._removal_seconds, Backoff(longest=2.0)
        while (remaining := self._remaining()) and time.monotonic() < deadline:
            time.sleep(min(backoff.next(), max(0.0, deadline - time.monotonic())))
        return remaining

    def _remaining(self) -> list[str]:
        """Returns each pod that exists with its node, else the Job if it exists."""
        pods = self.cluster.items("pods", label_selector=self._selector)
        if pods:
            return [f"pod {pod['metadata']['name']} on node {nested(pod, 'spec.nodeName') or '?'}" for pod in pods]
        try:
            job = self.cluster.call("get jobs", self._name)
        except ApiError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return []
            raise
        return [f"Job {self._name}"] if job["metadata"].get("uid") == self._uid else []
