"""Requests to the API server: as plain JSON, tried again while that can help, and with errors that say what was refused."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
PATIENCE_SECONDS = 90.0
"""How long a request is tried again while the server is away or overloaded."""

_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})
LOST = 0
"""The status of an ``ApiRefusal`` when no answer came at all."""


@dataclass
class ApiRefusal(Exception):  # noqa: N818 - an answer of the server rather than an error of ours
    """The API server refused a request, or did not answer.

    Attributes:
        action: What was asked, such as ``create jobs``: the verb and the resource as RBAC names them.
        status: The HTTP status; ``LOST`` when no answer came.
        reason: Kubernetes' reason, such as ``Forbidden`` or ``Invalid``.
        message: The server's own words.
        retry_after: Seconds after which the server wants to be asked again, when it said so.
        namespace: The namespace it was about.
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
        """Whether asking again may help."""
        return self.status == LOST or self.status in _TRY_AGAIN


class Cluster:
    """A namespace of a cluster, as the rest of the backend sees it; thread-safe.

    Args:
        client: The client.
        namespace: The namespace.
        name: What the cluster is called in messages.
    """

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
        patience: float = PATIENCE_SECONDS,
        on_wait: Callable[[ApiRefusal, float], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Makes a request that may be made twice, and returns the answer as JSON.

        Args:
            action: The verb and the resource, for messages.
            function: A method of ``batch`` or ``core``.
            arguments: Its arguments.
            stop: Ends the waiting between two tries; the last refusal is raised then.
            patience: Seconds to try again for.
            on_wait: Called with the refusal and the seconds before each further try.
            options: Its keyword arguments.

        Raises:
            ApiRefusal: It was refused, or tried in vain.
        """
        deadline, backoff = time.monotonic() + patience, Backoff()
        while True:
            try:
                return self._once(action, function, *arguments, **options)
            except ApiRefusal as refusal:
                delay = backoff.next(refusal.retry_after)
                stopped = stop is not None and stop.requested
                if not refusal.transient or stopped or time.monotonic() + delay > deadline:
                    raise
                if on_wait is not None:
                    on_wait(refusal, delay)
                if stop is not None:
                    stop.wait(delay)
                else:
                    time.sleep(delay)

    def _once(self, action: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        options.setdefault("_request_timeout", (CONNECT_SECONDS, READ_SECONDS))
        with _translated(action, self.namespace):
            response = function(*arguments, _preload_content=False, **options)
            try:
                answer = json.loads(response.data)
            finally:
                response.release_conn()
        if not isinstance(answer, dict):
            raise ApiRefusal(action, LOST, "", "the answer was not a JSON object", namespace=self.namespace)
        return answer

    def open(self, action: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Stream:
        """Opens a stream (a watch, a log that is followed); one try.

        Raises:
            ApiRefusal: It was refused.
        """
        with _translated(action, self.namespace):
            return Stream(function(*arguments, _preload_content=False, **options), action, self.namespace)

    def open_log(self, pod: str, query: Mapping[str, str], *, read_timeout: float) -> Stream:
        """Opens a container's log; the client's own method lacks ``sinceTime``.

        Args:
            pod: The pod's name.
            query: The query, as the API names it (``container``, ``follow``, ``sinceTime`` …).
            read_timeout: Seconds without a byte after which the connection counts as lost.

        Raises:
            ApiRefusal: It was refused.
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
    """An answer that is read while it comes; ``abort`` may be called from another thread.

    Args:
        response: The answer, of urllib3.
        action: What was asked, for messages.
        namespace: The namespace it was about.
    """

    def __init__(self, response: Any, action: str, namespace: str) -> None:
        self._response = response
        self._action = action
        self._namespace = namespace

    def chunks(self) -> Iterator[bytes]:
        """Yields what comes, as it comes; ends when the server ended it.

        Raises:
            ApiRefusal: The connection was lost.
        """
        with _translated(self._action, self._namespace):
            yield from self._response.stream(65536)

    def abort(self) -> None:
        """Makes a reader in another thread end at once."""
        connection = getattr(self._response, "connection", None) or getattr(self._response, "_connection", None)
        # An answer that the server ends by closing the connection ("Connection: close") keeps the socket for itself.
        raw = getattr(getattr(getattr(self._response, "_fp", None), "fp", None), "raw", None)
        sock = getattr(connection, "sock", None) or getattr(raw, "_sock", None)
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the connection up: one whose answer was not read to its end can't be used again."""
        self._response.close()


class _translated:  # noqa: N801 - used as a function
    """Turns what the client raises into an ``ApiRefusal``."""

    def __init__(self, action: str, namespace: str) -> None:
        self._action = action
        self._namespace = namespace

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        if isinstance(error, ApiException):
            raise _refusal(self._action, error, self._namespace) from None
        if isinstance(error, HTTPError | OSError | ValueError):
            # ValueError: what urllib3 raises for a read on a response that was aborted, and JSON that broke off.
            text = f"{type(error).__name__}: {error}"
            raise ApiRefusal(self._action, LOST, "", text, namespace=self._namespace) from None


def _refusal(action: str, error: Any, namespace: str) -> ApiRefusal:
    body: dict[str, Any] = {}
    with suppress(ValueError, TypeError):
        loaded = json.loads(error.body)
        body = loaded if isinstance(loaded, dict) else {}
    retry_after: float | None = None
    with suppress(ValueError, TypeError, KeyError):
        retry_after = float((error.headers or {})["Retry-After"])
    message = body.get("message") or str(error.body or error.reason or "").strip()[:500]
    # The client reports a failed TLS handshake as an exception of status 0.
    return ApiRefusal(
        action, int(error.status or LOST), body.get("reason") or "", message, retry_after, namespace=namespace
    )
