"""The forms in which a git repository can be named: pure, without asking git or a network."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources.git.credentials import GitCredentials, GitCredentialsLookup

GIT_SCHEMES = ("https", "http", "ssh", "git", "file")
"""The transports that are used; git's own ``ext::`` and other remote helpers run any program."""

# git-clone(1), "Git URLs": a colon before any slash. "name::address" names one of git's remote helpers.
_SCP_ADDRESS = re.compile(r"^((?P<user>[^/\s:@]+)@)?(?P<host>\[[^\]/]+\]|[^/\s:@\[\]]+):(?!:)(?P<path>[^\s].*)$")


@dataclass(frozen=True)
class GitUrl:
    """A repository's address.

    Attributes:
        url: An absolute URL without user name and password (but ``ssh://user@``).
        scp: The address as it was written, if it has the form ``[user@]host:path``; git is given this one.
        credentials: The user name and password that stood in an http(s) URL; None without.
    """

    url: str
    credentials: GitCredentials | None = None
    scp: str | None = None

    @property
    def address(self) -> str:
        """What git is given; ``host:path`` is relative to the user's home there, and ``insteadOf`` matches it as written."""
        return self.scp or self.url

    @property
    def scheme(self) -> str:
        """The transport: one of ``GIT_SCHEMES``."""
        return urlsplit(self.url).scheme

    @property
    def host(self) -> str:
        """The host with its port, if the URL names one, in lower case; empty for a local repository."""
        return urlsplit(self.url).netloc.rpartition("@")[2].lower()

    @property
    def origin(self) -> str:
        """``scheme://host[:port]``."""
        return f"{self.scheme}://{self.host}"


def parse_git_url(text: str) -> GitUrl | None:
    """Reads the address of a repository.

    Args:
        text: ``https://…``, ``http://…``, ``ssh://…``, ``git://…``, ``file:///…``, any of them after ``git+``, or
            ``[user@]host:path``.

    Returns:
        The address, or None when the text has none of these forms.

    Raises:
        FetchError: It has one, but a part of it is missing or could be taken for an option.
    """
    scp = _SCP_ADDRESS.match(text)
    if scp is not None and "://" not in text:
        user, path = scp["user"] or "", scp["path"]
        _refuse_option(text, user, scp["host"], path)
        url = f"ssh://{user}{'@' if user else ''}{scp['host']}/{path.lstrip('/')}"
        return GitUrl(url, scp=text)
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower().removeprefix("git+")
    if not separator or scheme not in GIT_SCHEMES:
        return None
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise FetchError(f"{redact(text)!r} is no URL: {error}.", uri=redact(text)) from None
    if scheme == "file":
        if host not in ("", "localhost"):
            raise FetchError(f"{redact(text)!r} names another machine; a file:// URI has three slashes.", uri=text)
        return GitUrl(urlunsplit(("file", "", parts.path, "", "")))
    if not host or parts.path.strip("/") == "":
        raise FetchError(
            f"{redact(text)!r} names no repository: a URL has the form {scheme}://host/path.", uri=redact(text)
        )
    user = unquote(parts.username or "")
    _refuse_option(text, user, host, parts.path.lstrip("/"))
    address = f"[{host}]" if ":" in host else host
    netloc = f"{address}:{port}" if port else address
    if scheme == "ssh" and user:
        netloc = f"{quote(user, safe='')}@{netloc}"
    url = urlunsplit((scheme, netloc, parts.path, parts.query, ""))
    if scheme in ("http", "https") and user:
        # Kept apart from the URL, which other users of the machine see in the list of processes. A lone user name may be a
        # token; its password is asked of git's credential helpers, as git does.
        token = None if parts.password is None else unquote(parts.password)
        return GitUrl(url, GitCredentials(user, token, hosts=(netloc.lower(),)))
    return GitUrl(url)


def with_url_credentials(lookup: GitCredentialsLookup, uri: str) -> GitCredentialsLookup:
    """Returns a lookup that answers with the user name and password in a project's URI for the URI's host.

    Raises:
        FetchError: The URI is malformed.
    """
    address = parse_git_url(uri.partition("#")[0])
    if address is None or address.credentials is None or address.credentials.token is None:
        return lookup
    own = address.credentials

    def lookup_with_own(url: str, host: str) -> GitCredentials | None:
        return own if own.fits(host) else lookup(url, host)

    return lookup_with_own


def resolve_submodule_url(parent: GitUrl, text: str, *, local_paths: bool) -> GitUrl | None:
    """Reads a submodule's URL, which may be relative to its parent's repository (gitmodules(5)).

    Args:
        parent: The repository that has the submodule.
        text: What ``.gitmodules`` says.
        local_paths: Whether an absolute path of this machine is allowed.

    Returns:
        The address; None when it has no form that is allowed.

    Raises:
        FetchError: A part of it is missing or could be taken for an option.
    """
    if text.startswith("/"):
        return GitUrl(Path(text).as_uri()) if local_paths else None
    if not text.startswith(("./", "../")):
        return parse_git_url(text)
    if scp := _SCP_ADDRESS.match(parent.scp or ""):
        path = posixpath.normpath(posixpath.join(scp["path"], text))
        return parse_git_url(f"{scp['user'] + '@' if scp['user'] else ''}{scp['host']}:{path}")
    parts = urlsplit(parent.url)
    path = posixpath.normpath(posixpath.join(parts.path, text))
    return GitUrl(urlunsplit(parts._replace(path=path)), parent.credentials)


def _refuse_option(text: str, *parts: str) -> None:
    # ssh and git would take "-oProxyCommand=…" for an option of theirs.
    if any(part.startswith("-") for part in parts):
        raise FetchError(
            f"{redact(text)!r} can't be fetched: a user, host or path in it begins with '-'.", uri=redact(text)
        )
