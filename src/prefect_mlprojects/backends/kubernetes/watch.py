"""Watches a run's Job, its pods and their events, for as long as the Job lives."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.contract import Report
from prefect_mlprojects.backends.kubernetes.api import CONNECT_SECONDS, NO_ANSWER, ApiError, Cluster, Stream
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal
from prefect_mlprojects.types import StopSignal

Kind: TypeAlias = Literal["jobs", "pods", "events", "stop"]
"""What a change is about; ``stop`` wakes the reader of the queue."""

_WATCH_SECONDS = 290
"""How long the server keeps a watch open; servers and proxies close them after five minutes or later."""
_READ_SECONDS = _WATCH_SECONDS + 30.0
_UNAUTHORIZED_SECONDS = 300.0
"""How long 401 is retried: a token may be renewed meanwhile."""
_MAX_EVENT_WATCHES = 5
"""How many objects' events are watched, a connection each; many pods have the same problem."""
_GONE = 410
_UNAUTHORIZED = 401


@dataclass(frozen=True)
class Change:
    """A new state of the watched objects.

    Attributes:
        kind: Kind of the objects.
        items: All of them by name.
        error: Why the watcher gave up; None while it goes on.
        about: The name of the object that events are about.
    """

    kind: Kind
    items: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    error: ApiError | None = None
    about: str = ""


class Watcher:
    """Keeps the state of some objects up to date in a thread: a list, then a watch from its version on.

    A watch that ends, breaks or is refused with 429 or 5xx resumes from the last version; after 410 (version expired) it starts
    with a list again, so no object is missed. Each state is put into a queue.

    Args:
        kind: Kind of the objects.
        function: The client's method that lists them.
        cluster: The cluster.
        query: Selectors for `function`.
        changes: Receives the states.
        report: Receives a line whenever the server becomes unreachable.
        about: The name of the object that events are about.
    """

    def __init__(
        self,
        kind: Kind,
        function: Callable[..., Any],
        cluster: Cluster,
        query: Mapping[str, str],
        changes: queue.SimpleQueue[Change],
        report: Report,
        about: str = "",
    ) -> None:
        self._kind = kind
        self._about = about
        self._function = function
        self._cluster = cluster
        self._query: dict[str, Any] = dict(query)
        self._changes = changes
        self._report = report
        self._stop = StopSignal()
        self._items: dict[str, dict[str, Any]] = {}
        self._version: str | None = None
        self._stream: Stream | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"mlprojects-watch-{kind}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def request_stop(self) -> None:
        """Requests the end and returns at once."""
        self._stop.request("done")
        with self._lock:
            if self._stream is not None:
                self._stream.abort()

    def stop(self) -> None:
        """Requests the end and waits for the thread; idempotent."""
        self.request_stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        backoff, away, unauthorized_since = Backoff(), False, 0.0
        while not self._stop.requested:
            try:
                if self._version is None:
                    self._list()
                if away:
                    self._report(f"The API server answers again; watching {self._kind} goes on.")
                    away = False
                if self._follow():
                    backoff.reset()
                unauthorized_since = 0.0
                # Avoids a tight loop if the server ends watches at once.
                self._stop.wait(backoff.next())
            except ApiError as error:
                if error.status == _UNAUTHORIZED:
                    unauthorized_since = unauthorized_since or time.monotonic()
                    final = time.monotonic() - unauthorized_since > _UNAUTHORIZED_SECONDS
                else:
                    final, unauthorized_since = not error.transient and error.status != _GONE, 0.0
                if final:
                    self._changes.put(Change(self._kind, error=error, about=self._about))
                    return
                if error.status == _GONE:
                    self._version = None
                elif error.status != NO_ANSWER or away:
                    self._report_interruption(error, reported=away)
                    away = True
                delay = backoff.next(error.retry_after)
                away = away or delay > 2
                self._stop.wait(delay)

    def _report_interruption(self, error: ApiError, *, reported: bool) -> None:
        if not reported and not self._stop.requested:
            status = f"status {error.status}" if error.status else error.message
            self._report(f"Watching {self._kind} was interrupted ({status}); retrying.")

    def _list(self) -> None:
        answer = self._cluster.call(
            f"list {self._kind}", self._function, self._cluster.namespace, stop=self._stop, **self._query
        )
        self._items = {each["metadata"]["name"]: each for each in answer.get("items") or []}
        self._version = (answer.get("metadata") or {}).get("resourceVersion")
        self._put()

    def _put(self) -> None:
        self._changes.put(Change(self._kind, dict(self._items), about=self._about))

    def _follow(self) -> bool:
        """Reads one watch to its end; returns whether any event came."""
        stream = self._cluster.open(
            f"watch {self._kind}",
            self._function,
            self._cluster.namespace,
            watch=True,
            resource_version=self._version,
            allow_watch_bookmarks=True,
            timeout_seconds=_WATCH_SECONDS,
            _request_timeout=(CONNECT_SECONDS, _READ_SECONDS),
            **self._query,
        )
        with self._lock:
            self._stream = stream
        came = False
        try:
            if self._stop.requested:
                return came
            for event in _events(stream):
                came = True
                self._apply(event)
                if self._stop.wait(0):
                    break
        finally:
            with self._lock:
                self._stream = None
            stream.close()
        return came

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, body = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            raise ApiError(
                f"watch {self._kind}",
                int(body.get("code") or 0),
                body.get("reason") or "",
                body.get("message") or "the watch failed",
                namespace=self._cluster.namespace,
            )
        metadata = body.get("metadata") or {}
        self._version = metadata.get("resourceVersion") or self._version
        if kind == "BOOKMARK" or "name" not in metadata:
            return
        if kind == "DELETED":
            self._items.pop(metadata["name"], None)
        else:
            self._items[metadata["name"]] = body
        self._put()


def _events(stream: Stream) -> Iterator[dict[str, Any]]:
    buffered = b""
    for chunk in stream.chunks():
        *lines, buffered = (buffered + chunk).split(b"\n")
        for line in lines:
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                # A proxy's error text; the watch resumes from the last version.
                raise ApiError("watch", NO_ANSWER, "", "the stream broke off")
            yield event


class EventWatch:
    """Watches the events about a Job and its pending pods: only they explain why a pod is not created or not mounted.

    Without permission to read events, diagnoses are less detailed. For one thread.

    Args:
        cluster: The cluster.
        changes: The watchers' queue; changes about events are to be passed to `apply`.
        report: Receives warnings.
    """

    def __init__(self, cluster: Cluster, changes: queue.SimpleQueue[Change], report: Report) -> None:
        self._cluster = cluster
        self._changes = changes
        self._report = report
        self._refused = False
        self._watchers: dict[str, Watcher] = {}
        self._ended: list[Watcher] = []
        self._known: dict[str, Mapping[str, dict[str, Any]]] = {}

    @property
    def known(self) -> list[dict[str, Any]]:
        """All events seen about the watched objects."""
        return [event for events in self._known.values() for event in events.values()]

    def watch(self, names: Iterable[str]) -> None:
        """Watches the events about these objects instead of the previous ones."""
        wanted = [] if self._refused else list(names)[:_MAX_EVENT_WATCHES]
        for name in [each for each in self._watchers if each not in wanted]:
            watcher = self._watchers.pop(name)
            watcher.request_stop()
            self._ended.append(watcher)
            self._known.pop(name, None)
        for name in wanted:
            if name not in self._watchers:
                query = {"field_selector": f"involvedObject.name={name}"}
                function = self._cluster.core.list_namespaced_event
                # The watchers of the Job and its pods report the same interruptions.
                watcher = Watcher("events", function, self._cluster, query, self._changes, lambda _: None, about=name)
                self._watchers[name] = watcher
                watcher.start()

    def apply(self, change: Change) -> None:
        """Applies a change about events."""
        if change.error is None:
            if change.about in self._watchers:
                self._known[change.about] = change.items
        elif not self._refused:
            self._refused = True
            self._report(explain_refusal(change.error, self._cluster.name)[0] + "; continuing without events.")
            self.watch(())

    def stop(self) -> None:
        """Stops all watchers and waits for them."""
        self.watch(())
        for watcher in self._ended:
            watcher.stop()
