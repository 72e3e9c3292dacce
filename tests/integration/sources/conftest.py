"""Real repositories, and real servers that give them: git daemon, and smart http with basic authentication."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.services.git import git
from tests.services.git_server import TOKEN, USER, SmartHttp
from tests.services.waiting import free_port

from prefect_mlprojects.sources import WorkingCopy, detect_source
from prefect_mlprojects.sources.git import GitCredentialsLookup
from prefect_mlprojects.types import StopSignal

__all__ = ["TOKEN", "USER"]


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


@pytest.fixture
def git_http(remote: Remote) -> Iterator[str]:
    """The address of a server that gives the remote as ``/project.git`` with, and ``/open/project.git`` without a password."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (SmartHttp,), {"root": remote.root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def needs_git() -> None:
    assert shutil.which("git") is not None, "these tests need git"
