"""Advisory locks between processes (``flock``): exclusive or shared, waited for or not.

A lock excludes other processes and other holders in this process, and the system frees it when its process dies. Lock
files stay where they are unless their owner removes them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefect_mlprojects._support.files import make_directories
from prefect_mlprojects.types import StopSignal

_POLL_SECONDS = 0.2


class LockStoppedError(Exception):
    """Raised when a stop request ends the wait for a lock."""


class LockTimeoutError(TimeoutError):
    """Raised when a lock is not free in time."""


@dataclass
class Lock:
    """A held lock: a locked file descriptor."""

    _descriptor: int | None

    def release(self) -> None:
        """Frees the lock. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def try_lock(file: Path, *, shared: bool = False, wait: bool = False, create: bool = True) -> Lock | None:
    """Takes a lock; returns None if another holder excludes it.

    A file that can't be written, as in a shared read-only cache, can be locked too. `wait` has no limit: use it for locks
    that are held for an instant. `create` needs the file's folder.

    Raises:
        OSError: The file can't be opened, or its file system has no locks.
    """
    import fcntl

    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except OSError as error:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise error from None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            return None
        raise
    return Lock(descriptor)


@contextmanager
def hold_lock(
    file: Path,
    stop: StopSignal | None = None,
    on_wait: Callable[[], None] | None = None,
    *,
    timeout: float | None = None,
) -> Iterator[None]:
    """Holds an exclusive lock during the block; creates the lock file and its folder.

    `on_wait` is called once if another process holds the lock; `timeout` is in seconds, None for no limit.

    Raises:
        LockStoppedError: A stop was requested while another process held the lock.
        LockTimeoutError: The lock was not free in time.
        OSError: The file can't be created or locked.
    """
    make_directories(file.parent)
    waiter = stop or StopSignal()
    deadline = None if timeout is None else time.monotonic() + timeout
    lock = try_lock(file)
    if lock is None and on_wait is not None:
        on_wait()
    while lock is None:
        if waiter.requested:
            raise LockStoppedError
        if deadline is not None and time.monotonic() > deadline:
            raise LockTimeoutError(f"{file} is locked")
        waiter.wait(_POLL_SECONDS)
        lock = try_lock(file)
    try:
        yield
    finally:
        lock.release()
