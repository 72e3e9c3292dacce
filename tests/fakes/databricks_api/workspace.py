"""The workspace itself: its state, its HTTP server, and what goes wrong on the way."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.fakes.databricks_api.clusters import Clusters
from tests.fakes.databricks_api.driver import Drivers, Failure, end_process
from tests.fakes.databricks_api.errors import Refusal, no_endpoint
from tests.fakes.databricks_api.files import Dbfs, Volumes, WorkspaceFiles
from tests.fakes.databricks_api.identity import USER, Directory, SecretScopes
from tests.fakes.databricks_api.runs import FakeRun, Runs

__all__ = ["USER", "FakeWorkspace"]
_VERSIONS = {"jobs": ("2.1", "2.2"), "clusters": ("2.0", "2.1")}


class FakeWorkspace:
    """A workspace.

    Args:
        root: Where its files are.
        mlflow_server: A real MLflow server that stands behind its MLflow API; None for none.

    Attributes:
        host: Its address.
        people: Users, service principals, tokens.
        secrets: Secret scopes.
        clusters: Clusters and policies.
        drivers: Where tasks run, and how they fail.
        troubles: What happens to the next requests whose path holds the first text: a ``Refusal``, ``"drop"`` (the connection
            ends before the request is seen) or ``"drop-answer"`` (the request is carried out, its answer is lost).
        unreachable: While it is true, every connection is dropped.
        rate_limit: How many requests a second are let in; None for any number.
        requests: The method and path of every request.
    """

    def __init__(self, root: Path, mlflow_server: str | None = None) -> None:
        self.root, self.mlflow_server = root, mlflow_server
        self.people, self.secrets, self.clusters = Directory(), SecretScopes(), Clusters()
        for name in sorted(self.people.users):
            (root / "Workspace" / "Users" / name).mkdir(parents=True)
        (root / "dbfs").mkdir()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"workspace": self}))
        server.daemon_threads = True
        self._server = server
        self.host = f"http://127.0.0.1:{server.server_address[1]}"
        self.drivers = Drivers(root, self.host, self.people, self.secrets)
        self.jobs = Runs(self.host, self.people, self.clusters, self.drivers.start)
        self.files = WorkspaceFiles(root / "Workspace")
        self.volumes = Volumes(root, {"main/ml/code"})
        self.dbfs = Dbfs(root / "dbfs")
        self.troubles: list[tuple[str, Refusal | str]] = []
        self.unreachable = False
        self.rate_limit: float | None = None
        self.requests: list[tuple[str, str]] = []
        self._arrivals: list[float] = []
        self._lock = threading.Lock()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def runs(self) -> dict[int, FakeRun]:
        """The runs by their ids."""
        return self.jobs.all

    def fail(self, code: str, kind: str, message: str, **further: Any) -> None:
        """Lets the next runs end before their task starts; see ``Failure``."""
        self.drivers.failure = Failure(code, kind, message, **further)

    def close(self) -> None:
        """Ends the server and every process it started."""
        for run in self.runs.values():
            run.asked_to_end.set()
            if run.process is not None:
                end_process(run.process)
        self._server.shutdown()
        self._server.server_close()

    def trouble(self, path: str) -> Refusal | str | None:
        """What goes wrong with a request."""
        with self._lock:
            if self.unreachable:
                return "drop"
            for position, (part, found) in enumerate(self.troubles):
                if part in path:
                    del self.troubles[position]
                    return found
            if self.rate_limit is not None:
                now = time.monotonic()
                self._arrivals = [each for each in self._arrivals if now - each < 1.0]
                if len(self._arrivals) >= self.rate_limit:
                    return Refusal(
                        429, "REQUEST_LIMIT_EXCEEDED", "Current request rate is too high.", {"Retry-After": "1"}
                    )
                self._arrivals.append(now)
        return None

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> Any:
        """Answers a request: a JSON value, or bytes."""
        found = self._open(method, path, body, headers)
        if found is not None:
            return found
        user = self.people.who(headers.get("Authorization"))
        parts = path.strip("/").split("/", 3)
        if len(parts) < 4 or parts[0] != "api":
            raise no_endpoint(method, path)
        _, version, family, name = parts
        if family == "mlflow" and self.mlflow_server:
            return self._mlflow(method, path, query, body)
        if family == "fs" and version == "2.0":
            return self.volumes.answer(method, name, query, body)
        if version not in _VERSIONS.get(family, ("2.0",)):
            raise no_endpoint(method, path)
        values = {**query, **_body(body, headers.get("Content-Type", ""))}
        match family:
            case "preview" if name == "scim/v2/Me" and method == "GET":
                return {"userName": user, "id": "1", "active": True}
            case "jobs" if name.startswith("runs/"):
                return self.jobs.answer(method, name.removeprefix("runs/"), values, user)
            case "workspace":
                return self.files.answer(method, name, values, user)
            case "dbfs":
                return self.dbfs.answer(method, name, values)
            case "clusters":
                return self.clusters.answer(method, name, values)
            case "secrets":
                return self.secrets.answer(method, name, values, user)
        raise no_endpoint(method, path)

    def _open(self, method: str, path: str, body: bytes, headers: Any) -> Any:
        """What needs no token."""
        if path == "/oidc/.well-known/oauth-authorization-server":
            return {
                "authorization_endpoint": f"{self.host}/oidc/v1/authorize",
                "token_endpoint": f"{self.host}/oidc/v1/token",
            }
        if path == "/.well-known/databricks-config":
            return {"oidc_endpoint": f"{self.host}/oidc"}
        if path == "/oidc/v1/token" and method == "POST":
            return self.people.oauth(headers.get("Authorization", ""), body)
        return None

    def _mlflow(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> Any:
        from urllib.parse import urlencode

        url = f"{self.mlflow_server}{path}" + (f"?{urlencode(query)}" if query else "")
        request = urllib.request.Request(url, body or None, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            told = json.loads(error.read())
            raise Refusal(error.code, told.get("error_code", ""), told.get("message", "")) from None


def _body(body: bytes, content_type: str) -> dict[str, Any]:
    if not body:
        return {}
    if content_type.startswith("multipart/"):
        message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
        parts = {str(each.get_param("name", header="content-disposition")): each for each in message.iter_parts()}
        return {
            name: part.get_payload(decode=True) if name == "content" else str(part.get_payload()).strip()
            for name, part in parts.items()
        }
    try:
        values = json.loads(body)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise Refusal(400, "MALFORMED_REQUEST", "Invalid JSON given in the body of the request.")
    return values


class _Handler(BaseHTTPRequestHandler):
    workspace: FakeWorkspace
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in http.server
        """Says nothing."""

    def _handle(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        self.workspace.requests.append((self.command, url.path))
        trouble = self.workspace.trouble(url.path)
        if trouble == "drop":
            self._drop()
            return
        try:
            if isinstance(trouble, Refusal):
                raise trouble
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            answer = self.workspace.answer(self.command, url.path, query, body, self.headers)
        except Refusal as refusal:
            told = {"error_code": refusal.code, "message": refusal.message}
            if url.path.startswith("/oidc/"):
                # RFC 6749, 5.2
                told = {"error": refusal.code, "error_description": refusal.message}
            self._send(refusal.status, told, refusal.headers)
            return
        except Exception as error:
            self._send(501, {"error_code": "DOUBLE_IS_BROKEN", "message": f"{type(error).__name__}: {error}"}, {})
            return
        if trouble == "drop-answer":
            self._drop()
        else:
            self._send(200, answer, {})

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, status: int, answer: Any, headers: Mapping[str, str]) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _handle
