"""Remote files and folders through ``fsspec``, and the cache of downloads that several runs share.

Layout below ``<cache directory>/downloads``::

    <key>/content/        the file or folder under its remote name
    <key>/stamps.json     size and modification time of each file; its own modification time is the last use
    <key>.lock            held during the download and while it is handed out
    .partial-<key>-*/     an unfinished or killed download

The key contains the content's tag, so that entries never become stale. Files are handed out as hard links and are
read-only, since they are shared; across file systems they are copied. A modified one no longer matches its stamp and
is downloaded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urljoin

from prefect_mlprojects._support.files import make_directories, may_access
from prefect_mlprojects._support.locks import hold_lock, try_lock
from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.types import StopSignal

UNUSED_DAYS = 30
"""Days without use after which an entry is removed, when another one is added."""

# Each store's name of the tag that changes with a file's content: HTTP, S3, Google Cloud Storage, Azure.
_TAGS = ("ETag", "etag", "VersionId", "generation", "md5Hash", "Content-MD5", "content_md5", "Digest")
_CONNECT_SECONDS = 60.0
_SILENCE_SECONDS = 300.0
_MAX_REDIRECTS = 10


@dataclass(frozen=True)
class RemoteFile:
    """A file's size in bytes and the tag that changes with its content, as far as the store announces them."""

    size: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class RemoteItem:
    """A remote file or folder at one point in time.

    Attributes:
        path: The address in the ``fsspec`` filesystem.
        files: The files by their names below a folder; the name of a single file is empty.
    """

    uri: str
    path: str
    filesystem: Any
    is_folder: bool
    files: Mapping[str, RemoteFile]

    @property
    def key(self) -> str | None:
        """A hash of address and content; None if the store does not tell when the content changes.

        Credentials in the address don't count: a store refuses who may not read it before there is a key.
        """
        if not self.files or any(not file.tag for file in self.files.values()):
            return None
        digest = hashlib.sha256(strip_user_info(self.uri).encode())
        for name, file in sorted(self.files.items()):
            digest.update(f"\0{name}\0{file.size}\0{file.tag}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


def describe_remote(uri: str, shown: str, *, redirects: bool = True) -> RemoteItem:
    """Returns the file or folder at any URI that ``fsspec`` knows; of a web page only headers are requested.

    Raises:
        FetchError: A file of it would be written outside of its folder; the message has the redacted URI, `shown`.
        Exception: Any error of the driver.
    """
    import fsspec

    scheme = split_url(uri).scheme.lower()
    if scheme in ("http", "https"):
        filesystem, path = fsspec.core.url_to_fs(uri, allow_redirects=redirects, **_http_options(scheme))
        return RemoteItem(uri, path, filesystem, is_folder=False, files={"": _headers(filesystem, path)})
    filesystem, path = fsspec.core.url_to_fs(uri)
    # fsspec keeps listings for the life of a process; the data may have changed since another run.
    filesystem.invalidate_cache()
    if not filesystem.isdir(path):
        return RemoteItem(uri, path, filesystem, is_folder=False, files={"": _described(filesystem.info(path))})
    found = filesystem.find(path, detail=True)
    files = {_relative_name(path, name, shown): _described(info) for name, info in found.items()}
    return RemoteItem(uri, path, filesystem, is_folder=True, files=files)


def fetch_item(item: RemoteItem, target: Path, progress: Any) -> None:
    """Copies a remote file or folder to a new path; `progress` is a callback of ``fsspec``.

    Raises:
        ConnectionError: Fewer or more bytes arrived than were announced.
        Exception: Any error of the driver.
    """
    if item.is_folder:
        target.mkdir()
        item.filesystem.get(f"{item.path.rstrip('/')}/", f"{target}/", recursive=True, callback=progress)
    else:
        # A compressed transfer would not have the announced size, which aiohttp compares.
        is_web = split_url(item.uri).scheme.lower() in ("http", "https")
        options = {"headers": {"Accept-Encoding": "identity"}} if is_web else {}
        item.filesystem.get_file(item.path, str(target), callback=progress, **options)
    for name, announced in item.files.items():
        file = target / name if name else target
        size = file.stat().st_size if file.is_file() else None
        if size is None or (announced.size is not None and size != announced.size):
            raise ConnectionError(f"of {file.name} {size or 0} bytes arrived, {announced.size} were announced")


def _http_options(scheme: str) -> dict[str, Any]:
    """Returns options for aiohttp, which would end each transfer after five minutes and ignore proxies."""
    import aiohttp
    import fsspec

    chosen = dict(fsspec.config.conf.get(scheme, {}).get("client_kwargs", {}))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    return {"client_kwargs": {"trust_env": True, "timeout": timeout, **chosen}}


def _headers(filesystem: Any, url: str) -> RemoteFile:
    """Returns what a HEAD request says of a web file; nothing if the server does not answer it."""
    from fsspec.asyn import sync

    async def ask() -> RemoteFile:
        session = await filesystem.set_session()
        headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        options = {**filesystem.kwargs, "headers": headers}
        async with session.head(filesystem.encode_url(url), **options) as answer:
            tag = answer.headers.get("ETag") or answer.headers.get("Content-MD5") or answer.headers.get("Digest")
            if answer.status != 200 or not tag:
                return RemoteFile()
            size = answer.headers.get("Content-Length", "")
            plain = answer.headers.get("Content-Encoding", "identity") in ("", "identity")
            return RemoteFile(int(size) if size.isdecimal() and plain else None, tag)

    try:
        found: RemoteFile = sync(filesystem.loop, ask)
    except Exception:  # noqa: BLE001 - the download itself will report the error
        return RemoteFile()
    return found


def follow_redirects(uri: str, check: Callable[[str], None]) -> str:
    """Returns the address where the redirects of a web file end; `check` sees each before it is asked, and may raise.

    Raises:
        ConnectionError: There are too many of them.
        Exception: Any error of the driver, and of `check`.
    """
    import fsspec
    from fsspec.asyn import sync

    filesystem, _ = fsspec.core.url_to_fs(uri, **_http_options(split_url(uri).scheme.lower()))

    async def next_address(url: str) -> str | None:
        session = await filesystem.set_session()
        async with session.get(filesystem.encode_url(url), **{**filesystem.kwargs, "allow_redirects": False}) as answer:
            location = answer.headers.get("Location") if 300 <= answer.status < 400 else None
            return urljoin(url, location) if location else None

    for _ in range(_MAX_REDIRECTS):
        target = sync(filesystem.loop, next_address, uri)
        if target is None:
            return uri
        check(target)
        uri = target
    raise ConnectionError(f"it redirects more than {_MAX_REDIRECTS} times")


def _described(info: Mapping[str, Any]) -> RemoteFile:
    return RemoteFile(info.get("size"), next((str(info[name]) for name in _TAGS if info.get(name)), None))


def _relative_name(root: str, name: str, shown: str) -> str:
    """Returns a remote file's name below its folder; an object's name may be anything, also ``..``."""
    relative = name.removeprefix(root.rstrip("/")).lstrip("/")
    if ".." in PurePosixPath(relative).parts:
        problem = f"its file {name!r} would be written outside of its folder"
        raise FetchError(f"{shown} can't be downloaded: {problem}.", uri=shown)
    return relative


@dataclass(frozen=True)
class DownloadCache:
    """Shared downloads in a folder; safe to use from many threads and processes."""

    folder: Path

    def is_usable(self) -> bool:
        """Whether the folder exists or can be created, and can be written."""
        try:
            make_directories(self.folder)
        except OSError:
            return False
        return may_access(self.folder, os.W_OK | os.X_OK)

    def hand_out(
        self,
        key: str,
        name: str,
        target: Path,
        fetch: Callable[[Path], None],
        report: Callable[[str], None],
        stop: StopSignal,
    ) -> bool:
        """Creates `target` from the entry `key`, and returns whether it was cached; else `fetch` downloads it as `name`.

        Raises:
            LockStoppedError: A stop was requested while another process downloaded it.
            OSError: The cache, which must be usable, or the target can't be written.
            Exception: Any error of ``fetch``.
        """
        waiting = "Waiting for another run, which downloads the same"
        with hold_lock(self.folder / f"{key}.lock", stop, lambda: report(waiting)):
            cached = self._is_intact(key)
            if not cached:
                self._add(key, name, fetch)
            content = next((self.folder / key / "content").iterdir())
            if content.is_dir():
                shutil.copytree(content, target, copy_function=_link_or_copy)
            else:
                _link_or_copy(str(content), str(target))
            with contextlib.suppress(OSError):
                os.utime(self.folder / key / "stamps.json")
        return cached

    def remove_unused(self, days: float = UNUSED_DAYS) -> None:
        """Removes entries that were not used for `days`, and partial downloads of killed processes."""
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

    def _add(self, key: str, name: str, fetch: Callable[[Path], None]) -> None:
        self._remove(key)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{key}-", dir=self.folder))
        try:
            content = partial / "content"
            content.mkdir()
            fetch(content / name)
            files = [Path(parent, file) for parent, _, names in os.walk(content) for file in names]
            for file in files:
                file.chmod(0o444)
            stamps = {str(file.relative_to(content)): _stamp(file) for file in files}
            (partial / "stamps.json").write_text(json.dumps(stamps), encoding="utf-8")
            partial.rename(self.folder / key)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.remove_unused()

    def _remove(self, key: str) -> None:
        # Renamed first: a process that is killed meanwhile leaves no damaged entry.
        removed = self.folder / f".partial-{key}-removed"
        with contextlib.suppress(OSError):
            shutil.rmtree(removed, ignore_errors=True)
            (self.folder / key).rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _is_intact(self, key: str) -> bool:
        entry = self.folder / key
        try:
            stamps = json.loads((entry / "stamps.json").read_text(encoding="utf-8"))
            return bool(stamps) and all(stamp == _stamp(entry / "content" / name) for name, stamp in stamps.items())
        except (OSError, ValueError, AttributeError):
            return False


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, one without links, or too many of them.
        shutil.copyfile(source, target)
    return target
