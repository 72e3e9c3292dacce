"""Follows the logs of a Job's pods: each line once, across lost connections and restarts of the container."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.contract import Report
from prefect_mlprojects.backends.kubernetes.api import ApiError, Cluster, Json, StreamReader, nested
from prefect_mlprojects.backends.kubernetes.diagnosis import by_age, container_status, explain_refusal, final_state
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
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(self._kept))) if self._kept else None

    def reconnect(self) -> None:
        """Prepares for reading again from `since`; a partial line will be sent again."""
        self._partial = b""
        self._expected = sum(self._kept.values(), Counter())

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes; returns the new lines, without their times, with their newlines."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [text + b"\n" for text in map(self._take, lines) if text is not None]

    def close(self) -> list[bytes]:
        """Returns the last line if it has no newline; to be called at the log's end only."""
        return [line[:-1] for line in self.feed(b"\n")] if self._partial else []

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
    with suppress(ValueError):
        text = stamp.decode("ascii").replace("Z", "+00:00")
        return int(datetime.fromisoformat(text[:19] + text[-6:]).timestamp())
    return None


@dataclass(eq=False)
class ContainerLog:
    """Follows the log of one instance of a container, from its first line to its last, in a thread.

    `instance` counts the restarts of the container before this instance, `restarts` the restarts until now; `mark` is the prefix of
    each line. `may_restart` is true if the container may be restarted in its pod: the API finds a log by the container's name, so
    a response may be the next instance's, and each is checked before it is read. `after` is the log of the previous instance,
    which is read to its end first.
    """

    logs: PodLogs
    pod: str
    instance: int
    restarts: int
    mark: str
    may_restart: bool
    after: ContainerLog | None

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._changed = threading.Event()
        self._reader = StreamReader("get pods/log", self.logs.cluster.namespace)
        self._stop = self._reader.stop
        self._stop.on_request(self._changed.set)
        self._remarks: set[str] = set()
        self._filter = LineFilter(self._report_remark)
        self._writing = threading.Lock()
        if self.restarts > self.instance:
            self.container_ended(self.restarts)
        self._thread = threading.Thread(target=self._run, name=f"mlprojects-log-{self.pod}", daemon=True)
        self._thread.start()

    def container_ended(self, restarts: int) -> None:
        """Marks the instance as ended, so that the rest of its log is read; `restarts` is the container's current count."""
        self.restarts = max(self.restarts, restarts)
        self._ended.set()
        self._changed.set()

    def finish(self) -> bool:
        """Waits until the log was read to its end; returns whether it was."""
        self._thread.join(_FOLLOW_SECONDS)
        if self._thread.is_alive():
            # A dead connection would be noticed late; the rest of the log is read on a new one.
            self._reader.abort()
        self._thread.join(_LOG_SECONDS)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Stops reading: nothing is written after this returned."""
        with self._writing:
            self._stop.request("abandoned")
        # A node sends nothing, not even headers, before a program's first line. Such a wait can't be interrupted, but its
        # result is not written any more.
        self._thread.join(_ABANDON_SECONDS)

    def _run(self) -> None:
        if self.after is not None:
            self.after._thread.join()
            self.after = None
        backoff, waited = Backoff(), 0.0
        while not self._stop.requested and not self._overtaken():
            last, restarts = self._ended.is_set(), self.restarts
            try:
                came = self._read(restarts, follow=not last)
                if last and restarts == self.restarts:
                    self._write(self._filter.close())
                    return
                waited = 0.0
                if came:
                    backoff.reset()
                # The connection may have ended before the container did, or the pod's new status has not arrived yet.
                self._wait(backoff.next())
            except ApiError as error:
                delay = backoff.next(error.retry_after)
                waited += delay
                if self._is_final(error, waited if last else 0.0):
                    return
                self._wait(delay)

    def _is_final(self, error: ApiError, waited: float) -> bool:
        """Returns whether reading ends with an error, and reports it if so; `waited` is in seconds since the container's end."""
        # The node may have removed the log of the previous instance.
        previous = error.status == HTTPStatus.BAD_REQUEST and waited > 0 and self.restarts > self.instance
        if error.status == HTTPStatus.NOT_FOUND or previous:
            if not self.logs.removal_expected:
                reason = "its node removed the log of the previous instance" if previous else "the pod was removed"
                self.logs.report(f"The log of pod {self.pod} ended early: {reason}.")
            return True
        if error.status == HTTPStatus.BAD_REQUEST and waited > _NO_LOG_SECONDS:
            return True
        if not error.transient and error.status not in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED):
            cause, advice = explain_refusal(error, self.logs.cluster.name)
            self.logs.report(f"The log of pod {self.pod} can't be read: {cause}. {advice}")
            return True
        if waited > _ERROR_SECONDS:
            self.logs.report(f"The end of the log of pod {self.pod} can't be read: {error.message}")
        return waited > _ERROR_SECONDS

    def _wait(self, seconds: float) -> None:
        """Waits for some seconds, or until the container ends."""
        wait = self._stop.wait if self._ended.is_set() else self._changed.wait
        wait(seconds)

    def _read(self, restarts: int, *, follow: bool) -> bool:
        """Reads one response to its end; returns whether it had new lines."""
        query = {"container": self.logs.container, "timestamps": "true"}
        if restarts > self.instance:
            query["previous"] = "true"
        elif follow:
            query["follow"] = "true"
        if self._filter.since is not None:
            query["sinceTime"] = self._filter.since
        came, open_log = False, self.logs.cluster.open_log
        with self._reader.reading(lambda: open_log(self.pod, query, read_timeout=_SILENT_SECONDS)) as chunks:
            self._filter.reconnect()
            if self._stop.wait(0) or (self.may_restart and self._was_restarted()):
                return came
            for chunk in chunks:
                lines = self._filter.feed(chunk)
                came = came or bool(lines)
                self._write(lines)
                if self._stop.wait(0):
                    break
        return came

    def _overtaken(self) -> bool:
        """Returns whether the rest of this instance's log is lost: nodes keep the log of one previous instance only."""
        if self.restarts <= self.instance + 1:
            return False
        self.logs.report(f"The end of the log of pod {self.pod} is lost: its container was restarted too soon.")
        return True

    def _was_restarted(self) -> bool:
        """Returns whether an open response may be the log of another instance; records the restart, if so."""
        # The node knows of a restart before the API server does.
        self._stop.wait(_STATUS_SECONDS)
        pods = self.logs.cluster.items("pods", field_selector=f"metadata.name={self.pod}", stop=self._stop)
        count = max([0, *(container_status(pod, self.logs.container).get("restartCount") or 0 for pod in pods)])
        if count <= self.restarts:
            return False
        self.container_ended(count)
        return True

    def _write(self, lines: list[bytes]) -> None:
        with self._writing:
            if lines and not self._stop.requested:
                self.logs.output.write("stdout", b"".join(self.mark.encode() + line for line in lines))

    def _report_remark(self, remark: str) -> None:
        if remark.strip() and remark not in self._remarks:
            self._remarks.add(remark)
            self.logs.report(f"Message of the node about the log of pod {self.pod}: {remark.strip()[:400]}")


@dataclass(eq=False)
class PodLogs:
    """The logs of the project's container in all pods of a Job; for one thread.

    `several` is true if the Job runs several pods at once, so that each line is marked with its pod.
    """

    cluster: Cluster
    container: str
    several: bool
    output: OutputSink
    report: Report
    removal_expected: bool = False
    """True once the pods are being removed: the loss of their logs is not reported then."""

    def __post_init__(self) -> None:
        self._logs: dict[tuple[str, int], ContainerLog] = {}

    def update(self, pods: Mapping[str, Json]) -> None:
        """Takes the state of the Job's pods: follows new instances, reads ended ones to their end."""
        # A Job that was found again may have had several pods already.
        self.several = self.several or len(pods) > 1
        for pod in by_age(pods.values()):
            self._update_pod(pod, pod["metadata"]["name"])

    def _update_pod(self, pod: Json, name: str) -> None:
        status = container_status(pod, self.container)
        restarts = int(status.get("restartCount") or 0)
        ended = final_state(status) if nested(status, "state.running") is None else None
        known = [instance for log_pod, instance in self._logs if log_pod == name]
        for instance in known:
            if instance < restarts:
                self._logs[name, instance].container_ended(restarts)
        # Several restarts may come between two states of the pod; the node keeps the log of one previous instance only.
        first = max(known, default=-1) + 1
        if first < restarts - 1:
            missing = f"Output of pod {name} from before restart {restarts - 1} is missing"
            self.report(f"{missing}: its container was restarted before its log could be read.")
        started = nested(status, "state.running") is not None or ended is not None
        for instance in range(max(first, restarts - 1), restarts + started):
            self.report(f"Pod {name} runs the project{f' (restart {instance})' if instance else ''}.")
            # The first pod's lines need no mark: others follow only if it fails.
            mark = f"[{name}] " if self.several or any(other != name for other, _ in self._logs) else ""
            may_restart = nested(pod, "spec.restartPolicy") != "Never"
            after = self._logs.get((name, max(known, default=-1)))
            self._logs[name, instance] = ContainerLog(self, name, instance, restarts, mark, may_restart, after)
            known.append(instance)
        if ended is not None:
            self._logs[name, restarts].container_ended(restarts)

    def finish(self) -> None:
        """Reads all logs to their ends; the containers have ended."""
        for (pod, instance), log in self._logs.items():
            log.container_ended(instance)
            if not log.finish():
                self.report(f"Warning: the log of pod {pod} could not be read to its end.")

    def abandon(self) -> None:
        """Stops reading: nothing is written after this returned."""
        for log in self._logs.values():
            log.abandon()

    def report_tail(self, pod: str, container: str) -> None:
        """Reports the last lines of another container's log."""
        query = {"container": container, "tailLines": str(_TAIL_LINES)}
        reader, open_log = StreamReader("get pods/log", self.cluster.namespace), self.cluster.open_log
        try:
            with reader.reading(lambda: open_log(pod, query, read_timeout=10.0)) as chunks:
                text = b"".join(chunks).decode("utf-8", "replace")
        except ApiError as error:
            self.report(f"The log of container {container} can't be read: {error.message}")
            return
        for line in text.splitlines():
            self.report(f"[{container}] {line}")
