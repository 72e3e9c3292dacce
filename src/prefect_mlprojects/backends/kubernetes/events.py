"""Watches the cluster's events about what has not started yet: only they can tell why a pod is not created or mounted."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prefect_mlprojects.backends.kubernetes.api import Cluster
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal
from prefect_mlprojects.backends.kubernetes.watch import Change, Watcher

_MOST_OBJECTS = 5
"""Of how many objects at once events are watched, a connection each; the troubles of many pods are the same."""


class EventWatch:
    """The events about a Job and its pending pods; for one thread.

    Without permission to read events the diagnosis has fewer words; nothing else depends on them.

    Args:
        cluster: The cluster.
        changes: Takes what the watchers see; ``take`` is to be given what is about events.
        report: Takes lines about trouble.
    """

    def __init__(self, cluster: Cluster, changes: queue.SimpleQueue[Change], report: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._changes = changes
        self._report = report
        self._refused = False
        self._watchers: dict[str, Watcher] = {}
        self._ended: list[Watcher] = []
        self._known: dict[str, Mapping[str, dict[str, Any]]] = {}

    @property
    def known(self) -> list[dict[str, Any]]:
        """All events that were seen about the objects that are watched."""
        return [event for events in self._known.values() for event in events.values()]

    def watch(self, names: Iterable[str]) -> None:
        """Watches the events about these objects, and no longer those about others."""
        wanted = [] if self._refused else list(names)[:_MOST_OBJECTS]
        for name in [each for each in self._watchers if each not in wanted]:
            watcher = self._watchers.pop(name)
            watcher.request_stop()
            self._ended.append(watcher)
            self._known.pop(name, None)
        for name in wanted:
            if name not in self._watchers:
                query = {"field_selector": f"involvedObject.name={name}"}
                function = self._cluster.core.list_namespaced_event
                watcher = Watcher("events", function, self._cluster, query, self._changes, _ignore, about=name)
                self._watchers[name] = watcher
                watcher.start()

    def take(self, change: Change) -> None:
        """Takes a change about events."""
        if change.refusal is None:
            if change.about in self._watchers:
                self._known[change.about] = change.items
        elif not self._refused:
            self._refused = True
            self._report(explain_refusal(change.refusal, self._cluster.name)[0] + "; going on without events.")
            self.watch(())

    def stop(self) -> None:
        """Ends all watchers, and returns when they have ended."""
        self.watch(())
        for watcher in self._ended:
            watcher.stop()


def _ignore(line: str) -> None:
    """The watchers of the Job and its pods tell of the same interruptions."""
