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
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prefect_mlprojects._support.retry import Backoff, retry
from prefect_mlprojects.backends.contract import Report
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
RETRY_SECONDS = 90.0  # how long a request is retried while the server is unreachable or overloaded
_WATCH_SECONDS = 290
"""How long the server keeps a watch open; servers and proxies close them after five minutes or later."""
_UNAUTHORIZED_SECONDS = 300.0  # how long a watch retries 401: a token may be renewed meanwhile

NO_ANSWER = 0  # the status of an `ApiError` when no answer came
BAD_REQUEST, UNAUTHORIZED, FORBIDDEN, NOT_FOUND, CONFLICT, GONE = 400, 401, 403, 404, 409, 410
_TRANSIENT_STATUSES = frozenset({NO_ANSWER, 429, 500, 502, 503, 504})


@dataclass
class ApiError(Exception):
    """Raised when the API server refuses a request or does not answer.

    Attributes:
        action: Verb and resource as RBAC names them, such as ``create jobs``.
        status: The HTTP status, or `NO_ANSWER`.
        reason: Kubernetes' reason, such as ``Forbidden`` or ``Invalid``.
        retry_after: Seconds after which the server asks for a retry, if it does.
    """

    action: str
    status: int
    reason: str
    message: str
    retry_after: float | None = None
    namespace: str = ""

    def __post_init__(self) -> None:
        super().__init__(self.action, self.status, self.message)

    @property
    def transient(self) -> bool:
        """True if a retry may succeed."""
        return self.status in _TRANSIENT_STATUSES


class Cluster:
    """A namespace of a cluster; thread-safe. `name` is the cluster's name in messages."""

    def __init__(self, client: ApiClient, namespace: str, name: str) -> None:
        from kubernetes.client import BatchV1Api, CoreV1Api

        self.client = client
        self.namespace = namespace
        self.name = name
        self.batch: Any = BatchV1Api(client)
        self.core: Any = CoreV1Api(client)

    def call(
        self,
        action: str,
        function: Callable[..., Any],
        *arguments: Any,
        stop: StopSignal | None = None,
        retry_seconds: float = RETRY_SECONDS,
        on_retry: Callable[[Any, float], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Sends an idempotent request and returns the JSON body; a stop request ends the retries.

        `action` names the request in errors, `function` is a method of `batch` or `core`, `on_retry` receives the error and the
        delay in seconds before each retry. Raises `ApiError` if the server refused it or the retries were used up.
        """
        return retry(
            lambda: self._request(action, function, *arguments, **options),
            is_transient=lambda error: isinstance(error, ApiError) and error.transient,
            seconds=retry_seconds,
            stop=stop,
            on_retry=on_retry,
        )

    def _request(self, action: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        options.setdefault("_request_timeout", (CONNECT_SECONDS, READ_SECONDS))
        with _translated_errors(action, self.namespace):
            response = function(*arguments, _preload_content=False, **options)
            try:
                answer = json.loads(response.data)
            finally:
                response.release_conn()
        if not isinstance(answer, dict):
            raise ApiError(action, NO_ANSWER, "", "the answer was not a JSON object", namespace=self.namespace)
        return answer

    def list_pods(self, **options: Any) -> list[dict[str, Any]]:
        """Returns the pods that a selector matches, or raises `ApiError`."""
        return self.call("list pods", self.core.list_namespaced_pod, self.namespace, **options).get("items") or []

    def list_jobs(self, **options: Any) -> list[dict[str, Any]]:
        """Returns the Jobs that a selector matches, or raises `ApiError`."""
        return self.call("list jobs", self.batch.list_namespaced_job, self.namespace, **options).get("items") or []

    def delete_job(self, name: str, uid: str, *, retry_seconds: float = RETRY_SECONDS) -> None:
        """Deletes a Job after its pods and Secrets, or raises `ApiError`; no-op if it is gone or was replaced by another Job."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        body, delete = {"apiVersion": "v1", "kind": "DeleteOptions", **options}, self.batch.delete_namespaced_job
        try:
            self.call("delete jobs", delete, name, self.namespace, body=body, retry_seconds=retry_seconds)
        except ApiError as error:
            if error.status not in (NOT_FOUND, CONFLICT):
                raise

    def open(self, action: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Stream:
        """Opens a stream (a watch or a followed log) without retries, or raises `ApiError`."""
        with _translated_errors(action, self.namespace):
            return Stream(function(*arguments, _preload_content=False, **options), action, self.namespace)

    def open_log(self, pod: str, query: Mapping[str, str], *, read_timeout: float) -> Stream:
        """Opens a container's log, or raises `ApiError`; the client's own method lacks ``sinceTime``.

        After `read_timeout` seconds without a byte the connection counts as lost.
        """

        def read(**options: Any) -> Any:
            return self.client.call_api(
                "/api/v1/namespaces/{namespace}/pods/{name}/log",
                "GET",
                {"namespace": self.namespace, "name": pod},
                list(query.items()),
                {"Accept": "*/*"},
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                **options,
            )

        return self.open("get pods/log", read, _request_timeout=(CONNECT_SECONDS, read_timeout))


class Stream:
    """A response that is read while it arrives; `abort` may be called from another thread."""

    def __init__(self, response: Any, action: str, namespace: str) -> None:
        self._response = response
        self._action = action
        self._namespace = namespace

    def chunks(self) -> Iterator[bytes]:
        """Yields bytes as they arrive, until the server closes the stream; raises `ApiError` if the connection is lost."""
        with _translated_errors(self._action, self._namespace):
            yield from self._response.stream(65536)

    def json_lines(self) -> Iterator[dict[str, Any]]:
        """Yields the JSON objects of a watch, one per line; raises `ApiError` if the stream broke off."""
        buffered = b""
        for chunk in self.chunks():
            *lines, buffered = (buffered + chunk).split(b"\n")
            for line in filter(bytes.strip, lines):
                event = None
                with suppress(ValueError):
                    event = json.loads(line)
                if not isinstance(event, dict):
                    # A proxy's error text; the watch resumes from the last version.
                    raise ApiError("watch", NO_ANSWER, "", "the stream broke off")
                yield event

    def abort(self) -> None:
        """Shuts the socket down, which ends a reader in another thread at once."""
        connection = getattr(self._response, "connection", None) or getattr(self._response, "_connection", None)
        # For a response with "Connection: close", urllib3 detaches the socket from the connection.
        raw = getattr(getattr(getattr(self._response, "_fp", None), "fp", None), "raw", None)
        sock = getattr(connection, "sock", None) or getattr(raw, "_sock", None)
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection: after a partly read response it can't be reused."""
        self._response.close()


class StreamSlot:
    """Holds the stream that one thread reads, so that another thread can abort it; `stop` ends the reading."""

    def __init__(self) -> None:
        self.stop = StopSignal()
        self._stream: Stream | None = None
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, stream: Stream) -> Iterator[Stream]:
        """Holds a stream while it is read, and closes it."""
        with self._lock:
            self._stream = stream
        try:
            yield stream
        finally:
            with self._lock:
                self._stream = None
            stream.close()

    def abort(self) -> None:
        """Aborts the stream that is being read, if any."""
        with self._lock:
            if self._stream is not None:
                self._stream.abort()


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
    body: dict[str, Any] = {}
    with suppress(ValueError, TypeError):
        loaded = json.loads(error.body)
        body = loaded if isinstance(loaded, dict) else {}
    retry_after: float | None = None
    with suppress(ValueError, TypeError, KeyError):
        retry_after = float((error.headers or {})["Retry-After"])
    message = body.get("message") or str(error.body or error.reason or "").strip()[:500]
    # The client reports a failed TLS handshake as an exception of status 0.
    status = int(error.status or NO_ANSWER)
    return ApiError(action, status, body.get("reason") or "", message, retry_after, namespace)


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


class Watcher:
    """Keeps the state of some objects up to date in a thread: a list, then a watch from its version on.

    A watch that ends, breaks or is refused with 429 or 5xx resumes from the last version; after 410 (version expired) it starts
    with a list again, so no object is missed. Each state is put into the queue `changes`. `function` is the client's method that
    lists the objects, `query` its selectors; `report` receives a line whenever the server becomes unreachable.
    """

    def __init__(
        self,
        kind: Kind,
        function: Callable[..., Any],
        cluster: Cluster,
        query: Mapping[str, Any],
        changes: queue.SimpleQueue[Change],
        report: Report,
        about: str = "",
    ) -> None:
        self._kind = kind
        self._about = about
        self._function = function
        self._cluster = cluster
        self._query = query
        self._changes = changes
        self._report = report
        self._slot = StreamSlot()
        self._items: dict[str, dict[str, Any]] = {}
        self._version: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"mlprojects-watch-{kind}", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Requests the end and returns at once."""
        self._slot.stop.request("done")
        self._slot.abort()

    def stop(self) -> None:
        """Requests the end and waits for the thread; idempotent."""
        self.request_stop()
        self._thread.join()

    def _run(self) -> None:
        backoff, away, unauthorized_since, stop = Backoff(), False, 0.0, self._slot.stop
        while not stop.requested:
            try:
                if self._version is None:
                    self._list()
                if away:
                    self._report(f"The API server answers again; watching {self._kind} continues.")
                    away = False
                if self._follow():
                    backoff.reset()
                unauthorized_since = 0.0
                # Avoids a tight loop if the server ends watches at once.
                stop.wait(backoff.next())
            except ApiError as error:
                if error.status == UNAUTHORIZED:
                    unauthorized_since = unauthorized_since or time.monotonic()
                    final = time.monotonic() - unauthorized_since > _UNAUTHORIZED_SECONDS
                else:
                    final, unauthorized_since = not error.transient and error.status != GONE, 0.0
                if final:
                    self._changes.put(Change(self._kind, error=error, about=self._about))
                    return
                if error.status == GONE:
                    self._version = None
                delay = backoff.next(error.retry_after)
                if not away and error.status != GONE and (error.status != NO_ANSWER or delay > 2):
                    away = True
                    if not stop.requested:
                        status = f"status {error.status}" if error.status else error.message
                        self._report(f"Watching {self._kind} was interrupted ({status}); retrying.")
                stop.wait(delay)

    def _list(self) -> None:
        action, namespace = f"list {self._kind}", self._cluster.namespace
        answer = self._cluster.call(action, self._function, namespace, stop=self._slot.stop, **self._query)
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
            _request_timeout=(CONNECT_SECONDS, _WATCH_SECONDS + 30.0),
            **self._query,
        )
        came = False
        with self._slot.reading(stream):
            if self._slot.stop.requested:
                return came
            for event in stream.json_lines():
                came = True
                self._apply(event)
                if self._slot.stop.wait(0):
                    break
        return came

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, body = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            message = body.get("message") or "the watch failed"
            status, reason = int(body.get("code") or 0), body.get("reason") or ""
            raise ApiError(f"watch {self._kind}", status, reason, message, namespace=self._cluster.namespace)
        metadata = body.get("metadata") or {}
        self._version = metadata.get("resourceVersion") or self._version
        if kind == "BOOKMARK" or "name" not in metadata:
            return
        if kind == "DELETED":
            self._items.pop(metadata["name"], None)
        else:
            self._items[metadata["name"]] = body
        self._put()
