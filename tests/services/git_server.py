"""A server of git repositories over http, with the password that private ones ask for."""

from __future__ import annotations

import base64
import http.server
import os
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.services.git import git

USER = "alice"
# Nobody else on this machine has it: a test looks for it in the process list.
TOKEN = f"t0ken-{uuid.uuid4().hex}"


class SmartHttp(http.server.BaseHTTPRequestHandler):
    """Git's own ``http-backend`` behind basic authentication; ``/open`` asks for none, ``/moved`` redirects."""

    protocol_version = "HTTP/1.1"
    root: Path
    moved_to = ""
    received: list[str] | None = None

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if self.received is not None:
            self.received.append(self.headers.get("Authorization") or "")
        if self.path.startswith("/moved/"):
            self._send(301, {"Location": self.moved_to + self.path.removeprefix("/moved")}, b"")
            return
        if self.path.startswith("/by-token/"):
            # As servers that take all after the "?" for parameters; git appends its own path to the last one.
            path, _, query = self.path.removeprefix("/by-token").partition("?access_token=")
            if not query.startswith(f"{TOKEN}/"):
                self._send(401, {}, b"")
                return
            self.path = f"/open{path}/{query.partition('/')[2].replace('&', '?', 1)}"
        expected = "Basic " + base64.b64encode(f"{USER}:{TOKEN}".encode()).decode()
        if not self.path.startswith("/open/") and self.headers.get("Authorization") != expected:
            self._send(401, {"WWW-Authenticate": 'Basic realm="git"'}, b"")
            return
        path, _, query = self.path.removeprefix("/open").partition("?")
        done = subprocess.run(
            ["git", "http-backend"],
            input=body,
            capture_output=True,
            check=True,
            env={
                **os.environ,
                "GIT_PROJECT_ROOT": str(self.root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type") or "",
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding") or "",
                "GIT_PROTOCOL": self.headers.get("Git-Protocol") or "",
                "REMOTE_USER": USER,
            },
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self._send(int(headers.pop("Status", "200").split()[0]), headers, content)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
        return


@contextmanager
def serve_repository(project: Path) -> Iterator[str]:
    """Serves a project's folder as ``project.git``, behind the password `TOKEN`; yields HOST:PORT."""
    root = project.parent / "remote"
    for arguments in (
        ("init", "-q", "-b", "trunk"),
        ("add", "-A"),
        ("commit", "-qm", "x"),
        ("clone", "-q", "--bare", ".", str(root / "project.git")),
    ):
        git(project, *arguments)
    handler = type("Handler", (SmartHttp,), {"root": root})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@dataclass
class GitSite:
    """A running server of the repositories below `root`, which records the ``Authorization`` header of each request."""

    root: Path
    handler: type[SmartHttp]
    address: str

    @property
    def received(self) -> list[str]:
        assert self.handler.received is not None
        return self.handler.received

    @property
    def got_token(self) -> bool:
        """Whether any request had the token."""
        return any(TOKEN in base64.b64decode(each.partition(" ")[2]).decode() for each in self.received)

    def redirect_to(self, address: str) -> str:
        """Makes the paths below ``/moved`` redirect to an address; returns theirs."""
        self.handler.moved_to = address
        return f"{self.address}/moved"


@contextmanager
def serve_git(root: Path) -> Iterator[GitSite]:
    """Serves the repositories below a folder at a port that nobody else has."""
    handler = type("Handler", (SmartHttp,), {"root": root, "received": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield GitSite(root, handler, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
