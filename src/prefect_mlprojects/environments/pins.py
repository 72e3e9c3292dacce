"""Which builds of environments this process uses, told to other processes by shared locks of the operating system."""

from __future__ import annotations

import threading
from pathlib import Path

from prefect_mlprojects._support.locks import Lock, try_lock


class _Pins:
    """The builds that this process uses; the lock file of each stays open while anyone needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[Path, set[str]] = {}
        self._locks: dict[Path, Lock] = {}

    def add(self, file: Path, token: str) -> None:
        with self._lock:
            if file not in self._locks:
                try:
                    lock = try_lock(file, shared=True, wait=True)
                except OSError:  # a read-only cache without this file, or a file system without locks
                    return
                if lock is None:
                    return
                self._locks[file] = lock
            self._holders.setdefault(file, set()).add(token)

    def remove(self, token: str) -> None:
        with self._lock:
            for file, holders in list(self._holders.items()):
                holders.discard(token)
                if not holders:
                    del self._holders[file]
                    self._locks.pop(file).release()


_pins = _Pins()


def pin(file: Path, token: str) -> None:
    """Holds a lock file, shared with others that do, until the token is released or this process ends."""
    _pins.add(file, token)


def release_pin(token: str) -> None:
    """Tells that a run no longer uses its environment; doing so twice, or with an unknown token, does nothing.

    Args:
        token: What ``pin`` was given.
    """
    _pins.remove(token)
