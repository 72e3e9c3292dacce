"""The contract of sources, the folders of runs, and checks that all sources share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit, urlunsplit

from prefect_mlprojects._support.files import check_private
from prefect_mlprojects._support.process_folders import create_process_folder, remove_process_folder
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import FetchError, SourceUnavailableError
from prefect_mlprojects.settings import PREFIX, cache_directory, keep_working_copies, source_limits
from prefect_mlprojects.types import StopSignal

SourceKind: TypeAlias = Literal["local", "git", "zip"]


@dataclass(frozen=True)
class WorkingCopy:
    """A project's files on this machine, and their version; URIs and names are redacted.

    Attributes:
        directory: The project's folder with the ``#subdirectory`` applied, absolute.
        source_name: MLflow's tag ``mlflow.source.name``: ``file://<repository>#<subdirectory>`` for a folder inside a
            git repository.
        commit: The full SHA of the checked-out commit, if the files are under git's control.
        repository_url: The URL of the repository's first remote.
        dirty: Whether tracked files differ from ``commit``; untracked ones do not count.
        temporary: Whether it is removed when its run has ended.
        root: The folder with everything that was fetched, which the project's files must not lead out of; None for a local one.
    """

    directory: Path
    uri: str
    kind: SourceKind
    source_name: str
    commit: str | None = None
    branch: str | None = None
    repository_url: str | None = None
    dirty: bool = False
    temporary: bool = False
    root: Path | None = None


class Source(Protocol):
    """The place of a project, as ``detect_source`` recognised it."""

    @property
    def kind(self) -> SourceKind:
        """The kind of place."""

    @property
    def uri(self) -> str:
        """The requested URI, redacted."""

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Creates the working copy; `report` receives lines about the progress, from any thread.

        A fetch that fails or is stopped leaves nothing behind.

        Raises:
            FetchError: It could not be fetched, or was stopped.
        """

    def remove(self, copy: WorkingCopy) -> None:
        """Removes a temporary copy that this source created; idempotent, and a no-op for any other."""


def describe_working_copy(copy: WorkingCopy) -> str:
    """Describes a working copy's origin and version for people."""
    version = f" at {copy.commit[:12]}" if copy.commit else ""
    version += f" ({copy.branch})" if copy.branch and copy.kind == "git" else ""
    origin = copy.source_name if copy.kind != "local" else copy.directory
    return f"{origin}{version}{' (with uncommitted changes)' if copy.dirty else ''}"


def checked_cache(shown: str) -> Path:
    """Returns the cache folder; raises `FetchError`, which names the redacted URI `shown`, if others may have written to it."""
    try:
        return check_private(cache_directory())
    except OSError as error:
        raise _not_stored(shown, cache_directory(), error) from None


def _not_stored(shown: str, folder: Path, error: OSError) -> FetchError:
    return SourceUnavailableError(
        f"The files of {shown!r} can't be stored: {error.filename or folder}: {error.strerror or error}. "
        "PREFECT_MLPROJECTS_CACHE_DIR names another folder.",
        uri=shown,
    )


def create_run_folder(shown: str, name: str = "project") -> Path:
    """Creates an empty folder `name` for a run, locked by this process, so that later ones remove it if this one is killed.

    Raises:
        FetchError: The cache can't be written; the message names the project's redacted URI, `shown`.
    """
    root = checked_cache(shown) / "working-copies"
    try:
        # The run's own folder is private; the project's below it has an ordinary mode.
        content = create_process_folder(root) / name
        content.mkdir()
    except OSError as error:
        raise _not_stored(shown, root, error) from None
    return content


def remove_run_folder(directory: Path) -> None:
    """Removes a folder of ``create_run_folder``, given by it or a folder in it, unless it is to be kept; idempotent."""
    remove_process_folder(directory, keep=keep_working_copies())


def apply_subdirectory(root: Path, subdirectory: str, uri: str) -> Path:
    """Returns the folder `subdirectory` (empty for `root` itself) of a project, whose redacted URI is for messages.

    Raises:
        FetchError: It leads out of `root`, also through a symbolic link, or does not exist.
    """
    relative = PurePosixPath(subdirectory)
    folder = root / relative
    if relative.is_absolute() or ".." in relative.parts or not folder.resolve().is_relative_to(root.resolve()):
        raise FetchError(
            f"The subdirectory {subdirectory!r} of {uri!r} leads out of the project. Name a folder inside it.", uri=uri
        )
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FetchError(
            f"The subdirectory {subdirectory!r} of {uri!r} {problem}: {folder}{nearest_folder(folder)}", uri=uri
        )
    return folder


def nearest_folder(folder: Path) -> str:
    """Returns the end of a "does not exist" sentence: the most similar sibling of a missing folder, or its last existing parent."""
    parent = folder.parent
    # os.path.isdir, unlike Path.is_dir, is False for names that are too long.
    if not os.path.isdir(parent):  # noqa: PTH112
        existing = next((ancestor for ancestor in parent.parents if os.path.isdir(ancestor)), None)  # noqa: PTH112
        return f" (of its path only {str(existing)!r} exists)." if existing is not None else "."
    try:
        siblings = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    except OSError:
        return "."
    close = nearest(folder.name, siblings)
    return f". Did you mean {str(parent / close)!r}?" if close else "."


def check_trusted(url: str, shown: str) -> None:
    """Refuses a source, a URL or absolute path, that no pattern of ``PREFECT_MLPROJECTS_TRUSTED_SOURCES`` allows.

    Patterns are those of shells (``*`` also matches slashes), such as ``https://github.com/acme/*`` or ``/srv/projects/*``. Servers
    read unusual spellings of a path in their own ways, so that these are refused instead of normalised.
    """
    ambiguous, address = _is_ambiguous(url), _without_user(url)
    for patterns in source_limits():
        setting = f"{shown!r} may not run here: the setting {PREFIX}TRUSTED_SOURCES, or the worker's policy, allows"
        if ambiguous:
            raise FetchError(
                f"{setting} no address with '.' or '..' in its path, with '\\', '::' or blanks, or with an encoded dot, slash or "
                "percent sign. Write it without them.",
                uri=shown,
            )
        if not any(fnmatchcase(address, pattern) for pattern in patterns):
            allowed = ", ".join(filter(None, patterns)) or "nothing"
            raise FetchError(f"{setting} {allowed} only. The worker's operator can add it.", uri=shown)


_AMBIGUOUS = re.compile(r"%(2e|2f|5c|25|[01][0-9a-f]|7f|(?![0-9a-f]{2}))|\\|::|[\x00-\x20\x7f]", re.IGNORECASE)


def _is_ambiguous(url: str) -> bool:
    path = _local_path(url)
    if path is None:
        # A port may follow an address in brackets, which has colons.
        without_address = re.sub(r"^([\w+.-]+://[^/?#]*)\[[0-9A-Fa-f:.]+\]", r"\1", url)
        path = urlsplit(without_address).path
        if _AMBIGUOUS.search(without_address):
            return True
    return any(segment in (".", "..") for segment in path.split("/"))


def _local_path(url: str) -> str | None:
    """Returns the path of an absolute path or ``file://`` URL as the system reads it; None for any other URL."""
    return url if url.startswith("/") else unquote(urlsplit(url).path) if url.lower().startswith("file://") else None


def _without_user(url: str) -> str:
    """Returns what is compared with patterns: a path, or a URL without password, and without user name where it is only a login."""
    path = _local_path(url)
    if path is not None:
        return path
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    # An ssh user has its own home folder; the "user" of abfs:// is a container.
    is_login = parts.scheme in ("http", "https", "git", "ftp") or user == "git"
    netloc = host if is_login else parts.netloc
    return urlunsplit(parts._replace(netloc=netloc.lower(), fragment=""))
