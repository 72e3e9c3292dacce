"""The cache of prepared environments: one folder for each cache key, complete or absent.

Layout below ``<cache directory>/environments``::

    <key>/environment.json   names the current build; written last, by an atomic rename, so it never names a partial one
    <key>/<number>/          a build. Environments can't be moved (their scripts hold absolute paths), so each is built
                             in its final folder, and a new build never touches an older one that a run may be using
    <key>/<number>.*         files that belong to a build and are not in it, such as the lock of a conda environment
    <key>/used               its modification time is the time of the last use
    .locks/<key>.lock        held during a build and a removal
    .locks/<key>.<n>.use     held, shared, by every process that uses build n

Locks are the operating system's, so they end with the process that holds them. Lock files are never removed: another
process may be about to lock them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from prefect_mlprojects import settings
from prefect_mlprojects._support.files import (
    check_private,
    disk_usage,
    list_directory,
    make_directories,
    remove_tree,
    write_atomically,
)
from prefect_mlprojects._support.locks import Lock, LockStoppedError, hold_lock, try_lock
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

Report: TypeAlias = Callable[[str], None]  # receives a line for users, from any thread

FORMAT = 1  # the version of this layout; environments of another one are ignored

_RECORD = "environment.json"
_USED = "used"
_REMOVED_PREFIX = ".removed-"


@dataclass(frozen=True)
class EnvironmentRecord:
    """The cache's record of a complete environment: times in seconds since the epoch, size in bytes."""

    key: str
    build: int
    manager: str
    description: str
    python_version: str  # empty for a conda environment without Python
    created: float = field(default_factory=time.time)
    size: int = 0
    project: str = ""  # that it was built for; others may use it too


class EnvironmentCache:
    """The prepared environments below one folder; safe to use from many threads and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "environments"
        self._locks = self.folder / ".locks"

    def find(self, key: str) -> EnvironmentRecord | None:
        """Returns the complete environment of a key, or None; reads one small file and checks that its Python exists."""
        record = self.read(key)
        # A conda environment may have no Python; it always has this folder.
        required = "bin/python" if record is not None and record.python_version else "conda-meta"
        return record if record is not None and (self.location(record) / required).exists() else None

    def read(self, key: str) -> EnvironmentRecord | None:
        """Returns the record of a key, whether or not its Python still exists."""
        try:
            data = json.loads((self.folder / key / _RECORD).read_text(encoding="utf-8"))
            return EnvironmentRecord(**data) if data.pop("format") == FORMAT and data.get("key") == key else None
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None

    def location(self, record: EnvironmentRecord) -> Path:
        """Returns the folder of an environment."""
        return self.folder / record.key / str(record.build)

    def next_location(self, key: str) -> Path:
        """Returns the folder of the next build of a key."""
        return self.folder / key / str(max(self._builds(key), default=0) + 1)

    def use(self, key: str, token: str) -> EnvironmentRecord | None:
        """Finds the environment of a key and protects it from removal until `release_pin(token)` or process exit."""
        record = self.find(key)
        while record is not None:
            _pins.add(self._use_file(key, record.build), token)
            # Another process may have removed or replaced it before this one held the lock.
            if (again := self.find(key)) == record:
                with contextlib.suppress(OSError):
                    os.utime(self.folder / key / _USED)
                return record
            release_pin(token)
            record = again
        return None

    def last_used(self, key: str) -> float | None:
        """Returns the time of an environment's last use in seconds since the epoch; None if unknown."""
        with contextlib.suppress(OSError):
            return (self.folder / key / _USED).stat().st_mtime
        return None

    @contextlib.contextmanager
    def lock(self, key: str, manager: str, report: Report, stop: StopSignal) -> Iterator[None]:
        """Excludes other builds and removals of an environment during the block; raises an ``EnvironmentBuildError``."""
        holder = self._locks / f"{key}.builder"

        def on_wait() -> None:
            report(f"Waiting for {_describe_holder(holder)}, which is building this environment")

        with contextlib.ExitStack() as held:
            # Only the lock's own errors are converted; the block's pass.
            with cache_errors(self.root, manager):
                try:
                    held.enter_context(hold_lock(self._locks / f"{key}.lock", stop, on_wait))
                except LockStoppedError:
                    raise stopped_error(manager, stop) from None
            held.callback(holder.unlink, missing_ok=True)
            with contextlib.suppress(OSError):
                write_atomically(holder, str(os.getpid()))
            yield

    def begin(self, key: str, *, private: bool = False) -> Path:
        """Removes partial builds and returns the folder for a new one, which does not exist; needs the key's lock."""
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        if private:
            folder.chmod(0o700)  # installers may write passwords of URLs into it
        location = self.next_location(key)
        self._remove_stale_builds(key, self.read(key))
        return location

    def complete(self, record: EnvironmentRecord) -> EnvironmentRecord:
        """Makes a finished build the current one and returns the record as written; needs the key's lock."""
        record = replace(record, size=disk_usage(self.location(record)))
        (self.folder / record.key / _USED).touch()
        text = json.dumps({**asdict(record), "format": FORMAT}, indent=1)
        write_atomically(self.folder / record.key / _RECORD, text)
        self._remove_stale_builds(record.key, record)
        return record

    def abandon(self, key: str, location: Path) -> None:
        """Removes a failed build; needs the key's lock."""
        _remove_build(location)
        with contextlib.suppress(OSError):
            (self.folder / key).rmdir()

    def list_keys(self) -> tuple[str, ...]:
        """Returns the keys that have a folder, complete or not."""
        return tuple(entry.name for entry in list_directory(self.folder) if entry.is_dir() and entry.name[0] != ".")

    def in_use(self, key: str) -> bool:
        """Returns whether a live process uses any build of a key."""
        with self._unused_builds(key, self._builds(key)) as unused:
            return len(unused) < len(self._builds(key))

    def remove(self, key: str) -> bool:
        """Removes all builds of a key unless it is in use or being built; returns whether it is gone."""
        # An atomic rename for other processes; deleting the tree may take a while.
        removed = self.folder / f"{_REMOVED_PREFIX}{uuid.uuid4().hex}"
        try:
            make_directories(self._locks)
            if (lock := try_lock(self._locks / f"{key}.lock")) is None:
                return False
            with contextlib.ExitStack() as held:
                held.callback(lock.release)
                builds = self._builds(key)
                if len(held.enter_context(self._unused_builds(key, builds))) < len(builds):
                    return False
                (self.folder / key).rename(removed)
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        remove_tree(removed)
        return True

    def remove_partial_removals(self) -> None:
        """Deletes the folders that interrupted removals left."""
        for entry in list_directory(self.folder):
            if entry.name.startswith(_REMOVED_PREFIX):
                remove_tree(Path(entry.path))

    def _use_file(self, key: str, build: int) -> Path:
        return self._locks / f"{key}.{build}.use"

    def _builds(self, key: str) -> tuple[int, ...]:
        return tuple(sorted(int(entry.name) for entry in list_directory(self.folder / key) if entry.name.isdecimal()))

    @contextlib.contextmanager
    def _unused_builds(self, key: str, builds: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Locks the builds that no process uses during the block, so that none can begin to use them."""
        unused = []
        with contextlib.ExitStack() as locks:
            for build in builds:
                with contextlib.suppress(OSError):
                    if (lock := try_lock(self._use_file(key, build))) is not None:
                        locks.callback(lock.release)
                        unused.append(build)
            yield tuple(unused)

    def _remove_stale_builds(self, key: str, current: EnvironmentRecord | None) -> None:
        stale = tuple(build for build in self._builds(key) if current is None or build != current.build)
        with self._unused_builds(key, stale) as unused:
            for build in unused:
                _remove_build(self.folder / key / str(build))


def user_cache() -> EnvironmentCache:
    """Returns the cache in the user's cache directory.

    Raises:
        EnvironmentBuildError: Another user may have placed environments there.
    """
    root = settings.cache_directory()
    with cache_errors(root, ""):
        return EnvironmentCache(check_private(root))


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


class _Pins:
    """The builds that this process uses; each one's lock file stays open while it has a user."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[Path, tuple[Lock, set[str]]] = {}  # the tokens of each lock's users

    def add(self, file: Path, token: str) -> None:
        # A read-only cache may lack the file, and a file system may have no locks.
        with self._lock, contextlib.suppress(OSError):
            if file not in self._uses and (lock := try_lock(file, shared=True, wait=True)) is not None:
                self._uses[file] = (lock, set())
            if file in self._uses:
                self._uses[file][1].add(token)

    def remove(self, token: str) -> None:
        """Ends the use of an environment. Idempotent; unknown tokens are ignored."""
        with self._lock:
            for file, (lock, tokens) in list(self._uses.items()):
                tokens.discard(token)
                if not tokens:
                    del self._uses[file]
                    lock.release()


_pins = _Pins()
release_pin = _pins.remove


def stopped_error(manager: str, stop: StopSignal) -> EnvironmentBuildError:
    """The error of a build that a stop request interrupted."""
    reason = f" ({stop.reason})" if stop.reason else ""
    return EnvironmentBuildError(f"The building of the environment was stopped{reason}.", manager=manager)


@contextlib.contextmanager
def cache_errors(root: Path, manager: str) -> Iterator[None]:
    """Converts an ``OSError`` on the cache to an ``EnvironmentBuildError`` with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = disk_full_message(root)
        else:
            file = f" ({error.filename})" if error.filename and str(error.filename) != str(root) else ""
            message = (
                f"The cache folder {root} can't be used: {error.strerror or error}{file}. Make it writable for "
                "yourself, or name another folder in the environment variable PREFECT_MLPROJECTS_CACHE_DIR."
            )
        raise EnvironmentBuildError(message, manager=manager) from error


def last_output(lines: Sequence[str]) -> str:
    """Returns the part of a message with a tool's last output; empty without any."""
    return "".join(["\nLast output:", *(f"\n  {line}" for line in lines)]) if lines else ""


def disk_full_message(root: Path) -> str:
    """Returns the message for a full disk."""
    return (
        f"The disk is full: the environment does not fit below {root}. Free some space ('mlprojects env prune' removes "
        "environments), or name a folder on another disk in the environment variable PREFECT_MLPROJECTS_CACHE_DIR."
    )
