"""Two git servers: the project's own, and one of whoever may write to its repository."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.services.git import git
from tests.services.git_server import GitSite, serve_git

from prefect_mlprojects.sources import WorkingCopy, detect_source
from prefect_mlprojects.sources.git import GitCredentials
from prefect_mlprojects.types import StopSignal

Fetch = Callable[..., WorkingCopy]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no git configuration of the user's."""
    (tmp_path / "gitconfig").touch()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetch() -> Fetch:
    """Fetches a URI, with credentials if given."""

    def do(uri: str, version: str | None = None, credentials: GitCredentials | None = None) -> WorkingCopy:
        return detect_source(uri, version, git_credentials=lambda url: credentials).fetch(StopSignal(), lambda _: None)

    return do


def add_repository(
    site: GitSite, name: str, files: dict[str, str], submodules: dict[str, str] | None = None, commit: str = "1" * 40
) -> str:
    """Adds a repository to a site, with submodules (URLs by path) at a commit; returns its own commit."""
    work = site.root.parent / f"{site.root.name}-{name}"
    work.mkdir(parents=True)
    git(work, "init", "-q", "-b", "trunk")
    for path, text in files.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_text(text)
    for path, url in (submodules or {}).items():
        with (work / ".gitmodules").open("a") as file:
            file.write(f'[submodule "{path}"]\n\tpath = {path}\n\turl = {url}\n')
        git(work, "update-index", "--add", "--cacheinfo", f"160000,{commit},{path}")
    git(work, "add", "-A", "--", ".", *(f":!{path}" for path in submodules or {}))
    git(work, "commit", "-qm", name)
    git(work, "clone", "-q", "--bare", ".", str(site.root / f"{name}.git"))
    return git(work, "rev-parse", "HEAD")


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[GitSite]:
    (tmp_path / "own").mkdir()
    with serve_git(tmp_path / "own") as site:
        yield site


@pytest.fixture
def other_site(tmp_path: Path) -> Iterator[GitSite]:
    (tmp_path / "other").mkdir()
    with serve_git(tmp_path / "other") as site:
        yield site


class ProcessList:
    """The command lines of all processes, as any user of the machine sees them."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                for file in Path("/proc").glob("[0-9]*/cmdline"):
                    with suppress(OSError):
                        self.seen.add(file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@pytest.fixture
def process_list() -> ProcessList:
    return ProcessList()
