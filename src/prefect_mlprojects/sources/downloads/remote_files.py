"""Files and folders that ``fsspec`` can reach: what they are now, and their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.exceptions import FetchError

# How stores name the tag that changes with a file's content: HTTP, S3, Google Cloud Storage, Azure.
_TAGS = ("ETag", "etag", "VersionId", "generation", "md5Hash", "Content-MD5", "content_md5", "Digest")
_CONNECT_SECONDS = 60.0
_SILENCE_SECONDS = 300.0


@dataclass(frozen=True)
class RemoteFile:
    """One file.

    Attributes:
        size: Its size as announced, bytes; None when the store does not tell.
        tag: What changes with its content; None when the store does not tell.
    """

    size: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class RemoteItem:
    """A file or a folder as it was when it was looked at.

    Attributes:
        uri: Where it is.
        path: The same, as its filesystem names it.
        filesystem: The ``fsspec`` filesystem.
        is_folder: Whether it is a folder.
        files: The files by their names below the folder; a file's own name is empty.
    """

    uri: str
    path: str
    filesystem: Any
    is_folder: bool
    files: Mapping[str, RemoteFile]

    @property
    def key(self) -> str | None:
        """A hash of its address and content; None when the store does not tell when its content changes.

        Credentials in the address don't count: who may not read it is refused before the key is asked for.
        """
        if not self.files or any(not file.tag for file in self.files.values()):
            return None
        digest = hashlib.sha256(strip_user_info(self.uri).encode())
        for name, file in sorted(self.files.items()):
            digest.update(f"\0{name}\0{file.size}\0{file.tag}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


def look_at(uri: str, shown: str) -> RemoteItem:
    """Finds out what is at a URI.

    Args:
        uri: Any URI that ``fsspec`` knows.
        shown: The same without secrets, for messages.

    Returns:
        What is there. Of a web page nothing is asked but its headers, and where these can't be had nothing is told.

    Raises:
        FetchError: A file of it would land outside of its folder.
        Exception: Whatever the driver raises.
    """
    import fsspec

    scheme = urlsplit(uri).scheme.lower()
    if scheme in ("http", "https"):
        filesystem, path = fsspec.core.url_to_fs(uri, **_http_options(scheme))
        return RemoteItem(uri, path, filesystem, is_folder=False, files={"": _headers(filesystem, path)})
    filesystem, path = fsspec.core.url_to_fs(uri)
    # fsspec keeps listings for the life of a process; the data may have changed since another run.
    filesystem.invalidate_cache()
    if not filesystem.isdir(path):
        return RemoteItem(uri, path, filesystem, is_folder=False, files={"": _described(filesystem.info(path))})
    found = filesystem.find(path, detail=True)
    files = {_below(path, name, shown): _described(facts) for name, facts in found.items()}
    return RemoteItem(uri, path, filesystem, is_folder=True, files=files)


def fetch_item(item: RemoteItem, target: Path, progress: Any) -> None:
    """Copies a remote file or folder, and compares the sizes with what was announced.

    Args:
        item: What is copied.
        target: The file or folder to make; it is not there yet.
        progress: A callback of ``fsspec``.

    Raises:
        ConnectionError: Fewer or more bytes arrived than were announced.
        Exception: Whatever the driver raises.
    """
    if item.is_folder:
        target.mkdir()
        item.filesystem.get(f"{item.path.rstrip('/')}/", f"{target}/", recursive=True, callback=progress)
    elif _is_web(item):
        # Compressed on the way, a file would not have the announced size. aiohttp compares it with the answer's own.
        item.filesystem.get_file(item.path, str(target), callback=progress, headers={"Accept-Encoding": "identity"})
    else:
        item.filesystem.get_file(item.path, str(target), callback=progress)
    for name, file in item.files.items():
        _check_size(target / name if name else target, file)


def check_unchanged(item: RemoteItem, shown: str) -> None:
    """Makes sure that what was copied is what was looked at.

    Args:
        item: What was looked at.
        shown: Its URI without secrets.

    Raises:
        ConnectionError: It has changed in between.
    """
    if look_at(item.uri, shown).key != item.key:
        raise ConnectionError("it changed while it was downloaded")


def _http_options(scheme: str) -> dict[str, Any]:
    """Options for aiohttp: it would end every transfer after five minutes, and pass over proxies."""
    import aiohttp
    import fsspec

    chosen = dict(fsspec.config.conf.get(scheme, {}).get("client_kwargs", {}))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    return {"client_kwargs": {"trust_env": True, "timeout": timeout, **chosen}}


def _headers(filesystem: Any, url: str) -> RemoteFile:
    """What a web server says of a file; nothing when it does not answer to a question for headers only."""
    from fsspec.asyn import sync

    async def ask() -> RemoteFile:
        session = await filesystem.set_session()
        options = {
            **filesystem.kwargs,
            "headers": {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"},
        }
        async with session.head(filesystem.encode_url(url), allow_redirects=True, **options) as answer:
            tag = answer.headers.get("ETag") or answer.headers.get("Content-MD5") or answer.headers.get("Digest")
            if answer.status != 200 or not tag:
                return RemoteFile()
            size = answer.headers.get("Content-Length", "")
            plain = answer.headers.get("Content-Encoding", "identity") in ("", "identity")
            return RemoteFile(int(size) if size.isdecimal() and plain else None, tag)

    try:
        found: RemoteFile = sync(filesystem.loop, ask)
    except Exception:  # noqa: BLE001 - the download itself will say what is wrong
        return RemoteFile()
    return found


def _is_web(item: RemoteItem) -> bool:
    return urlsplit(item.uri).scheme.lower() in ("http", "https")


def _described(facts: Mapping[str, Any]) -> RemoteFile:
    tag = next((str(facts[name]) for name in _TAGS if facts.get(name)), None)
    return RemoteFile(facts.get("size"), tag)


def _check_size(file: Path, announced: RemoteFile) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found is None or (announced.size is not None and found != announced.size):
        raise ConnectionError(f"of {file.name} {found or 0} bytes arrived, {announced.size} were announced")


def _below(root: str, name: str, shown: str) -> str:
    """The name of a remote file below its folder; an object's name may be anything, ``..`` too."""
    relative = name.removeprefix(root.rstrip("/")).lstrip("/")
    if ".." in PurePosixPath(relative).parts:
        raise FetchError(f"{shown} can't be downloaded: its file {name!r} would land outside of its folder.", uri=shown)
    return relative
