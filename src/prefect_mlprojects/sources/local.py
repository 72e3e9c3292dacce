"""Projects that are folders of this machine: they run in place."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.exceptions import FetchError, SourceUnavailableError
from prefect_mlprojects.settings import PREFIX, trusted_sources
from prefect_mlprojects.sources.base import SourceKind, WorkingCopy, apply_subdirectory
from prefect_mlprojects.sources.git.facts import read_git_facts
from prefect_mlprojects.types import StopSignal


@dataclass(frozen=True)
class LocalSource:
    """A local folder.

    Attributes:
        folder: The folder before the ``#``, absolute.
        subdirectory: What stood after the ``#``; empty for the folder itself.
        uri: The requested URI, redacted.
    """

    folder: Path
    subdirectory: str
    uri: str

    @property
    def kind(self) -> SourceKind:
        """Where it is: ``local``."""
        return "local"

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Returns the folder itself, with what git says about it when it is inside a repository.

        Git is optional: if it is missing or refuses, the reason is reported and the copy has no commit.

        Raises:
            FetchError: The folder is gone, can't be read, or the subdirectory leads out of it; or the run was stopped.
        """
        if stop.requested:
            raise SourceUnavailableError(f"Fetching {self.uri!r} was stopped.", uri=self.uri)
        directory = apply_subdirectory(self.folder, self.subdirectory, self.uri)
        if not directory.is_dir():
            raise FetchError(f"The project folder {str(directory)!r} does not exist any more.", uri=self.uri)
        if not os.access(directory, os.R_OK | os.X_OK):
            raise SourceUnavailableError(
                f"The project folder {str(directory)!r} can't be read: permission denied. Check its owner and mode.",
                uri=self.uri,
            )
        facts = read_git_facts(directory, report)
        return WorkingCopy(
            directory=directory,
            uri=self.uri,
            kind="local",
            source_name=facts.source_name if facts else str(directory),
            commit=facts.commit if facts else None,
            branch=facts.branch if facts else None,
            repository_url=facts.repository_url if facts else None,
            dirty=facts.dirty if facts else False,
        )

    def remove(self, copy: WorkingCopy) -> None:
        """Does nothing: the folder is the user's own."""


def check_trusted(url: str, shown: str) -> None:
    """Refuses a source that the setting ``PREFECT_MLPROJECTS_TRUSTED_SOURCES`` does not allow.

    Patterns are those of shells (``*`` also matches slashes), such as ``https://github.com/acme/*`` or ``/srv/projects/*``. They
    are compared with the URL without user name, password and ``.``/``..``; a local folder counts as its absolute path.

    Args:
        url: The source: a URL, or an absolute path.
        shown: The requested URI, redacted.

    Raises:
        FetchError: No pattern matches.
    """
    patterns = trusted_sources()
    if not patterns or any(fnmatchcase(canonical_url(url), pattern) for pattern in patterns):
        return
    raise FetchError(
        f"{shown!r} may not run here: the setting {PREFIX}TRUSTED_SOURCES allows {', '.join(patterns)} only. "
        "Whoever runs this worker can add it.",
        uri=shown,
    )


def canonical_url(url: str) -> str:
    """Returns the one form of a URL or path that patterns are compared with.

    Args:
        url: A URL, or an absolute path.
    """
    parts = urlsplit(strip_user_info(url))
    # Twice-encoded slashes and dots must not hide where a path leads.
    path = parts.path
    while (decoded := unquote(path)) != path:
        path = decoded
    path = posixpath.normpath(path) if path else ""
    if path.startswith("//"):
        path = path[1:]
    if parts.scheme in ("", "file"):
        return path
    return urlunsplit((parts.scheme.lower(), parts.netloc.lower(), path, "", ""))
