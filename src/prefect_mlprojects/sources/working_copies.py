"""Folders that belong to one run each: made in the cache, removed at its end, and swept when their process died."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

from prefect_mlprojects._support.files import remove_tree
from prefect_mlprojects._support.locks import Lock, try_lock
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.settings import cache_directory, keep_working_copies

_held: dict[Path, Lock] = {}
_held_lock = threading.Lock()


def new_working_copy(shown: str) -> Path:
    """Makes an empty folder for a run; the process holds a lock on it as long as it lives.

    Args:
        shown: The project's URI for messages, passwords masked.

    Raises:
        FetchError: The cache can't be written.
    """
    root = cache_directory() / "working-copies"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        folder, lock = _claim_name(root)
        # The run's own folder is private; the project's below it has an ordinary mode.
        folder.mkdir(mode=0o700)
        project = folder / "project"
        project.mkdir()
    except OSError as error:
        raise FetchError(
            f"There is no place for the files of {shown!r}: {error.filename or root}: {error.strerror or error}. "
            "PREFECT_MLPROJECTS_CACHE_DIR names another folder.",
            uri=shown,
        ) from None
    with _held_lock:
        _held[folder] = lock
    return project


def remove_working_copy(directory: Path) -> None:
    """Removes what ``new_working_copy`` made, unless it is to be kept; called again, or for any other, it does nothing.

    Args:
        directory: What ``new_working_copy`` returned, or a folder in it.
    """
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
