"""Follows the logs of a Job's pods: which containers have run, how often, and whose lines need a mark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Cluster
from prefect_mlprojects.backends.kubernetes.logs import ContainerLog
from prefect_mlprojects.types import OutputSink

_LOG_SECONDS = 180.0
_TAIL_LINES = 20


class PodLogs:
    """The logs of the project's container in all pods of a Job; for one thread.

    Args:
        cluster: The cluster.
        container: The container's name.
        several: Whether the Job runs several pods by itself, so that each line is marked with its pod.
        output: Takes the lines.
        report: Takes lines about what is followed, and about trouble.
    """

    def __init__(
        self, cluster: Cluster, container: str, *, several: bool, output: OutputSink, report: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._container = container
        self._several = several
        self._output = output
        self._report = report
        self._logs: dict[tuple[str, int], ContainerLog] = {}

    def take(self, pods: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the state of the Job's pods: follows what has begun to run, reads to its end what has ended."""
        # A run that is found again may have had several pods already.
        several = self._several or len(pods) > 1
        for pod in sorted(pods.values(), key=lambda each: each["metadata"].get("creationTimestamp") or ""):
            name = pod["metadata"]["name"]
            restarts = (pod.get("spec") or {}).get("restartPolicy") != "Never"
            for container in (pod.get("status") or {}).get("containerStatuses") or []:
                if container.get("name") == self._container:
                    self._take_container(name, container, marked=several, restarts=restarts)

    def _take_container(self, pod: str, status: Mapping[str, Any], *, marked: bool, restarts: bool) -> None:
        state, instance = status.get("state") or {}, int(status.get("restartCount") or 0)
        for (log_pod, log_instance), log in self._logs.items():
            if log_pod == pod and log_instance < instance:
                log.container_ended(instance)
        crashed = "waiting" in state and (status.get("lastState") or {}).get("terminated")
        if "running" in state or "terminated" in state or crashed:
            self._follow(pod, instance, marked=marked, restarts=restarts)
        if "terminated" in state or crashed:
            self._logs[pod, instance].container_ended(instance)

    def _follow(self, pod: str, instance: int, *, marked: bool, restarts: bool) -> None:
        if (pod, instance) in self._logs:
            return
        again = f" (restart {instance})" if instance else ""
        self._report(f"Pod {pod} runs the project{again}.")
        # The first pod's lines need no mark: only when it fails, others follow.
        others = any(name != pod for name, _ in self._logs)
        mark = f"[{pod}] " if marked or others else ""
        earlier = max((number for name, number in self._logs if name == pod), default=None)
        after = None if earlier is None else self._logs[pod, earlier]
        self._logs[pod, instance] = ContainerLog(
            self._cluster,
            pod,
            self._container,
            instance,
            self._output,
            mark,
            self._report,
            restarts=restarts,
            after=after,
        )

    def expect_removal(self) -> None:
        """Tells that the pods are being removed: that their logs go with them is no news then."""
        for log in self._logs.values():
            log.expect_removal()

    def finish(self) -> None:
        """Reads all logs to their ends; the containers have ended."""
        for (pod, instance), log in self._logs.items():
            log.container_ended(instance)
            if not log.finish(_LOG_SECONDS):
                self._report(f"Warning: the log of pod {pod} could not be read to its end.")

    def abandon(self) -> None:
        """Reads no more: nothing is written once this has returned."""
        for log in self._logs.values():
            log.abandon()

    def report_tail(self, pod: str, container: str) -> None:
        """Reports the last lines of another container's log, as far as it can be read."""
        try:
            query = {"container": container, "tailLines": str(_TAIL_LINES)}
            stream = self._cluster.open_log(pod, query, read_timeout=10.0)
            try:
                text = b"".join(stream.chunks()).decode("utf-8", "replace")
            finally:
                stream.close()
        except ApiRefusal as refusal:
            self._report(f"The log of container {container} can't be read: {refusal.message}")
            return
        for line in text.splitlines():
            self._report(f"[{container}] {line}")
