"""What a source is: the place a project comes from, and the working copy that a run gets of it."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, TypeAlias

from prefect_mlprojects._support.files import remove_tree
from prefect_mlprojects._support.locks import Lock, try_lock
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.settings import cache_directory, keep_working_copies
from prefect_mlprojects.types import StopSignal

SourceKind: TypeAlias = Literal["local", "git", "zip"]
"""Where projects come from."""


@dataclass(frozen=True)
class WorkingCopy:
    """A project's files on this machine, and which version of them it is.

    Attributes:
        directory: The project's folder with the ``#subdirectory`` applied, absolute.
        uri: The requested URI, redacted.
        kind: Where it came from.
        source_name: What MLflow shows as the run's source (``mlflow.source.name``), passwords masked: for a folder
            inside a git repository ``file://<repository>#<subdirectory>``, as MLflow writes it.
        commit: The full SHA of the commit that is checked out, when the files are under git's control.
        branch: The branch that is checked out; None when no branch is, or outside git.
        repository_url: The URL of the repository's first remote, passwords masked; None without one.
        dirty: Whether tracked files differ from ``commit``; untracked ones do not count.
        temporary: Whether the copy belongs to one run and is to be removed when the run has ended.
    """

    directory: Path
    uri: str
    kind: SourceKind
    source_name: str
    commit: str | None = None
    branch: str | None = None
    repository_url: str | None = None
    dirty: bool = False
    temporary: bool = False


class Source(Protocol):
    """A place that a project comes from, as ``detect_source`` recognised it."""

    @property
    def kind(self) -> SourceKind:
        """Where it is."""

    @property
    def uri(self) -> str:
        """The requested URI, redacted."""

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Makes the working copy; a fetch that fails or is stopped leaves nothing behind.

        Args:
            stop: Asks for the end.
            report: Takes lines about the progress, from any thread.

        Raises:
            FetchError: It could not be fetched, or was stopped.
        """

    def remove(self, copy: WorkingCopy) -> None:
        """Removes a temporary copy that this source made; for any other, and when called again, it does nothing."""


def describe_working_copy(copy: WorkingCopy) -> str:
    """Says where a working copy comes from and which version it is, for people to read."""
    version = f" at {copy.commit[:12]}" if copy.commit else ""
    version += f" ({copy.branch})" if copy.branch and copy.kind == "git" else ""
    place = copy.source_name if copy.kind != "local" else copy.directory
    return f"{place}{version}{' (with uncommitted changes)' if copy.dirty else ''}"


_held: dict[Path, Lock] = {}
_held_lock = threading.Lock()


def create_run_folder(shown: str, name: str = "project") -> Path:
    """Creates an empty folder `name` for a run, locked by this process, so that later ones remove it if this one is killed.

    Raises:
        FetchError: The cache can't be written; the message names the project's redacted URI, `shown`.
    """
    root = cache_directory() / "working-copies"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        folder, lock = _claim_name(root)
        # The run's own folder is private; the project's below it has an ordinary mode.
        folder.mkdir(mode=0o700)
        content = folder / name
        content.mkdir()
    except OSError as error:
        raise FetchError(
            f"The files of {shown!r} can't be stored: {error.filename or root}: {error.strerror or error}. "
            "PREFECT_MLPROJECTS_CACHE_DIR names another folder.",
            uri=shown,
        ) from None
    with _held_lock:
        _held[folder] = lock
    return content


def remove_run_folder(directory: Path) -> None:
    """Removes a folder of ``create_run_folder``, given by it or a folder in it, unless it is to be kept; idempotent."""
    with _held_lock:
        folder = next((parent for parent in directory.parents if parent in _held), None)
        lock = _held.pop(folder, None) if folder is not None else None
    if folder is None or lock is None:
        return
    if not keep_working_copies():
        remove_tree(folder)
    _lock_file(folder).unlink(missing_ok=True)
    lock.release()


def _claim_name(root: Path) -> tuple[Path, Lock]:
    """Finds a name that no other run has, and locks it before there is a folder of that name."""
    while True:
        folder = root / f"run-{uuid.uuid4().hex[:12]}"
        lock = try_lock(_lock_file(folder))
        if lock is None:
            continue  # another process sweeps it
        if _lock_file(folder).exists():
            return folder, lock
        # Another process swept it away before it was locked.
        lock.release()


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _sweep(root: Path) -> None:
    """Removes the folders of processes that died: the system has freed their locks."""
    for file in root.glob("run-*.lock"):
        try:
            lock = try_lock(file, create=False)
        except OSError:
            continue
        if lock is None:
            continue  # its process lives
        try:
            if remove_tree(root / file.stem):
                file.unlink(missing_ok=True)
        finally:
            lock.release()


def apply_subdirectory(root: Path, subdirectory: str, uri: str) -> Path:
    """Returns the folder ``subdirectory`` below ``root``.

    Args:
        root: The folder of the whole project, absolute.
        subdirectory: What stood after the ``#``; empty for ``root`` itself.
        uri: The project's URI for error messages, passwords masked.

    Raises:
        FetchError: It leads out of ``root`` (also through a symbolic link), or there is no such folder.
    """
    parts = PurePosixPath(subdirectory)
    folder = root / parts
    if parts.is_absolute() or ".." in parts.parts or not folder.resolve().is_relative_to(root.resolve()):
        raise FetchError(
            f"The subdirectory {subdirectory!r} of {uri!r} leads out of the project. Name a folder inside it.", uri=uri
        )
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FetchError(
            f"The subdirectory {subdirectory!r} of {uri!r} {what}: {folder}{nearest_folder(folder)}", uri=uri
        )
    return folder


def nearest_folder(folder: Path) -> str:
    """Returns the end of a "does not exist" sentence.

    It names the sibling whose name is most like the missing one, or the last parent that exists.

    Args:
        folder: The absolute path that does not exist.
    """
    parent = folder.parent
    # os.path.isdir, unlike Path.is_dir, is False for names that are too long.
    if not os.path.isdir(parent):  # noqa: PTH112
        existing = next((ancestor for ancestor in parent.parents if os.path.isdir(ancestor)), None)  # noqa: PTH112
        return f" (of its path only {str(existing)!r} is there)." if existing is not None else "."
    try:
        siblings = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    except OSError:
        return "."
    close = nearest(folder.name, siblings)
    return f". Did you mean {str(parent / close)!r}?" if close else "."
