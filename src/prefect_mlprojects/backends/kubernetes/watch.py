"""Watches a run's Job and its pods, for as long as the Job lives."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.kubernetes.api import CONNECT_SECONDS, LOST, ApiRefusal, Cluster, Stream
from prefect_mlprojects.types import StopSignal

Kind: TypeAlias = Literal["job", "pods", "events", "stop"]
"""What a change is about; ``stop`` wakes the reader of the queue."""

_WATCH_SECONDS = 290
"""How long the server keeps a watch open before we ask for it anew; servers and proxies cut them at five minutes or later."""
_SILENT_SECONDS = _WATCH_SECONDS + 30.0
_SIGNED_OUT_SECONDS = 300.0
"""For how long credentials may be refused (401): a token may be renewed meanwhile, but no run waits for that for ever."""
_GONE = 410
_UNAUTHORIZED = 401


@dataclass(frozen=True)
class Change:
    """What a watcher saw.

    Attributes:
        kind: What it watches.
        items: All that there is now, by name.
        refusal: Why it can't go on; None while it can.
        about: The name of the object that events are about.
    """

    kind: Kind
    items: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    refusal: ApiRefusal | None = None
    about: str = ""


class Watcher:
    """Keeps the state of some objects up to date: a list, then changes from its version on.

    A watch that ends, is cut or refused with 429 or 5xx is resumed from the last version seen; one whose version has expired
    (410) begins again with a list, so nothing that still holds is missed. Each state is put into a queue.

    Args:
        kind: What is watched.
        function: The client's method that lists the objects.
        cluster: The cluster.
        query: The method's selectors.
        changes: Takes the states.
        report: Takes lines about trouble, once each time the server goes away.
        about: The name of the object that events are about.
    """

    def __init__(
        self,
        kind: Kind,
        function: Callable[..., Any],
        cluster: Cluster,
        query: Mapping[str, str],
        changes: queue.SimpleQueue[Change],
        report: Callable[[str], None],
        about: str = "",
    ) -> None:
        self._kind = kind
        self._about = about
        self._resource = {"job": "jobs", "pods": "pods", "events": "events", "stop": ""}[kind]
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
        """Starts watching."""
        self._thread.start()

    def request_stop(self) -> None:
        """Asks it to end, and returns at once."""
        self._stop.request("done")
        with self._lock:
            if self._stream is not None:
                self._stream.abort()

    def stop(self) -> None:
        """Ends it, and returns when it has ended; doing so twice does nothing."""
        self.request_stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        backoff, away, signed_out_since = Backoff(), False, 0.0
        while not self._stop.requested:
            try:
                if self._version is None:
                    self._list()
                if away:
                    self._report(f"The API server answers again; watching {self._resource} goes on.")
                    away = False
                if self._follow():
                    backoff.reset()
                signed_out_since = 0.0
                # A server that ends watches at once must not be asked in a tight loop.
                self._stop.wait(backoff.next())
            except ApiRefusal as refusal:
                if refusal.status == _UNAUTHORIZED:
                    signed_out_since = signed_out_since or time.monotonic()
                    final = time.monotonic() - signed_out_since > _SIGNED_OUT_SECONDS
                else:
                    final, signed_out_since = not refusal.transient and refusal.status != _GONE, 0.0
                if final:
                    self._changes.put(Change(self._kind, refusal=refusal, about=self._about))
                    return
                if refusal.status == _GONE:
                    self._version = None
                elif refusal.status != LOST or away:
                    self._tell(refusal, away)
                    away = True
                delay = backoff.next(refusal.retry_after)
                away = away or delay > 2
                self._stop.wait(delay)

    def _tell(self, refusal: ApiRefusal, told: bool) -> None:
        if not told and not self._stop.requested:
            status = f"status {refusal.status}" if refusal.status else refusal.message
            self._report(f"Watching {self._resource} was interrupted ({status}); trying again.")

    def _list(self) -> None:
        answer = self._cluster.call(
            f"list {self._resource}", self._function, self._cluster.namespace, stop=self._stop, **self._query
        )
        self._items = {each["metadata"]["name"]: each for each in answer.get("items") or []}
        self._version = (answer.get("metadata") or {}).get("resourceVersion")
        self._put()

    def _put(self) -> None:
        self._changes.put(Change(self._kind, dict(self._items), about=self._about))

    def _follow(self) -> bool:
        """Reads one watch to its end; returns whether anything came."""
        stream = self._cluster.open(
            f"watch {self._resource}",
            self._function,
            self._cluster.namespace,
            watch=True,
            resource_version=self._version,
            allow_watch_bookmarks=True,
            timeout_seconds=_WATCH_SECONDS,
            _request_timeout=(CONNECT_SECONDS, _SILENT_SECONDS),
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
                self._take(event)
                if self._stop.wait(0):
                    break
        finally:
            with self._lock:
                self._stream = None
            stream.close()
        return came

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, body = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            raise ApiRefusal(
                f"watch {self._resource}",
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
    held = b""
    for chunk in stream.chunks():
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                # What a proxy wrote into the stream; the watch is resumed where it was.
                raise ApiRefusal("watch", LOST, "", "the stream broke off")
            yield event
