"""A proxy in front of a Kubernetes API server that breaks what it is told to break: the double's or a real cluster's."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import urllib3
from tests.services.kubeconfig import make_kubeconfig

_PATH = re.compile(
    r"/(?:api/v1|apis/[^/]+/[^/]+)/namespaces/[^/]+/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>.+))?)?"
)
_VERBS = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind.

    Attributes:
        action: The verb and the resource, such as ``watch pods`` or ``get pods/log``.
        times: How many requests it hits; those of the action after them go through.
        status: Answers with this status instead of asking the server.
        headers: Headers of that answer.
        cut_after: Passes on so many bytes of the server's answer, then breaks the connection (with a reset).
        lose_answer: Lets the server do what was asked, and breaks the connection instead of answering.
        expire: Answers a watch with the error event of a version that is too old (410). As after etcd's compaction, that version
            stays too old; so it does with ``status=410``.
        delay: Seconds before anything is done.
        hits: How many requests it has hit.
        version: The version that is too old from then on.
    """

    action: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    lose_answer: bool = False
    expire: bool = False
    delay: float = 0.0
    hits: int = 0
    version: str | None = None


class FaultProxy:
    """Listens on a port of 127.0.0.1 without TLS, and asks the server with a client's address, certificates and login.

    Args:
        client: A client of the API server.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.requests: list[str] = []
        """The actions of all requests, in their order; a dry run is ``dry-run create jobs``."""
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def add(self, fault: Fault) -> Fault:
        """Breaks the next requests of a kind; the faults of one kind happen in the order in which they were added."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def kubeconfig(self) -> dict[str, Any]:
        """Returns a kubeconfig whose server is the proxy; it needs no login."""
        return make_kubeconfig({"server": self.url}, {})

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()

    def take(self, action: str, version: str | None) -> Fault | None:
        """Returns the fault that hits a request, which may ask for what came after a version."""
        with self._lock:
            self.requests.append(action)
            for fault in self._faults:
                if fault.action != action:
                    continue
                if fault.version is not None and fault.version == version:
                    return fault
                if fault.hits < fault.times:
                    fault.hits += 1
                    if fault.expire or fault.status == 410:
                        fault.version = version
                    return fault
        return None

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Any:
        """Asks the server; its answer is read by the caller."""
        self._client.update_params_for_auth(headers, [], ["BearerToken"])
        return self._client.rest_client.pool_manager.request(
            method,
            self._client.configuration.host.rstrip("/") + path,
            headers=headers,
            body=body or None,
            preload_content=False,
            retries=False,
            timeout=urllib3.Timeout(connect=10, read=600),
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in http.server
        return

    def _action(self) -> str:
        parts = urlsplit(self.path)
        query, match = parse_qs(parts.query), _PATH.fullmatch(parts.path)
        if match is None:
            return f"{self.command.lower()} {parts.path}"
        resource = f"{match['plural']}/{match['sub']}" if match["sub"] else match["plural"]
        watching = query.get("watch", ["false"])[0].lower() in ("true", "1")
        verb = _VERBS.get(self.command) or ("get" if match["name"] else "watch" if watching else "list")
        return f"{'dry-run ' if 'dryRun' in query else ''}{verb} {resource}"

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        version = parse_qs(urlsplit(self.path).query).get("resourceVersion", [None])[0]
        fault = self.owner.take(self._action(), version)
        with suppress(BrokenPipeError, ConnectionResetError):
            if fault is not None and fault.delay:
                time.sleep(fault.delay)
            if fault is not None and fault.status is not None:
                self._answer(fault.status, fault.headers)
            elif fault is not None and fault.expire:
                self._expire()
            else:
                self._forward(body, fault)

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _serve

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": "broken on purpose",
            "code": status,
        }
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _expire(self) -> None:
        status = {
            "kind": "Status",
            "status": "Failure",
            "reason": "Expired",
            "code": 410,
            "message": "too old resource version",
        }
        self._begin(200, "application/json")
        self._chunk(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
        self._chunk(b"")

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        headers = {name: value for name in ("Content-Type", "Accept") if (value := self.headers.get(name))}
        try:
            response = self.owner.ask(self.command, self.path, headers, body)
        except urllib3.exceptions.HTTPError:
            self._break()
            return
        try:
            if fault is not None and fault.lose_answer:
                response.read()
                self._break()
                return
            left = None if fault is None else fault.cut_after
            self._begin(response.status, response.headers.get("Content-Type", ""), response.headers.get("Retry-After"))
            for chunk in response.stream(65536):
                data = chunk if left is None else chunk[:left]
                if data:
                    self._chunk(data)
                if left is not None:
                    left -= len(data)
                    if not left:
                        self._break()
                        return
            self._chunk(b"")
        except urllib3.exceptions.HTTPError:
            self._break()
        finally:
            response.close()

    def _begin(self, status: int, kind: str, retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
        self.wfile.flush()

    def _break(self) -> None:
        """Ends the connection with a reset, as a router that restarts does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
