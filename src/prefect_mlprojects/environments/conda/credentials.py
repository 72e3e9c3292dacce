"""Credentials in the URLs of channels: handed to rattler apart, since it keeps the URLs of what it installs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

_TOKEN_PATH = re.compile(r"^/t/(?P<token>[^/]+)(?P<rest>/.*)?$")


@dataclass(frozen=True)
class ChannelAccess:
    """Channels without the credentials that their URLs had.

    Attributes:
        urls: The URL to use, by the one that was given; those that need no other are left out.
        credentials: What to present to each host, in the format of rattler's credentials file.
    """

    urls: Mapping[str, str] = field(default_factory=dict, repr=False)
    credentials: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def url(self, given: str) -> str:
        """The URL to use."""
        return self.urls.get(given, given)


def take_credentials(urls: Iterable[str]) -> ChannelAccess:
    """Takes user names, passwords and tokens out of URLs.

    A host can be given one credential only: a URL with another one, and one whose token does not stand first in its
    path, stay as they are.
    """
    clean: dict[str, str] = {}
    credentials: dict[str, Mapping[str, Any]] = {}
    for url in urls:
        parts = urlsplit(url)
        token = _TOKEN_PATH.match(parts.path)
        if parts.scheme not in ("http", "https") or not parts.hostname or (parts.username and token):
            continue
        found: Mapping[str, Any]
        if parts.username:
            password = unquote(parts.password or "")
            found = {"BasicHTTP": {"username": unquote(parts.username), "password": password}}
            parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        elif token is not None:
            found = {"CondaToken": token["token"]}
            parts = parts._replace(path=token["rest"] or "")
        else:
            continue
        if credentials.setdefault(parts.hostname or "", found) == found:
            clean[url] = urlunsplit(parts)
    return ChannelAccess(clean, credentials)


@contextlib.contextmanager
def credentials_file(access: ChannelAccess, environ: Mapping[str, str]) -> Iterator[str | None]:
    """A file with credentials for rattler, which only this user can read and which is gone after the block.

    Args:
        access: What the channels' URLs had.
        environ: The environment variables; ``RATTLER_AUTH_FILE`` names a file of the user, which counts as well.

    Yields:
        The file's path; the user's own when there is nothing to add to it, None without any.
    """
    named = environ.get("RATTLER_AUTH_FILE") or None
    if not access.credentials:
        yield named
        return
    known: dict[str, Any] = {}
    if named is not None:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(Path(named).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="mlprojects-conda-") as folder:
        file = Path(folder, "credentials.json")
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            json.dump({**known, **access.credentials}, out)
        yield str(file)
