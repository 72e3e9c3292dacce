"""Locks between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect_mlprojects.types import StopSignal

_POLL_SECONDS = 0.2


class LockStoppedError(Exception):
    """The end was asked for while a lock was waited for."""


@contextmanager
def hold_lock(file: Path, stop: StopSignal, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock that one process, and one thread in it, can have; the system frees it when its process dies.

    Args:
        file: The lock file; it and its folder are made when they are not there.
        stop: Asks to give up waiting.
        on_wait: Called once when another process has it.

    Raises:
        LockStoppedError: The end was asked for while another process had it.
        OSError: The file can't be made.
    """
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    waiting = False
    while True:
        try:
            lock.acquire(timeout=5 * _POLL_SECONDS if waiting else 0, poll_interval=_POLL_SECONDS)
            break
        except Timeout:
            if not waiting:
                on_wait()
            waiting = True
            if stop.requested:
                raise LockStoppedError from None
    try:
        yield
    finally:
        lock.release()
