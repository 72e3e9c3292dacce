"""Real repositories, and real servers that give them: git daemon, and smart http with basic authentication."""

from __future__ import annotations

import base64
import http.server
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.services.waiting import free_port

from prefect_mlprojects.sources import WorkingCopy, detect_source
from prefect_mlprojects.sources.git_credentials import GitCredentialsLookup
from prefect_mlprojects.types import StopSignal

IDENTITY = ("-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
USER = "alice"
# Nobody else on this machine has it: a test looks for it in the process list.
TOKEN = f"t0ken-{uuid.uuid4().hex}"


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *IDENTITY, "-c", "protocol.file.allow=always", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def commit(folder: Path, text: str) -> str:
    """Writes the text into ``version.txt`` and commits it; returns the SHA."""
    (folder / "version.txt").write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", text)
    return git(folder, "rev-parse", "HEAD")


@dataclass
class Remote:
    """A repository ``project.git`` below ``root``, and the checkout that it is pushed from."""

    root: Path
    work: Path
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def bare(self) -> Path:
        return self.root / "project.git"

    @property
    def uri(self) -> str:
        return self.bare.as_uri()

    def push(self) -> None:
        git(self.work, "push", "-q", "--force", "--all", "origin")
        git(self.work, "push", "-q", "--force", "--tags", "origin")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no git configuration of the user's."""
    (tmp_path / "gitconfig").touch()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    """Commits ``one`` to ``three`` on ``trunk``, a branch with a slash, both kinds of tags, and a commit of no branch."""
    root, work = tmp_path / "remote", tmp_path / "work"
    root.mkdir()
    git(tmp_path, "init", "-q", "-b", "trunk", str(work))
    (work / "MLproject").write_text("name: fetched\nentry_points:\n  main: {command: cat version.txt}\n")
    (work / "sub").mkdir()
    (work / "sub" / "MLproject").write_text("name: inner\n")
    commits = {name: commit(work, name) for name in ("one", "two", "three")}
    git(work, "tag", "light", commits["one"])
    git(work, "tag", "-a", "annotated", "-m", "two", commits["two"])
    git(work, "checkout", "-q", "-b", "feature/with/slashes", commits["two"])
    commits["feature"] = commit(work, "feature")
    git(work, "checkout", "-q", "--detach", commits["one"])
    commits["lonely"] = commit(work, "lonely")
    git(work, "checkout", "-q", "trunk")
    git(root, "init", "-q", "--bare", "-b", "trunk", "project.git")
    git(work, "remote", "add", "origin", (root / "project.git").as_uri())
    git(work, "push", "-q", "origin", f"{commits['lonely']}:refs/pull/7/head")
    made = Remote(root, work, commits)
    made.push()
    return made


Fetch = Callable[..., WorkingCopy]


@pytest.fixture
def fetch() -> Fetch:
    """Fetches a URI and returns the working copy, which the test removes or leaves."""

    def do(
        uri: str,
        version: str | None = None,
        report: Callable[[str], None] = lambda _: None,
        credentials: GitCredentialsLookup | None = None,
    ) -> WorkingCopy:
        return detect_source(uri, version, git_credentials=credentials).fetch(StopSignal(), report)

    return do


@pytest.fixture
def git_daemon(remote: Remote) -> Iterator[str]:
    """The remote by ``git://``."""
    port = free_port()
    daemon = subprocess.Popen(
        [
            "git",
            "daemon",
            "--reuseaddr",
            "--export-all",
            f"--base-path={remote.root}",
            f"--port={port}",
            "--listen=127.0.0.1",
            str(remote.root),
        ],
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"git://127.0.0.1:{port}/project.git"
    os.killpg(daemon.pid, 15)
    daemon.wait()


class _SmartHttp(http.server.BaseHTTPRequestHandler):
    """Git's own ``http-backend`` behind basic authentication; ``/open`` asks for none."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
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


@pytest.fixture
def git_http(remote: Remote) -> Iterator[str]:
    """The address of a server that gives the remote as ``/project.git`` with, and ``/open/project.git`` without a password."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_SmartHttp,), {"root": remote.root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def needs_git() -> None:
    assert shutil.which("git") is not None, "these tests need git"
