"""Which sources may run: patterns that the owner of a shared worker sets."""

from __future__ import annotations

import posixpath
from fnmatch import fnmatchcase
from urllib.parse import unquote, urlsplit, urlunsplit

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.settings import PREFIX, trusted_sources


def check_trusted(url: str, shown: str) -> None:
    """Refuses a source that the setting ``PREFECT_MLPROJECTS_TRUSTED_SOURCES`` does not allow.

    Patterns are those of shells (``*`` also matches slashes), such as ``https://github.com/acme/*`` or ``/srv/projects/*``. They
    are compared with the URL without user name, password and ``.``/``..``; a local folder counts as its absolute path.

    Args:
        url: The source: a URL, or an absolute path.
        shown: What the user asked for, passwords masked.

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
