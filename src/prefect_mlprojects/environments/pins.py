"""Which builds of environments this process uses, told to other processes by shared locks of the operating system."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path


class _Pins:
    """The builds that this process uses; the lock file of each stays open while anyone needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[Path, set[str]] = {}
        self._files: dict[Path, int] = {}

    def add(self, file: Path, token: str) -> None:
        with self._lock:
            if file not in self._files:
                handle = open_lock_file(file)
                if handle is None:
                    return
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH)
                except OSError:  # a file system without locks
                    os.close(handle)
                    return
                self._files[file] = handle
            self._holders.setdefault(file, set()).add(token)

    def remove(self, token: str) -> None:
        with self._lock:
            for file, holders in list(self._holders.items()):
                holders.discard(token)
                if not holders:
                    del self._holders[file]
                    os.close(self._files.pop(file))


_pins = _Pins()


def pin(file: Path, token: str) -> None:
    """Holds a lock file, shared with others that do, until the token is released or this process ends.

    Args:
        file: The lock file; made when it is not there. Where that, or locking, is not possible, nothing is
            held.
        token: Names the holder.
    """
    _pins.add(file, token)


def release_pin(token: str) -> None:
    """Tells that a run no longer uses its environment; doing so twice, or with an unknown token, does nothing.

    Args:
        token: What ``pin`` was given.
    """
    _pins.remove(token)


def open_lock_file(file: Path) -> int | None:
    """Opens a lock file, making it when it is not there.

    Args:
        file: The lock file.

    Returns:
        Its descriptor; None where a shared, read-only cache has none and none can be made.
    """
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
