"""The cache of built environments: one folder for each content key, complete or not there at all.

Layout below ``<cache directory>/environments``::

    <key>/environment.json   which build is the current one; written last, at once, so that it never names half a build
    <key>/<number>/          a build. Environments can't be moved (their scripts hold absolute paths), so each is made
                             where it stays, and a new build never touches an older one that a run may be using
    <key>/<number>.*         what belongs to a build and is not in it, such as the lock of a conda environment
    <key>/used               its time of change is the time of the last use
    .locks/<key>.lock        held while a build is made, or the folder removed
    .locks/<key>.<n>.use     held, shared, by every process that uses build n

Locks are the operating system's, so they end with the process that holds them, however it ends. Lock files are never
removed, since another process may be about to lock the file that would be removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prefect_mlprojects._support.files import disk_usage, remove_tree, write_atomically
from prefect_mlprojects._support.locks import Lock, LockStoppedError, hold_lock, try_lock
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

FORMAT = 1
"""The version of this layout; environments of another one are not seen."""

_RECORD = "environment.json"
_USED = "used"
_REMOVED_PREFIX = ".removed-"


@dataclass(frozen=True)
class EnvironmentRecord:
    """What the cache knows of a complete environment.

    Attributes:
        key: The content hash that names it.
        build: The number of the build that is used.
        manager: The environment manager that made it.
        description: For people to read.
        python_version: Its Python's version; empty for a conda environment without one.
        created: When the build ended, seconds since the epoch.
        size: Bytes it takes on the disk.
        facts: What else is worth knowing, such as the project it was made for.
    """

    key: str
    build: int
    manager: str
    description: str
    python_version: str
    created: float
    size: int
    facts: Mapping[str, str] = field(default_factory=dict)


class EnvironmentCache:
    """The built environments below one folder; safe to use from many threads and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "environments"
        self._locks = self.folder / ".locks"

    def find(self, key: str) -> EnvironmentRecord | None:
        """The complete environment of a key, or None; reads one small file and looks for its Python."""
        record = self.read(key)
        if record is None:
            return None
        # A conda environment may have no Python; it always has this folder.
        sign = "bin/python" if record.python_version else "conda-meta"
        return record if (self.location(record) / sign).exists() else None

    def read(self, key: str) -> EnvironmentRecord | None:
        """What is recorded of a key, whether or not its Python still works."""
        try:
            data = json.loads((self.folder / key / _RECORD).read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT or data.get("key") != key:
                return None
            return EnvironmentRecord(**data)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None

    def location(self, record: EnvironmentRecord) -> Path:
        """The folder of an environment."""
        return self.folder / record.key / str(record.build)

    def next_location(self, key: str) -> Path:
        """Where the next build of a key will lie."""
        return self.folder / key / str(max(self._builds(key), default=0) + 1)

    def use(self, key: str, token: str) -> EnvironmentRecord | None:
        """Finds the complete environment of a key and keeps it from being removed.

        It is kept until the token is released, or this process ends.

        Args:
            key: The content hash.
            token: Names the use; pass it to ``release_pin``.

        Returns:
            The environment; None when there is none, and then nothing is kept.
        """
        record = self.find(key)
        while record is not None:
            pin(self._use_file(key, record.build), token)
            # Another process may have removed or replaced it before the lock was ours.
            again = self.find(key)
            if again == record:
                with contextlib.suppress(OSError):
                    os.utime(self.folder / key / _USED)
                return record
            release_pin(token)
            record = again
        return None

    def last_used(self, key: str) -> float | None:
        """When an environment was last used, seconds since the epoch; None when that is not known."""
        try:
            return (self.folder / key / _USED).stat().st_mtime
        except OSError:
            return None

    @contextlib.contextmanager
    def lock(self, key: str, manager: str, report: Callable[[str], None], stop: StopSignal) -> Iterator[None]:
        """Keeps other processes and threads from building or removing an environment.

        Yields:
            When it is this caller's turn.

        Raises:
            EnvironmentBuildError: The cache can't be written, or the waiting was stopped.
        """
        holder = self._locks / f"{key}.builder"

        def on_wait() -> None:
            report(f"Waiting for {_describe_holder(holder)}, which is building this environment")

        with contextlib.ExitStack() as held:
            # Errors of the cache are told as such; what happens in the body is the caller's.
            with cache_errors(self.root, manager):
                try:
                    held.enter_context(hold_lock(self._locks / f"{key}.lock", stop, on_wait))
                except LockStoppedError:
                    raise stopped_error(manager, stop) from None
            try:
                with contextlib.suppress(OSError):
                    write_atomically(holder, str(os.getpid()))
                yield
            finally:
                with contextlib.suppress(OSError):
                    holder.unlink()

    def begin(self, key: str) -> Path:
        """Removes what dead builds left and returns the folder for a new build; call it with the lock held.

        Returns:
            A folder that is not there yet; its parent is.

        Raises:
            OSError: The cache can't be written.
        """
        (self.folder / key).mkdir(parents=True, exist_ok=True)
        location = self.next_location(key)
        self._remove_stale_builds(key, self.read(key))
        return location

    def complete(self, record: EnvironmentRecord) -> EnvironmentRecord:
        """Makes a build the one that is used; call it with the lock held, when nothing is left to do.

        Returns:
            The record as written.

        Raises:
            OSError: It can't be written; the environment stays unused.
        """
        location = self.location(record)
        data = {**asdict(record), "format": FORMAT, "size": disk_usage(location)}
        (self.folder / record.key / _USED).touch()
        write_atomically(self.folder / record.key / _RECORD, json.dumps(data, indent=1))
        self._remove_stale_builds(record.key, record)
        del data["format"]
        return EnvironmentRecord(**data)

    def abandon(self, key: str, location: Path) -> None:
        """Removes a build that failed; call it with the lock held.

        Args:
            key: The content hash.
            location: What ``begin`` returned.
        """
        _remove_build(location)
        with contextlib.suppress(OSError):
            (self.folder / key).rmdir()

    def list_keys(self) -> tuple[str, ...]:
        """The keys that have a folder, complete or not."""
        try:
            entries = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir())
        except OSError:
            return ()
        return tuple(name for name in entries if not name.startswith("."))

    def in_use(self, key: str) -> bool:
        """Whether a live process uses any build of a key."""
        with self._unused_builds(key, self._builds(key)) as unused:
            return len(unused) < len(self._builds(key))

    def remove(self, key: str) -> bool:
        """Removes everything of a key, unless it is in use or being built.

        Returns:
            Whether it is gone.
        """
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            lock = try_lock(self._locks / f"{key}.lock")
        except OSError:
            return False
        if lock is None:
            return False
        try:
            builds = self._builds(key)
            with self._unused_builds(key, builds) as unused:
                if len(unused) < len(builds):
                    return False
                # Gone in one step for everyone else; taking it to pieces may take a while.
                grave = self.folder / f"{_REMOVED_PREFIX}{uuid.uuid4().hex}"
                try:
                    (self.folder / key).rename(grave)
                except FileNotFoundError:
                    return True
                except OSError:
                    return False
        finally:
            lock.release()
        remove_tree(grave)
        return True

    def remove_graves(self) -> None:
        """Removes what an interrupted removal left."""
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(self.folder)):
                if entry.name.startswith(_REMOVED_PREFIX):
                    remove_tree(Path(entry.path))

    def _use_file(self, key: str, build: int) -> Path:
        return self._locks / f"{key}.{build}.use"

    def _builds(self, key: str) -> tuple[int, ...]:
        try:
            return tuple(sorted(int(entry.name) for entry in os.scandir(self.folder / key) if entry.name.isdecimal()))
        except OSError:
            return ()

    @contextlib.contextmanager
    def _unused_builds(self, key: str, builds: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Locks, for the time of the block, those builds that no process uses, so that none can begin to."""
        locks: dict[int, Lock] = {}
        try:
            for build in builds:
                with contextlib.suppress(OSError):
                    lock = try_lock(self._use_file(key, build))
                    if lock is not None:
                        locks[build] = lock
            yield tuple(locks)
        finally:
            for lock in locks.values():
                lock.release()

    def _remove_stale_builds(self, key: str, current: EnvironmentRecord | None) -> None:
        stale = tuple(build for build in self._builds(key) if current is None or build != current.build)
        with self._unused_builds(key, stale) as unused:
            for build in unused:
                _remove_build(self.folder / key / str(build))


def _remove_build(location: Path) -> None:
    remove_tree(location)
    with contextlib.suppress(OSError):
        for neighbour in location.parent.glob(f"{location.name}.*"):
            neighbour.unlink()


def _describe_holder(file: Path) -> str:
    try:
        pid = int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "another process"
    return "another run of this process" if pid == os.getpid() else f"another process ({pid})"


def now() -> float:
    """The time, seconds since the epoch."""
    return time.time()


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


def stopped_error(manager: str, stop: StopSignal) -> EnvironmentBuildError:
    """The error of a build that was told to end."""
    reason = f" ({stop.reason})" if stop.reason else ""
    return EnvironmentBuildError(f"The building of the environment was stopped{reason}.", manager=manager)


@contextlib.contextmanager
def cache_errors(root: Path, manager: str) -> Iterator[None]:
    """Turns the operating system's errors on the cache into ones that say what to do.

    Raises:
        EnvironmentBuildError: In place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentBuildError(describe_cache_error(error, root), manager=manager) from error


def describe_cache_error(error: OSError, root: Path) -> str:
    """What an operating system's error on the cache means and what to do."""
    setting = "the environment variable PREFECT_MLPROJECTS_CACHE_DIR"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full_message(root)
    place = f" ({error.filename})" if error.filename and str(error.filename) != str(root) else ""
    return (
        f"The cache folder {root} can't be written: {error.strerror or error}{place}. "
        f"Make it writable, or name another folder in {setting}."
    )


def disk_full_message(root: Path) -> str:
    """The message for a full disk."""
    return (
        f"The disk is full: the environment does not fit below {root}. Free some space ('mlprojects env prune' removes "
        "environments), or name a folder on another disk in the environment variable PREFECT_MLPROJECTS_CACHE_DIR."
    )
