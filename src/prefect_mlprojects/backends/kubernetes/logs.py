"""Follows the logs of a Job's pods: each line once, across lost connections and restarts of the container."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.contract import Report
from prefect_mlprojects.backends.kubernetes.api import (
    BAD_REQUEST,
    NOT_FOUND,
    UNAUTHORIZED,
    ApiError,
    Cluster,
    StreamSlot,
)
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal
from prefect_mlprojects.types import OutputSink

_SILENT_SECONDS = 60.0
"""Seconds without a byte after which to reconnect: a silent program and a dead connection look the same."""
_FOLLOW_SECONDS = 5.0
"""How long an open stream may deliver the rest of an ended container's log before it is read on a new connection."""
_LOG_SECONDS = 180.0  # how long the rest of a log may take
_KEPT_SECONDS = 2
_TAIL_LINES = 20
_ERROR_SECONDS = 120.0  # how long reading the end of a log is retried
_NO_LOG_SECONDS = 10.0  # how long an ended container may have no log yet; one that could not be started never gets one
_ABANDON_SECONDS = 2.0
_STATUS_SECONDS = 1.0  # how long a pod's new status may take from its node to the API server


class LineFilter:
    """De-duplicates lines when a log is re-read from a timestamp. Pure.

    With ``timestamps=true`` each line begins with its time in nanoseconds, but ``sinceTime`` has whole seconds. So after a
    reconnect the server sends the last seconds again: their lines are counted, and dropped as often as they came before. Times may
    be slightly out of order, since the node stamps stdout and stderr independently; hence more than one second is kept.

    `remark` receives lines that are not the log's: messages of the node, such as "unable to retrieve container logs for ...".
    """

    def __init__(self, remark: Callable[[str], None] = lambda _: None) -> None:
        self._remark = remark
        self._kept: dict[int, Counter[bytes]] = {}
        self._expected: Counter[bytes] = Counter()
        self._partial = b""

    @property
    def since(self) -> str | None:
        """The ``sinceTime`` to read from; None: from the beginning."""
        if not self._kept:
            return None
        return datetime.fromtimestamp(min(self._kept), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    def reconnect(self) -> None:
        """Prepares for reading again from `since`; a partial line will be sent again."""
        self._partial = b""
        self._expected = sum(self._kept.values(), Counter())

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes; returns the new lines, without their times, with their newlines."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [text + b"\n" for line in lines if (text := self._take(line)) is not None]

    def close(self) -> list[bytes]:
        """Returns the last line if it has no newline; to be called at the log's end only."""
        partial, self._partial = self._partial, b""
        text = self._take(partial) if partial else None
        return [] if text is None else [text]

    def _take(self, line: bytes) -> bytes | None:
        if self._expected.get(line, 0):
            self._expected[line] -= 1
            return None
        stamp, _, text = line.partition(b" ")
        second = _second(stamp)
        if second is None:
            self._remark(line.decode("utf-8", "replace"))
            return None
        self._kept.setdefault(second, Counter())[line] += 1
        for old in sorted(self._kept)[:-_KEPT_SECONDS]:
            del self._kept[old]
        return text


def _second(stamp: bytes) -> int | None:
    """Parses ``2026-11-23T10:00:00.123456789Z``, or with an offset, to seconds since the epoch, rounded down."""
    try:
        text = stamp.decode("ascii")
        zone = "+00:00" if text.endswith("Z") else text[-6:]
        return int(datetime.fromisoformat(text[:19] + zone).timestamp())
    except (UnicodeDecodeError, ValueError):
        return None


class ContainerLog:
    """Follows the log of one instance of a container, from its first line to its last, in a thread.

    `instance` counts the restarts of the container before this instance; `mark` is the prefix of each line. `restarts` is true if
    the container may be restarted in its pod: the API finds a log by the container's name, so a response may be the next
    instance's, and each is checked before it is read. `after` is the log of the previous instance, which is read to its end first.
    """

    def __init__(
        self,
        cluster: Cluster,
        pod: str,
        container: str,
        instance: int,
        output: OutputSink,
        mark: str,
        report: Report,
        *,
        restarts: bool,
        after: ContainerLog | None,
    ) -> None:
        self._cluster = cluster
        self._after = after
        self._may_restart = restarts
        self._pod = pod
        self._container = container
        self._output = output
        self._mark = mark.encode()
        self._report = report
        self._instance = instance
        self._restarts = instance
        self.removal_expected = False
        """True once the pod is being removed: the loss of its log is not reported then."""
        self._ended = threading.Event()
        self._changed = threading.Event()
        self._slot = StreamSlot()
        self._stop = self._slot.stop
        self._remarks: set[str] = set()
        self._filter = LineFilter(self._report_remark)
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"mlprojects-log-{pod}", daemon=True)
        self._thread.start()

    def container_ended(self, restarts: int) -> None:
        """Marks the instance as ended, so that the rest of its log is read; `restarts` is the container's current count."""
        self._restarts = max(self._restarts, restarts)
        self._ended.set()
        self._changed.set()

    def finish(self) -> bool:
        """Waits until the log was read to its end; returns whether it was."""
        self._thread.join(_FOLLOW_SECONDS)
        if self._thread.is_alive():
            # A dead connection would be noticed late; the rest of the log is read on a new one.
            self._slot.abort()
        self._thread.join(_LOG_SECONDS)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Stops reading: nothing is written after this returned."""
        with self._writing:
            self._stop.request("abandoned")
        self._changed.set()
        self._slot.abort()
        # A node sends nothing, not even headers, before a program's first line. Such a wait can't be interrupted, but its
        # result is not written any more.
        self._thread.join(_ABANDON_SECONDS)

    def _run(self) -> None:
        if self._after is not None:
            self._after._thread.join()
            self._after = None
        backoff = Backoff()
        waited, gone = 0.0, False
        while not self._stop.requested and not gone and not self._overtaken():
            last = self._ended.is_set()
            try:
                restarts = self._restarts
                came = self._read(follow=not last)
                if last and restarts == self._restarts:
                    self._write(self._filter.close())
                    return
                waited = 0.0
                if came:
                    backoff.reset()
                # The connection may have ended before the container did, or the pod's new status has not arrived yet.
                self._wait(backoff.next())
            except ApiError as error:
                # The node may have removed the log of the previous instance.
                previous = error.status == BAD_REQUEST and last and self._restarts > self._instance
                if error.status == NOT_FOUND or previous:
                    gone = True
                    continue
                if error.status == BAD_REQUEST and last and waited > _NO_LOG_SECONDS:
                    return
                delay = backoff.next(error.retry_after)
                waited += delay
                if self._is_final(error, expired=last and waited > _ERROR_SECONDS):
                    return
                self._wait(delay)
        if gone and not self.removal_expected:
            self._report(f"The log of pod {self._pod} ended early: the pod was removed.")

    def _is_final(self, error: ApiError, *, expired: bool) -> bool:
        """Returns whether reading ends with an error, and reports it if so."""
        if not error.transient and error.status not in (BAD_REQUEST, UNAUTHORIZED):
            cause, advice = explain_refusal(error, self._cluster.name)
            self._report(f"The log of pod {self._pod} can't be read: {cause}. {advice}")
            return True
        if expired:
            self._report(f"The end of the log of pod {self._pod} can't be read: {error.message}")
        return expired

    def _wait(self, seconds: float) -> None:
        """Waits for some seconds, or until the container ends."""
        if not self._ended.is_set():
            self._changed.wait(seconds)
        else:
            self._stop.wait(seconds)

    def _read(self, *, follow: bool) -> bool:
        """Reads one response to its end; returns whether it had new lines."""
        query = {"container": self._container, "timestamps": "true"}
        if self._restarts > self._instance:
            query["previous"] = "true"
        elif follow:
            query["follow"] = "true"
        if self._filter.since is not None:
            query["sinceTime"] = self._filter.since
        came = False
        with self._slot.reading(self._cluster.open_log(self._pod, query, read_timeout=_SILENT_SECONDS)) as stream:
            self._filter.reconnect()
            if self._stop.requested or (self._may_restart and self._was_restarted()):
                return came
            for chunk in stream.chunks():
                lines = self._filter.feed(chunk)
                came = came or bool(lines)
                self._write(lines)
                if self._stop.wait(0):
                    break
        return came

    def _overtaken(self) -> bool:
        """Returns whether the rest of this instance's log is lost: nodes keep the log of one previous instance only."""
        if self._restarts <= self._instance + 1:
            return False
        self._report(f"The end of the log of pod {self._pod} is lost: its container was restarted too soon.")
        return True

    def _was_restarted(self) -> bool:
        """Returns whether an open response may be the log of another instance; records the restart, if so."""
        # The node knows of a restart before the API server does.
        self._stop.wait(_STATUS_SECONDS)
        counts = [
            int(each.get("restartCount") or 0)
            for pod in self._cluster.list_pods(field_selector=f"metadata.name={self._pod}", stop=self._stop)
            for each in (pod.get("status") or {}).get("containerStatuses") or []
            if each.get("name") == self._container
        ]
        if not counts or counts[0] <= self._restarts:
            return False
        self.container_ended(counts[0])
        return True

    def _write(self, lines: list[bytes]) -> None:
        with self._writing:
            if lines and not self._stop.requested:
                self._output.write("stdout", b"".join(self._mark + line for line in lines))

    def _report_remark(self, remark: str) -> None:
        if remark.strip() and remark not in self._remarks:
            self._remarks.add(remark)
            self._report(f"Message of the node about the log of pod {self._pod}: {remark.strip()[:400]}")


class PodLogs:
    """The logs of the project's container in all pods of a Job; for one thread.

    `several` is true if the Job runs several pods at once, so that each line is marked with its pod.
    """

    def __init__(self, cluster: Cluster, container: str, *, several: bool, output: OutputSink, report: Report) -> None:
        self._cluster = cluster
        self._container = container
        self._several = several
        self._output = output
        self._report = report
        self._logs: dict[tuple[str, int], ContainerLog] = {}

    def update(self, pods: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the state of the Job's pods: follows new instances, reads ended ones to their end."""
        # A Job that was found again may have had several pods already.
        several = self._several or len(pods) > 1
        for pod in sorted(pods.values(), key=lambda each: each["metadata"].get("creationTimestamp") or ""):
            restarts = (pod.get("spec") or {}).get("restartPolicy") != "Never"
            for container in (pod.get("status") or {}).get("containerStatuses") or []:
                if container.get("name") == self._container:
                    self._update_container(pod["metadata"]["name"], container, marked=several, restarts=restarts)

    def _update_container(self, pod: str, status: Mapping[str, Any], *, marked: bool, restarts: bool) -> None:
        state, instance = status.get("state") or {}, int(status.get("restartCount") or 0)
        for (log_pod, log_instance), log in self._logs.items():
            if log_pod == pod and log_instance < instance:
                log.container_ended(instance)
        ended = "terminated" in state or ("waiting" in state and (status.get("lastState") or {}).get("terminated"))
        if "running" in state or ended:
            self._follow(pod, instance, marked=marked, restarts=restarts)
        if ended:
            self._logs[pod, instance].container_ended(instance)

    def _follow(self, pod: str, instance: int, *, marked: bool, restarts: bool) -> None:
        if (pod, instance) in self._logs:
            return
        restart = f" (restart {instance})" if instance else ""
        self._report(f"Pod {pod} runs the project{restart}.")
        # The first pod's lines need no mark: others follow only if it fails.
        mark = f"[{pod}] " if marked or any(name != pod for name, _ in self._logs) else ""
        previous = max((number for name, number in self._logs if name == pod), default=-1)
        self._logs[pod, instance] = ContainerLog(
            self._cluster,
            pod,
            self._container,
            instance,
            self._output,
            mark,
            self._report,
            restarts=restarts,
            after=self._logs.get((pod, previous)),
        )

    def expect_removal(self) -> None:
        """Marks the pods as being removed: the loss of their logs is not reported then."""
        for log in self._logs.values():
            log.removal_expected = True

    def finish(self) -> None:
        """Reads all logs to their ends; the containers have ended."""
        for (pod, instance), log in self._logs.items():
            log.container_ended(instance)
            if not log.finish():
                self._report(f"Warning: the log of pod {pod} could not be read to its end.")

    def abandon(self) -> None:
        """Stops reading: nothing is written after this returned."""
        for log in self._logs.values():
            log.abandon()

    def report_tail(self, pod: str, container: str) -> None:
        """Reports the last lines of another container's log."""
        query = {"container": container, "tailLines": str(_TAIL_LINES)}
        try:
            with closing(self._cluster.open_log(pod, query, read_timeout=10.0)) as stream:
                text = b"".join(stream.chunks()).decode("utf-8", "replace")
        except ApiError as error:
            self._report(f"The log of container {container} can't be read: {error.message}")
            return
        for line in text.splitlines():
            self._report(f"[{container}] {line}")
