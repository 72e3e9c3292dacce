"""Git repositories as projects: their addresses (pure, without asking git or a network) and the credentials for them."""

from __future__ import annotations

import os
import posixpath
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from prefect_mlprojects._support.redaction import redact_url
from prefect_mlprojects.exceptions import FetchError

GIT_SCHEMES = ("https", "http", "ssh", "git", "file")
"""The transports that are allowed; git's own ``ext::`` and other remote helpers run any program."""

# git-clone(1), "Git URLs": a colon before any slash. "name::address" names one of git's remote helpers.
_SCP_ADDRESS = re.compile(
    r"^(?P<login>((?P<user>[^/\s:@]+)@)?(?P<host>\[[^\]/]+\]|[^/\s:@\[\]]+)):(?!:)(?P<path>[^\s].*)$"
)

_USERNAME_VARIABLE = "MLPROJECTS_GIT_USERNAME"
_TOKEN_VARIABLE = "MLPROJECTS_GIT_TOKEN"  # noqa: S105 - the name of a variable
# git runs this with /bin/sh and asks it for "get"; the secret itself is in the environment only.
_HELPER = f'!f() {{ test "$1" = get && printf "username=%s\\npassword=%s\\n" "${_USERNAME_VARIABLE}" "${_TOKEN_VARIABLE}"; }}; f'


@dataclass(frozen=True)
class GitCredentials:
    """Credentials for the repositories of some hosts.

    Attributes:
        username: The user name for the token; hosting services mostly take any, so None is sent as ``git``.
        token: A password or access token for ``https://`` and ``http://``.
        ssh_private_key: An unencrypted private key in OpenSSH's or PEM format for ``ssh://``.
        known_hosts: Lines of a ``known_hosts`` file for ``ssh://``; None uses the user's own.
        hosts: The hosts they are for (``github.com``, ``git.example.com:8443``); empty for any.
    """

    username: str | None = None
    token: str | None = field(default=None, repr=False)
    ssh_private_key: str | None = field(default=None, repr=False)
    known_hosts: str | None = None
    hosts: tuple[str, ...] = ()

    def fits(self, host: str) -> bool:
        """Returns whether they are for a host."""
        return not self.hosts or host in self.hosts or host.partition(":")[0] in self.hosts


class GitCredentialsLookup(Protocol):
    """Finds the credentials for a repository."""

    def __call__(self, url: str, host: str) -> GitCredentials | None:
        """Returns the credentials for a repository, or None without any.

        Args:
            url: The repository's URL, without user name and password.
            host: Its host, with the port if the URL has one, in lower case.
        """


@contextmanager
def git_settings(
    credentials: GitCredentials | None, origin: str
) -> Iterator[tuple[dict[str, str], list[tuple[str, str]]]]:
    """Yields variables and configuration that make git use credentials for one ``scheme://host[:port]`` only.

    They are sent neither to a redirect's target nor to a submodule's host. None leaves git to its own credential helpers
    and the SSH agent. A key file exists as long as the context.
    """
    variables: dict[str, str] = {}
    settings: list[tuple[str, str]] = []
    credentials = credentials or GitCredentials()
    if origin.startswith(("http://", "https://")):
        username = credentials.username or ("git" if credentials.token is not None else None)
        if username is not None:
            settings.append((f"credential.{origin}.username", username))
        if credentials.token is not None:
            # The empty helper resets those configured before: they would be asked first, and be told the token.
            settings += [(f"credential.{origin}.helper", ""), (f"credential.{origin}.helper", _HELPER)]
            variables |= {_USERNAME_VARIABLE: username or "git", _TOKEN_VARIABLE: credentials.token}
    with ExitStack() as stack:
        if credentials.ssh_private_key is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mlprojects-ssh-"))
            variables["GIT_SSH_COMMAND"] = _ssh_command(credentials, Path(folder))
        yield variables, settings


def _ssh_command(credentials: GitCredentials, folder: Path) -> str:
    command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30", "-o", "IdentitiesOnly=yes"]
    command += ["-i", str(_private_file(folder / "key", f"{(credentials.ssh_private_key or '').strip()}\n"))]
    if credentials.known_hosts is not None:
        hosts = _private_file(folder / "known_hosts", f"{credentials.known_hosts.strip()}\n")
        command += ["-o", f"UserKnownHostsFile={hosts}", "-o", "StrictHostKeyChecking=yes"]
    return shlex.join(command)


def _private_file(path: Path, text: str) -> Path:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    return path


@dataclass(frozen=True)
class GitUrl:
    """A repository's address.

    Attributes:
        url: An absolute URL without user name and password (but ``ssh://user@``).
        credentials: The user name and password in an http(s) URL.
        scp: The address as written, if it has the form ``[user@]host:path``.
    """

    url: str
    credentials: GitCredentials | None = None
    scp: str | None = None

    @property
    def address(self) -> str:
        """The argument for git: ``host:path`` is relative to the user's home there, and ``insteadOf`` matches it as written."""
        return self.scp or self.url

    @property
    def scheme(self) -> str:
        """The transport: one of ``GIT_SCHEMES``."""
        return urlsplit(self.url).scheme

    @property
    def host(self) -> str:
        """The host with the URL's port, in lower case; empty for a local repository."""
        return urlsplit(self.url).netloc.rpartition("@")[2].lower()


def parse_git_url(text: str) -> GitUrl | None:
    """Parses a repository's address: a URL of ``GIT_SCHEMES``, also after ``git+``, or ``[user@]host:path``; else None.

    Raises:
        FetchError: A part is missing, malformed or could be taken for an option.
    """
    if (scp := _SCP_ADDRESS.match(text)) and "://" not in text:
        _refuse_option(text, scp["user"] or "", scp["host"], scp["path"])
        return GitUrl(f"ssh://{scp['login']}/{scp['path'].lstrip('/')}", scp=text)
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower().removeprefix("git+")
    if not separator or scheme not in GIT_SCHEMES:
        return None
    shown = redact_url(text)
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise FetchError(f"{shown!r} is no URL: {error}.", uri=shown) from None
    if scheme == "file":
        if host not in ("", "localhost"):
            raise FetchError(f"{shown!r} names another machine; a file:// URI has three slashes.", uri=shown)
        return GitUrl(urlunsplit(("file", "", parts.path, "", "")))
    if not host or parts.path.strip("/") == "":
        raise FetchError(f"{shown!r} names no repository: a URL has the form {scheme}://host/path.", uri=shown)
    user = unquote(parts.username or "")
    _refuse_option(text, user, host, parts.path.lstrip("/"))
    netloc = f"[{host}]" if ":" in host else host
    netloc += f":{port}" if port else ""
    if scheme == "ssh" and user:
        netloc = f"{quote(user, safe='')}@{netloc}"
    credentials = None
    if scheme in ("http", "https") and user:
        # Kept apart from the URL, which other users of the machine see in the list of processes. A lone user name may be a
        # token; its password is asked of git's credential helpers, as git does.
        token = None if parts.password is None else unquote(parts.password)
        credentials = GitCredentials(user, token, hosts=(netloc.lower(),))
    return GitUrl(urlunsplit((scheme, netloc, parts.path, parts.query, "")), credentials)


def with_url_credentials(lookup: GitCredentialsLookup, uri: str) -> GitCredentialsLookup:
    """Returns a lookup that answers for the host of a project's URI with the URI's user name and password.

    Raises:
        FetchError: The URI is malformed.
    """
    address = parse_git_url(uri.partition("#")[0])
    if address is None or address.credentials is None or address.credentials.token is None:
        return lookup
    own = address.credentials
    return lambda url, host: own if own.fits(host) else lookup(url, host)


def resolve_submodule_url(parent: GitUrl, text: str, *, local_paths: bool) -> GitUrl | None:
    """Parses a submodule's URL, which may be relative to its parent's (gitmodules(5)); None if it is not allowed.

    Absolute paths of this machine are allowed if `local_paths`.

    Raises:
        FetchError: A part is missing or could be taken for an option.
    """
    if text.startswith("/"):
        return GitUrl(Path(text).as_uri()) if local_paths else None
    if not text.startswith(("./", "../")):
        return parse_git_url(text)
    if scp := _SCP_ADDRESS.match(parent.scp or ""):
        return parse_git_url(f"{scp['login']}:{posixpath.normpath(posixpath.join(scp['path'], text))}")
    parts = urlsplit(parent.url)
    path = posixpath.normpath(posixpath.join(parts.path, text))
    return GitUrl(urlunsplit(parts._replace(path=path)), parent.credentials)


def _refuse_option(text: str, *parts: str) -> None:
    # ssh and git would take "-oProxyCommand=…" for an option of theirs.
    if any(part.startswith("-") for part in parts):
        shown = redact_url(text)
        raise FetchError(f"{shown!r} can't be fetched: a user, host or path in it begins with '-'.", uri=shown)
