"""The Kubernetes API: requests as plain JSON with retries and typed errors, streams, and watches that survive interruptions."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prefect_mlprojects._support.retry import Backoff, retry
from prefect_mlprojects.backends.contract import Report
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

Json: TypeAlias = Mapping[str, Any]

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
RETRY_SECONDS = 90.0  # how long a request is retried while the server is unreachable or overloaded
_WATCH_SECONDS = 290
"""How long the server keeps a watch open; servers and proxies close them after five minutes or later."""
_UNAUTHORIZED_SECONDS = 300.0  # how long a watch retries 401: a token may be renewed meanwhile

NO_ANSWER = 0  # the status of an `ApiError` when no answer came
_TRANSIENT_STATUSES = frozenset({NO_ANSWER, 429, 500, 502, 503, 504})
_SDK_VERBS = {"get": "read", "watch": "list"}
_SDK_RESOURCES = {"jobs": "job", "pods": "pod", "events": "event", "secrets": "secret", "configmaps": "config_map"}


def nested(value: Any, path: str) -> Any:
    """Returns a field such as ``status.phase``; None if it, or a mapping on the way to it, is missing."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


@dataclass
class ApiError(Exception):
    """Raised when the API server refuses a request or does not answer.

    `action` is the verb and resource as RBAC names them, such as ``create jobs``; `status` the HTTP status or `NO_ANSWER`;
    `reason` Kubernetes' reason, such as ``Forbidden``; `retry_after` the seconds after which the server asks for a retry.
    """

    action: str
    status: int
    reason: str
    message: str
    retry_after: float | None = None
    namespace: str = ""

    @property
    def transient(self) -> bool:
        """True if a retry may succeed."""
        return self.status in _TRANSIENT_STATUSES


@dataclass(frozen=True, eq=False)
class Cluster:
    """A namespace of a cluster; thread-safe. `name` is the cluster's name in messages.

    Requests are named by their action, such as ``get jobs``; all methods raise `ApiError`.
    """

    client: ApiClient
    namespace: str
    name: str

    def call(
        self,
        action: str,
        *names: str,
        function: Callable[..., Any] | None = None,
        stop: StopSignal | None = None,
        retry_seconds: float = RETRY_SECONDS,
        on_retry: Callable[[Any, float], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Sends an idempotent request and returns the JSON body; a stop request ends the retries.

        `function` is the client's method if it can't be found by the action; `on_retry` receives the error and the delay in
        seconds before each retry.
        """
        function = function or self._method(action, *names)
        return retry(
            lambda: self._request(action, function, **options),
            is_transient=lambda error: isinstance(error, ApiError) and error.transient,
            seconds=retry_seconds,
            stop=stop,
            on_retry=on_retry,
        )

    def _method(self, action: str, *names: str) -> Callable[..., Any]:
        """Returns the client's method for an action in the namespace; `names` is the object's name, if it takes one."""
        from kubernetes.client import BatchV1Api, CoreV1Api

        verb, _, resource = action.partition(" ")
        api = BatchV1Api(self.client) if resource == "jobs" else CoreV1Api(self.client)
        method = getattr(api, f"{_SDK_VERBS.get(verb, verb)}_namespaced_{_SDK_RESOURCES[resource]}")
        return partial(method, *names, self.namespace)

    def _request(self, action: str, function: Callable[..., Any], **options: Any) -> dict[str, Any]:
        with _translated_errors(action, self.namespace):
            response = function(_preload_content=False, _request_timeout=(CONNECT_SECONDS, READ_SECONDS), **options)
            try:
                answer = json.loads(response.data)
            finally:
                response.release_conn()
        if not isinstance(answer, dict):
            raise ApiError(action, NO_ANSWER, "", "the answer was not a JSON object", namespace=self.namespace)
        return answer

    def items(self, resource: Literal["jobs", "pods"], **options: Any) -> list[dict[str, Any]]:
        """Returns the objects that a selector matches; takes the options of `call`."""
        return self.call(f"list {resource}", **options).get("items") or []

    def delete_job(self, name: str, uid: str, *, retry_seconds: float = RETRY_SECONDS) -> None:
        """Deletes a Job after its pods and Secrets; no-op if it is gone or was replaced by another Job."""
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        try:
            self.call("delete jobs", name, body=body, retry_seconds=retry_seconds)
        except ApiError as error:
            if error.status not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
                raise

    def open_watch(self, resource: str, **options: Any) -> Any:
        """Opens a watch, without retries; returns the response."""
        timeouts = {"timeout_seconds": _WATCH_SECONDS, "_request_timeout": (CONNECT_SECONDS, _WATCH_SECONDS + 30.0)}
        method = self._method(f"watch {resource}")
        return method(watch=True, allow_watch_bookmarks=True, _preload_content=False, **timeouts, **options)

    def open_log(self, pod: str, query: Mapping[str, str], *, read_timeout: float) -> Any:
        """Opens a container's log, without retries, and returns the response; the client's own method lacks ``sinceTime``.

        After `read_timeout` seconds without a byte the connection counts as lost.
        """
        path, names = "/api/v1/namespaces/{namespace}/pods/{name}/log", {"namespace": self.namespace, "name": pod}
        options = {"auth_settings": ["BearerToken"], "_return_http_data_only": True, "_preload_content": False}
        arguments, timeouts = ("GET", names, list(query.items()), {"Accept": "*/*"}), (CONNECT_SECONDS, read_timeout)
        return self.client.call_api(path, *arguments, _request_timeout=timeouts, **options)


class StreamReader:
    """Reads one response at a time, while it arrives; a request of `stop`, or `abort`, from another thread ends the reading."""

    def __init__(self, action: str, namespace: str) -> None:
        self.stop = StopSignal()
        self._translated_errors = partial(_translated_errors, action, namespace)
        self._response: Any = None
        self._lock = threading.Lock()
        self.stop.on_request(self.abort)

    @contextmanager
    def reading(self, open_response: Callable[[], Any]) -> Iterator[Iterator[bytes]]:
        """Opens a response, has its bytes read, and closes it; raises `ApiError` if it is refused or the connection is lost."""
        with self._translated_errors():
            response = open_response()
        with self._lock:
            self._response = response
        try:
            yield self._chunks(response)
        finally:
            with self._lock:
                self._response = None
            # After a partly read response the connection can't be reused.
            response.close()

    def _chunks(self, response: Any) -> Iterator[bytes]:
        # A stop that was requested while the response was opened did not abort it.
        if not self.stop.requested:
            with self._translated_errors():
                yield from response.stream(65536)

    def abort(self) -> None:
        """Shuts the socket of the response that is being read down, which ends its reader at once."""
        with self._lock:
            connection = getattr(self._response, "connection", None) or getattr(self._response, "_connection", None)
            # For a response with "Connection: close", urllib3 detaches the socket from the connection.
            raw = getattr(getattr(getattr(self._response, "_fp", None), "fp", None), "raw", None)
            sock = getattr(connection, "sock", None) or getattr(raw, "_sock", None)
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def _translated_errors(action: str, namespace: str) -> Iterator[None]:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise _api_error(action, error, namespace) from None
    except (HTTPError, OSError, ValueError) as error:
        # ValueError: urllib3 raises it for a read on an aborted response, json for a truncated body.
        raise ApiError(action, NO_ANSWER, "", f"{type(error).__name__}: {error}", namespace=namespace) from None


def _api_error(action: str, error: Any, namespace: str) -> ApiError:
    body, retry_after = None, None
    with suppress(ValueError, TypeError):
        body = json.loads(error.body)
    with suppress(ValueError, TypeError, KeyError):
        retry_after = float(error.headers["Retry-After"])
    message = nested(body, "message") or str(error.body or error.reason or "").strip()[:500]
    # The client reports a failed TLS handshake as an exception of status 0.
    status, reason = int(error.status or NO_ANSWER), nested(body, "reason") or ""
    return ApiError(action, status, reason, message, retry_after, namespace)


Kind: TypeAlias = Literal["jobs", "pods", "events", "stop"]
"""What a change is about; ``stop`` wakes the reader of the queue."""


@dataclass(frozen=True)
class Change:
    """A new state of the watched objects: all `items` by name, or the `error` for which the watcher gave up.

    `about` is the name of the object that events are about.
    """

    kind: Kind
    items: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    error: ApiError | None = None
    about: str = ""


@dataclass(eq=False)
class Watcher:
    """Keeps the state of some objects up to date in a thread: a list, then a watch from its version on.

    A watch that ends, breaks or is refused with 429 or 5xx resumes from the last version; after 410 (version expired) it starts
    with a list again, so no object is missed. Each state is put into the queue `changes`. `query` has the selectors; `report`
    receives a line whenever the server becomes unreachable.
    """

    cluster: Cluster
    kind: Kind
    query: Mapping[str, Any]
    changes: queue.SimpleQueue[Change]
    report: Report
    about: str = ""

    def __post_init__(self) -> None:
        self._reader = StreamReader(f"watch {self.kind}", self.cluster.namespace)
        self._items: dict[str, dict[str, Any]] = {}
        self._version: str | None = None
        self._interrupted = False
        self._unauthorized_since: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"mlprojects-watch-{self.kind}", daemon=True)
        self._thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """Requests the end, and waits for the thread if `wait` is true; idempotent."""
        self._reader.stop.request("done")
        if wait:
            self._thread.join()

    def _run(self) -> None:
        backoff, stop = Backoff(), self._reader.stop
        while not stop.requested:
            try:
                if self._version is None:
                    self._list()
                if self._interrupted:
                    self.report(f"The API server answers again; watching {self.kind} continues.")
                    self._interrupted = False
                if self._follow():
                    backoff.reset()
                self._unauthorized_since = None
                # Avoids a tight loop if the server ends watches at once.
                stop.wait(backoff.next())
            except ApiError as error:
                if self._is_final(error):
                    self.changes.put(Change(self.kind, error=error, about=self.about))
                    return
                delay = backoff.next(error.retry_after)
                if error.status == HTTPStatus.GONE:
                    self._version = None
                elif not (self._interrupted or stop.requested) and (error.status != NO_ANSWER or delay > 2):
                    self._interrupted = True
                    status = f"status {error.status}" if error.status else error.message
                    self.report(f"Watching {self.kind} was interrupted ({status}); retrying.")
                stop.wait(delay)

    def _is_final(self, error: ApiError) -> bool:
        if error.status != HTTPStatus.UNAUTHORIZED:
            self._unauthorized_since = None
            return not error.transient and error.status != HTTPStatus.GONE
        self._unauthorized_since = self._unauthorized_since or time.monotonic()
        return time.monotonic() - self._unauthorized_since > _UNAUTHORIZED_SECONDS

    def _list(self) -> None:
        answer = self.cluster.call(f"list {self.kind}", stop=self._reader.stop, **self.query)
        self._items = {each["metadata"]["name"]: each for each in answer.get("items") or []}
        self._version = nested(answer, "metadata.resourceVersion")
        self._put()

    def _put(self) -> None:
        self.changes.put(Change(self.kind, dict(self._items), about=self.about))

    def _follow(self) -> bool:
        """Reads one watch to its end; returns whether any event came."""
        came, open_watch = False, partial(self.cluster.open_watch, self.kind, resource_version=self._version)
        with self._reader.reading(lambda: open_watch(**self.query)) as chunks:
            for event in _json_lines(chunks):
                came = True
                self._apply(event)
        return came

    def _apply(self, event: Json) -> None:
        kind, body = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            status, reason = int(body.get("code") or 0), body.get("reason") or ""
            message = body.get("message") or "the watch failed"
            raise ApiError(f"watch {self.kind}", status, reason, message, namespace=self.cluster.namespace)
        metadata = body.get("metadata") or {}
        self._version = metadata.get("resourceVersion") or self._version
        if kind == "BOOKMARK" or "name" not in metadata:
            return
        if kind == "DELETED":
            self._items.pop(metadata["name"], None)
        else:
            self._items[metadata["name"]] = body
        self._put()


def _json_lines(chunks: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a watch, one per line; raises `ApiError` if the stream broke off."""
    buffered = b""
    for chunk in chunks:
        *lines, buffered = (buffered + chunk).split(b"\n")
        for line in filter(bytes.strip, lines):
            try:
                event = {**json.loads(line)}
            except (ValueError, TypeError):
                # A proxy's error text; the watch resumes from the last version.
                raise ApiError("watch", NO_ANSWER, "", "the stream broke off") from None
            yield event
