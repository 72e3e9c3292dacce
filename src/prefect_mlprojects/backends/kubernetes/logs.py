"""Follows a container's log: each line once, across lost connections and restarts of the container."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from datetime import datetime, timezone

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Cluster, Stream
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal
from prefect_mlprojects.types import OutputSink, StopSignal

_SILENT_SECONDS = 60.0
"""Seconds without a byte after which the connection is made anew: a silent program and a dead connection look the same."""
_SECONDS_TO_FOLLOW_OUT = 5.0
_KEPT_SECONDS = 2
_NOT_FOUND = 404
_BAD_REQUEST = 400
_SECONDS_OF_TROUBLE = 120.0
_SECONDS_WITHOUT_LOG = 10.0
"""How long a container that has ended may be said to have no log yet: one that could not be started never gets one."""
_SECONDS_TO_LET_GO = 2.0
_STATUS_SECONDS = 1.0
"""How long a pod's new status may take from its node to the API server."""


class LineFilter:
    """Takes a log that is read again from some time on, and returns each of its lines once; pure.

    With ``timestamps=true`` each line begins with its time in nanoseconds; ``sinceTime`` counts in seconds. So after a
    reconnect the server sends the last seconds again: what came of them is kept, and taken off as often as it came. Times
    may be a little out of order, since the node stamps both streams of a program independently; hence more than one second.

    Args:
        remark: Takes what is no line of the log: the node's own words, such as "unable to retrieve container logs for …".
    """

    def __init__(self, remark: Callable[[str], None] | None = None) -> None:
        self._remark = remark
        self._kept: OrderedDict[int, Counter[bytes]] = OrderedDict()
        self._again: Counter[bytes] = Counter()
        self._held = b""

    @property
    def since(self) -> str | None:
        """The ``sinceTime`` to read from; None for the beginning."""
        if not self._kept:
            return None
        return datetime.fromtimestamp(min(self._kept), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    def reconnect(self) -> None:
        """Begins a new reading at ``since``; a line that was cut off comes again whole."""
        self._held = b""
        self._again = Counter()
        for lines in self._kept.values():
            self._again.update(lines)

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes; returns the lines that are new, without their times, with their newlines."""
        *lines, self._held = (self._held + data).split(b"\n")
        return [text + b"\n" for line in lines if (text := self._take(line)) is not None]

    def close(self) -> list[bytes]:
        """Returns the last line when it has no newline; only once the log is known to be at its end."""
        held, self._held = self._held, b""
        text = self._take(held) if held else None
        return [] if text is None else [text]

    def _take(self, line: bytes) -> bytes | None:
        if self._again.get(line, 0):
            self._again[line] -= 1
            return None
        stamp, _, text = line.partition(b" ")
        second = _second(stamp)
        if second is None:
            if self._remark is not None:
                self._remark(line.decode("utf-8", "replace"))
            return None
        if second not in self._kept:
            self._kept[second] = Counter()
            for old in sorted(self._kept)[:-_KEPT_SECONDS]:
                del self._kept[old]
        if second in self._kept:
            self._kept[second][line] += 1
        return text


def _second(stamp: bytes) -> int | None:
    """The time of a line, ``2026-11-23T10:00:00.123456789Z`` or with an offset, in whole seconds since the epoch."""
    try:
        text = stamp.decode("ascii")
        zone = "+00:00" if text.endswith("Z") else text[-6:]
        return int(datetime.fromisoformat(text[:19] + zone).timestamp())
    except (UnicodeDecodeError, ValueError):
        return None


class ContainerLog:
    """Follows the log of one container of one pod, from its first line to its last, in a thread of its own.

    Args:
        cluster: The cluster.
        pod: The pod's name.
        container: The container's name.
        instance: How often it had been restarted when it began.
        output: Takes the lines.
        mark: What each line begins with.
        report: Takes lines about trouble.
        restarts: Whether the container may be restarted in its pod. A log is asked for by the container's name, so what comes
            may be the next instance's; then each answer is checked before it is read.
        after: The log of the instance before it, which is read to its end first.
    """

    def __init__(
        self,
        cluster: Cluster,
        pod: str,
        container: str,
        instance: int,
        output: OutputSink,
        mark: str,
        report: Callable[[str], None],
        *,
        restarts: bool = False,
        after: ContainerLog | None = None,
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
        self._removal_expected = False
        self._ended = threading.Event()
        self._changed = threading.Event()
        self._stop = StopSignal()
        self._remarks: set[str] = set()
        self._filter = LineFilter(self._take_remark)
        self._stream: Stream | None = None
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"mlprojects-log-{pod}", daemon=True)
        self._thread.start()

    def container_ended(self, restarts: int) -> None:
        """Tells that this container has ended, as its pod's status says; what is left of its log is read then.

        Args:
            restarts: How often it has been restarted since the pod began.
        """
        self._restarts = max(self._restarts, restarts)
        self._ended.set()
        self._changed.set()

    def finish(self, timeout: float) -> bool:
        """Waits until the log was read to its end; returns whether it was."""
        self._thread.join(min(timeout, _SECONDS_TO_FOLLOW_OUT))
        if self._thread.is_alive():
            # A dead connection would be noticed late; what is left of the log is read on a new one.
            self._abort()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Reads no more of it: nothing is written once this has returned."""
        with self._writing:
            self._stop.request("abandoned")
        self._changed.set()
        self._abort()
        # A node sends nothing, not even headers, before a program's first line: such a wait can't be cut, but what comes
        # of it is not written any more.
        self._thread.join(_SECONDS_TO_LET_GO)

    def expect_removal(self) -> None:
        """Tells that the pod is being removed: that its log goes with it is no news then."""
        self._removal_expected = True

    def _abort(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.abort()

    def _run(self) -> None:
        if self._after is not None:
            self._after._thread.join()
            self._after = None
        self._read_to_the_end()

    def _read_to_the_end(self) -> None:
        backoff = Backoff()
        waited, gone = 0.0, False
        while not self._stop.requested and not gone and not self._overtaken():
            last = self._ended.is_set()
            try:
                known = self._restarts
                came = self._read(follow=not last)
                if last and known == self._restarts:
                    for line in self._filter.close():
                        self._write([line])
                    return
                waited = 0.0
                if came:
                    backoff.reset()
                # The connection may have ended before the container did, or its status is still on its way to us.
                self._wait(backoff.next())
            except ApiRefusal as refusal:
                if refusal.status == _NOT_FOUND:
                    gone = True
                elif refusal.status == _BAD_REQUEST and last and self._restarts > self._instance:
                    # The previous instance's log was removed already.
                    gone = True
                elif refusal.status == _BAD_REQUEST and last and waited > _SECONDS_WITHOUT_LOG:
                    return
                elif not refusal.transient and refusal.status not in (_BAD_REQUEST, 401):
                    cause, advice = explain_refusal(refusal, self._cluster.name)
                    self._report(f"The log of pod {self._pod} can't be read: {cause}. {advice}")
                    return
                else:
                    delay = backoff.next(refusal.retry_after)
                    waited += delay
                    if last and waited > _SECONDS_OF_TROUBLE:
                        self._report(f"The end of the log of pod {self._pod} can't be read: {refusal.message}")
                        return
                    self._wait(delay)
        if gone and not self._removal_expected:
            self._report(f"The log of pod {self._pod} ended early: the pod was removed.")

    def _wait(self, seconds: float) -> None:
        """Waits, but not when the container's end is news."""
        if not self._ended.is_set():
            self._changed.wait(seconds)
        else:
            self._stop.wait(seconds)

    def _read(self, *, follow: bool) -> bool:
        query = {"container": self._container, "timestamps": "true"}
        if follow:
            query["follow"] = "true"
        if self._restarts > self._instance:
            query["previous"] = "true"
            query.pop("follow", None)
        if self._filter.since is not None:
            query["sinceTime"] = self._filter.since
        stream = self._cluster.open_log(self._pod, query, read_timeout=_SILENT_SECONDS)
        with self._lock:
            self._stream = stream
        self._filter.reconnect()
        came = False
        try:
            if self._stop.requested or (self._may_restart and self._was_restarted()):
                return came
            for chunk in stream.chunks():
                lines = self._filter.feed(chunk)
                came = came or bool(lines)
                self._write(lines)
                if self._stop.wait(0):
                    break
        finally:
            with self._lock:
                self._stream = None
            stream.close()
        return came

    def _overtaken(self) -> bool:
        """Tells whether what is left of this instance's log can't be read any more: nodes keep one earlier instance's."""
        if self._restarts <= self._instance + 1:
            return False
        self._report(f"The end of the log of pod {self._pod} is lost: its container was restarted too soon.")
        return True

    def _was_restarted(self) -> bool:
        """Tells whether an answer that has begun may be the log of another instance; notes the restart, if so."""
        # The node itself knows of a restart a moment before the API server does.
        self._stop.wait(_STATUS_SECONDS)
        answer = self._cluster.call(
            "list pods",
            self._cluster.core.list_namespaced_pod,
            self._cluster.namespace,
            field_selector=f"metadata.name={self._pod}",
            stop=self._stop,
        )
        counts = [
            int(each.get("restartCount") or 0)
            for pod in answer.get("items") or []
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

    def _take_remark(self, words: str) -> None:
        if words.strip() and words not in self._remarks:
            self._remarks.add(words)
            self._report(f"About the log of pod {self._pod}, its node says: {words.strip()[:400]}")
