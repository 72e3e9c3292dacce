"""Folders that belong to a process: it removes them, or later ones do if it was killed.

Each folder has a lock file beside it, which its process holds; the system releases the lock when the process dies.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from prefect_mlprojects._support.files import make_directories, remove_tree
from prefect_mlprojects._support.locks import Lock, try_lock
from prefect_mlprojects.settings import cache_directory

_held: dict[Path, Lock] = {}
_held_lock = threading.Lock()


def create_process_folder(root: Path) -> Path:
    """Creates an empty folder below `root` that only this user can enter, after removing those of dead processes.

    Raises:
        OSError: `root` can't be written.
    """
    make_directories(root)
    sweep_process_folders(root)
    folder, lock = _claim_name(root)
    folder.mkdir(mode=0o700)
    with _held_lock:
        _held[folder] = lock
    return folder


def remove_process_folder(path: Path, *, keep: bool = False) -> None:
    """Removes the folder of ``create_process_folder`` that is or contains `path`; with `keep`, only its lock. Idempotent."""
    with _held_lock:
        folder = next((each for each in (path, *path.parents) if each in _held), None)
        lock = _held.pop(folder, None) if folder is not None else None
    if folder is None or lock is None:
        return
    if not keep:
        remove_tree(folder)
    _lock_file(folder).unlink(missing_ok=True)
    lock.release()


def sweep_process_folders(root: Path) -> None:
    """Removes the folders of dead processes below `root`."""
    for file in root.glob("run-*.lock"):
        try:
            lock = try_lock(file, create=False)
        except OSError:
            continue
        if lock is None:
            continue  # its process is alive
        try:
            if remove_tree(root / file.stem):
                file.unlink(missing_ok=True)
        finally:
            lock.release()


def _claim_name(root: Path) -> tuple[Path, Lock]:
    """Locks an unused name before its folder exists."""
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


def create_private_folder() -> Path:
    """Creates a folder for keys and tokens that a program reads from files; `remove_process_folder` removes it.

    It is in the cache, where a later process removes it if this one is killed; in the temporary folder if the cache can't be
    written.
    """
    for root in _private_roots():
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = root.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                root.chmod(0o700)
                return create_process_folder(root)
    # Somebody else has taken the folder's name in the temporary folder.
    return Path(tempfile.mkdtemp(prefix="mlprojects-"))


def remove_private_folder(folder: Path) -> None:
    """Removes a folder of ``create_private_folder``. Idempotent."""
    remove_process_folder(folder)
    remove_tree(folder)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Yields a folder for keys and tokens, see ``create_private_folder``, which exists as long as the context."""
    folder = create_private_folder()
    try:
        yield folder
    finally:
        remove_private_folder(folder)


def sweep_private_folders() -> None:
    """Removes the keys and tokens that killed processes left."""
    for root in _private_roots():
        if root.is_dir() and not root.is_symlink() and root.stat().st_uid == os.geteuid():
            sweep_process_folders(root)


def _private_roots() -> tuple[Path, Path]:
    return cache_directory() / "private", Path(tempfile.gettempdir()) / f"mlprojects-private-{os.geteuid()}"
