"""What the API server keeps: objects with resource versions, and the history from which watches are served."""

from __future__ import annotations

import copy
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

Json = dict[str, Any]
Key = tuple[str, str, str]

HISTORY = 2000
"""How many changes are kept; a watch from an older version gets 410, as from etcd after its compaction."""


@dataclass(frozen=True)
class Resource:
    """A kind of object, as paths and RBAC name it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


RESOURCES = {
    each.plural: each
    for each in (
        Resource("", "v1", "namespaces", "Namespace", namespaced=False),
        Resource("", "v1", "pods", "Pod"),
        Resource("", "v1", "configmaps", "ConfigMap"),
        Resource("", "v1", "secrets", "Secret"),
        Resource("", "v1", "events", "Event"),
        Resource("", "v1", "serviceaccounts", "ServiceAccount"),
        Resource("", "v1", "resourcequotas", "ResourceQuota"),
        Resource("batch", "v1", "jobs", "Job"),
        Resource("rbac.authorization.k8s.io", "v1", "roles", "Role"),
        Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding"),
    )
}


class ApiError(Exception):
    """A refusal, as the server answers it."""

    def __init__(self, code: int, reason: str, message: str, details: Json | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details

    def status(self) -> Json:
        body: Json = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        return {**body, "details": self.details} if self.details else body


def not_found(resource: Resource, name: str) -> ApiError:
    return ApiError(
        404, "NotFound", f'{resource.qualified} "{name}" not found', {"name": name, "kind": resource.plural}
    )


def now(later: float = 0) -> str:
    """Returns the time, `later` seconds from now, as the API writes it."""
    return (datetime.now(timezone.utc) + timedelta(seconds=later)).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Change:
    """One entry of the history."""

    version: int
    plural: str
    type: str
    object: Json


class Store:
    """All objects; thread-safe. What is handed out are copies."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._objects: dict[Key, Json] = {}
        self._version = 100
        self._history: deque[Change] = deque(maxlen=HISTORY)
        self._floor = 100

    @property
    def version(self) -> int:
        return self._version

    def get(self, plural: str, namespace: str, name: str) -> Json:
        with self.changed:
            found = self._objects.get((plural, namespace, name))
            if found is None:
                raise not_found(RESOURCES[plural], name)
            return copy.deepcopy(found)

    def find(self, plural: str, namespace: str, name: str) -> Json | None:
        with self.changed:
            return copy.deepcopy(self._objects.get((plural, namespace, name)))

    def list(self, plural: str, namespace: str | None = None) -> list[Json]:
        with self.changed:
            return [
                copy.deepcopy(each)
                for (kind, place, _), each in sorted(self._objects.items())
                if kind == plural and namespace in (None, "", place)
            ]

    def create(self, plural: str, body: Json, *, dry_run: bool = False) -> Json:
        resource = RESOURCES[plural]
        with self.changed:
            metadata = body["metadata"]
            key = (plural, metadata.get("namespace", ""), metadata["name"])
            if key in self._objects:
                raise ApiError(
                    409,
                    "AlreadyExists",
                    f'{resource.qualified} "{key[2]}" already exists',
                    {"name": key[2], "kind": plural},
                )
            body = copy.deepcopy(body)
            body["apiVersion"], body["kind"] = resource.api_version, resource.kind
            body["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
            if not dry_run:
                self._put(key, body, "ADDED")
            return copy.deepcopy(body)

    def update(self, plural: str, namespace: str, name: str, change: Callable[[Json], Any]) -> Json:
        """Lets a function change an object; the object is removed when it is being deleted and has no finalizer left."""
        with self.changed:
            key = (plural, namespace, name)
            found = self._objects.get(key)
            if found is None:
                raise not_found(RESOURCES[plural], name)
            body = copy.deepcopy(found)
            change(body)
            if body != found:
                self._put(key, body, "MODIFIED")
            return copy.deepcopy(body)

    def remove(self, plural: str, namespace: str, name: str) -> Json | None:
        with self.changed:
            found = self._objects.pop((plural, namespace, name), None)
            if found is not None:
                self._version += 1
                found = copy.deepcopy(found)
                found["metadata"]["resourceVersion"] = str(self._version)
                self._remember(plural, "DELETED", found)
            return found

    def _put(self, key: Key, body: Json, kind: str) -> None:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._objects[key] = body
        self._remember(key[0], kind, body)

    def _remember(self, plural: str, kind: str, body: Json) -> None:
        if len(self._history) == self._history.maxlen:
            self._floor = self._history[0].version
        self._history.append(Change(self._version, plural, kind, copy.deepcopy(body)))
        self.changed.notify_all()

    def changes(self, plural: str, since: int, seconds: float, closed: Callable[[], bool]) -> Iterator[Change | None]:
        """Yields what changes after a version; None every second, for bookmarks and to notice who has gone.

        Raises:
            ApiError: The version is older than the history (410).
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not closed():
            with self.changed:
                if since < self._floor:
                    raise ApiError(410, "Expired", f"too old resource version: {since} ({self._floor})")
                found = [each for each in self._history if each.version > since and each.plural == plural]
                if not found:
                    since = max(since, self._version)
                    self.changed.wait(min(1.0, max(0.0, deadline - time.monotonic())))
                    found = [each for each in self._history if each.version > since and each.plural == plural]
            if not found:
                yield None
            for each in found:
                since = each.version
                yield each
