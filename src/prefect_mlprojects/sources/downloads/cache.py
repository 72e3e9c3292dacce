"""Downloaded files that several runs share, so that a sweep downloads its data once.

Layout below ``<cache directory>/downloads``::

    <key>/content/        the file or folder under its remote name
    <key>/stamps.json     size and time of change of each file; its own time of change is the time of the last use
    <key>.lock            held while it is downloaded, or handed out
    .partial-<key>-*/     a download under way, or what a killed one left

The key holds the content's tag, so that an entry never goes out of date. Files are handed out as hard links and are
read-only, since they are shared; across file systems they are copied. One that was written to all the same no longer
fits its stamp, and is downloaded again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefect_mlprojects._support.locks import LockStoppedError, hold_lock, try_lock
from prefect_mlprojects.types import StopSignal

UNUSED_DAYS = 30
"""Days without use after which an entry is removed, when another one is added."""


class StoppedError(Exception):
    """Raised when a stop is requested during a download."""


@dataclass(frozen=True)
class DownloadCache:
    """Downloads that several runs share; safe to use from many threads and processes.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    def is_usable(self) -> bool:
        """Whether the folder is there, or can be made, and can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.folder, os.W_OK | os.X_OK)

    def hand_out(
        self,
        key: str,
        name: str,
        target: Path,
        fetch: Callable[[Path], None],
        report: Callable[[str], None],
        stop: StopSignal,
    ) -> bool:
        """Puts a shared file or folder where a run wants it, and downloads it first when it is not there.

        Args:
            key: Names its content.
            name: Its name.
            target: The file or folder to make; it is not there yet.
            fetch: Downloads it to a path that is not there yet.
            report: Called when another process has to be waited for.
            stop: Ends the waiting.

        Returns:
            Whether it was there already.

        Raises:
            StoppedError: A stop was requested while another process downloaded it.
            OSError: The cache, which must be usable, or the target can't be written.
            Exception: Whatever ``fetch`` raises.
        """
        with self._lock(key, report, stop):
            there = self._is_whole(key)
            if not there:
                self._add(key, name, fetch)
            content = next((self.folder / key / "content").iterdir())
            _place(content, target)
            with contextlib.suppress(OSError):
                os.utime(self.folder / key / "stamps.json")
        return there

    def remove_unused(self, days: float = UNUSED_DAYS) -> None:
        """Removes entries that no run has used for long, and what killed downloads left."""
        for stamps in self.folder.glob("*/stamps.json"):
            with contextlib.suppress(OSError):
                if time.time() - stamps.stat().st_mtime > days * 86400:
                    self._remove_if_free(stamps.parent.name, stamps.parent)
        for partial in self.folder.glob(".partial-*"):
            self._remove_if_free(partial.name.split("-")[1], partial)

    def _remove_if_free(self, key: str, folder: Path) -> None:
        with contextlib.suppress(OSError):
            lock = try_lock(self.folder / f"{key}.lock")
            if lock is None:
                return
            try:
                if folder.name == key:
                    self._remove(key)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                lock.release()

    @contextlib.contextmanager
    def _lock(self, key: str, report: Callable[[str], None], stop: StopSignal) -> Iterator[None]:
        def on_wait() -> None:
            report("Waiting for another run, which downloads the same")

        try:
            with hold_lock(self.folder / f"{key}.lock", stop, on_wait):
                yield
        except LockStoppedError:
            raise StoppedError from None

    def _add(self, key: str, name: str, fetch: Callable[[Path], None]) -> None:
        self._remove(key)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{key}-", dir=self.folder))
        try:
            content = partial / "content"
            content.mkdir()
            fetch(content / name)
            for file in _files(content):
                file.chmod(0o444)
            stamps = {str(file.relative_to(content)): _stamp(file) for file in _files(content)}
            (partial / "stamps.json").write_text(json.dumps(stamps), encoding="utf-8")
            partial.rename(self.folder / key)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.remove_unused()

    def _remove(self, key: str) -> None:
        grave = self.folder / f".partial-{key}-removed"
        with contextlib.suppress(OSError):
            shutil.rmtree(grave, ignore_errors=True)
            (self.folder / key).rename(grave)
            shutil.rmtree(grave, ignore_errors=True)

    def _is_whole(self, key: str) -> bool:
        entry = self.folder / key
        try:
            stamps = json.loads((entry / "stamps.json").read_text(encoding="utf-8"))
            return bool(stamps) and all(stamp == _stamp(entry / "content" / name) for name, stamp in stamps.items())
        except (OSError, ValueError, AttributeError):
            return False


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _place(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_or_copy)
    else:
        _link_or_copy(str(source), str(target))


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, one without links, or too many of them.
        shutil.copyfile(source, target)
    return target
