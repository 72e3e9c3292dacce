"""Git repositories as projects: their addresses (pure, without asking git or a network) and the credentials for them."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from prefect_mlprojects._support.files import write_private
from prefect_mlprojects._support.process_folders import private_folder
from prefect_mlprojects._support.redaction import holds_secret, redact_url
from prefect_mlprojects.exceptions import FetchError

GIT_SCHEMES = ("https", "http", "ssh", "git", "file")
"""The transports that are allowed; git's own ``ext::`` and other remote helpers run any program."""
_TRANSPORT = "mlprojects"
_PORTS = {"https": 443, "http": 80, "ssh": 22, "git": 9418}

# git-clone(1), "Git URLs": a colon before any slash. "name::address" names one of git's remote helpers.
_SCP_ADDRESS = re.compile(
    r"^(?P<login>((?P<user>[^/\s:@]+)@)?(?P<host>\[[^\]/]+\]|[^/\s:@\[\]]+)):(?!:)(?P<path>[^\s].*)$"
)

_USERNAME_VARIABLE = "MLPROJECTS_GIT_USERNAME"
_TOKEN_VARIABLE = "MLPROJECTS_GIT_TOKEN"  # noqa: S105 - the name of a variable


@dataclass(frozen=True)
class GitCredentials:
    """Credentials for the repositories of some hosts.

    Attributes:
        username: The user name for the token; hosting services mostly take any, so None is sent as ``git``.
        token: A password or access token for ``https://`` and ``http://``.
        ssh_private_key: An unencrypted private key in OpenSSH's or PEM format for ``ssh://``.
        known_hosts: Lines of a ``known_hosts`` file for ``ssh://``; None uses the user's own.
        hosts: The hosts they are for, as ``host_origins`` takes them; empty for the origin of the project's own URL only.
    """

    username: str | None = None
    token: str | None = field(default=None, repr=False)
    ssh_private_key: str | None = field(default=None, repr=False)
    known_hosts: str | None = None
    hosts: tuple[str, ...] = ()

    def fit(self, url: GitUrl, project: GitUrl) -> bool:
        """Returns whether they may be sent to a repository: the one of a project's URL, or a submodule of it."""
        if not self.hosts:
            return url.origin == project.origin
        return any(url.origin in host_origins(host) for host in self.hosts)


def host_origins(text: str) -> tuple[str, ...]:
    """Returns the origins that a host stands for; none if it is malformed or has a path.

    ``github.com`` stands for https and ssh on their own ports, ``git.example.com:8443`` for https and ssh on that port; any
    other scheme must be written: ``http://git.internal:3000``.
    """
    scheme, separator, rest = text.strip().lower().rstrip("/").rpartition("://")
    if "/" in rest:
        return ()
    schemes = (scheme,) if separator else ("https", "ssh")
    return tuple(filter(None, (_origin(f"{each}://{rest}") for each in schemes)))


def _origin(url: str) -> str:
    """Returns the ``scheme://host:port`` of a URL; empty if it is malformed or has no host."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return ""
    return f"{parts.scheme}://{host}:{port}" if host and port else ""


class GitCredentialsLookup(Protocol):
    """Finds credentials for a repository. `find_credentials` decides whether they are used."""

    def __call__(self, url: GitUrl) -> GitCredentials | None:
        """Returns the credentials for a repository on a host, or None without any."""


def find_credentials(lookup: GitCredentialsLookup | None, url: GitUrl, project: GitUrl) -> GitCredentials | None:
    """Returns the credentials that may be sent to a repository: the one of a project's URL, or a submodule of it.

    User name and password of the URL come first. Whoever writes to the project's repository chooses its submodules' hosts, so that
    credentials go to the hosts that they list only.
    """
    if url.credentials is not None and url.credentials.token is not None:
        return url.credentials
    found = lookup(url) if lookup is not None and url.scheme != "file" else None
    return found if found is not None and found.fit(url, project) else url.credentials


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
        if credentials.token is not None:
            variables, settings = credential_settings(origin, credentials.username or "git", credentials.token)
        elif credentials.username is not None:
            settings.append((f"credential.{origin}.username", credentials.username))
    with ExitStack() as stack:
        if credentials.ssh_private_key is not None:
            variables["GIT_SSH_COMMAND"] = _ssh_command(credentials, stack.enter_context(private_folder()))
        yield variables, settings


@contextmanager
def secret_transport(url: GitUrl, path: str) -> Iterator[tuple[dict[str, str], list[tuple[str, str]]]]:
    """Yields variables and configuration with which git fetches a secret URL and no command line has it.

    Git passes a URL to its programs as an argument, unless a transport of its user's starts them (gitremote-helpers(7)).
    """
    with private_folder() as folder:
        program = folder / f"git-remote-{_TRANSPORT}"
        write_private(program, f"#!/bin/sh\nexec git remote-{url.scheme} {_TRANSPORT}\n")
        program.chmod(0o700)
        allowed = ":".join((*GIT_SCHEMES, _TRANSPORT))
        variables = {"PATH": f"{folder}:{path}", "GIT_ALLOW_PROTOCOL": allowed}
        yield variables, [(f"remote.{_TRANSPORT}.url", url.url)]


def credential_settings(
    origin: str, username: str, token: str, number: int = 0
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Returns variables and configuration that make git use a token for one ``scheme://host[:port]``; each needs its number."""
    name, secret = (f"{each}{number or ''}" for each in (_USERNAME_VARIABLE, _TOKEN_VARIABLE))
    # git runs this with /bin/sh and asks it for "get"; the secret itself is in the environment only.
    helper = f'!f() {{ test "$1" = get && printf "username=%s\\npassword=%s\\n" "${name}" "${secret}"; }}; f'
    # The empty helper resets those configured before: they would be asked first, and be told the token.
    keys = (("username", username), ("helper", ""), ("helper", helper))
    return {name: username, secret: token}, [(f"credential.{origin}.{key}", value) for key, value in keys]


def _ssh_command(credentials: GitCredentials, folder: Path) -> str:
    command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30", "-o", "IdentitiesOnly=yes"]
    write_private(key := folder / "key", f"{(credentials.ssh_private_key or '').strip()}\n")
    command += ["-i", str(key)]
    if credentials.known_hosts is not None:
        write_private(hosts := folder / "known_hosts", f"{credentials.known_hosts.strip()}\n")
        command += ["-o", f"UserKnownHostsFile={hosts}", "-o", "StrictHostKeyChecking=yes"]
    return shlex.join(command)


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
    def written(self) -> str:
        """The address as written: ``host:path`` is relative to the user's home there, and ``insteadOf`` matches it."""
        return self.scp or self.url

    @property
    def is_secret(self) -> bool:
        """Whether the query holds a secret, such as ``?access_token=…``."""
        return self.scheme in ("http", "https") and holds_secret(self.url)

    @property
    def address(self) -> str:
        """The argument for git, which other users see: for a secret URL, that of the transport in ``secret_transport``."""
        return f"{_TRANSPORT}::url" if self.is_secret else self.written

    @property
    def scheme(self) -> str:
        """The transport: one of ``GIT_SCHEMES``."""
        return urlsplit(self.url).scheme

    @property
    def host(self) -> str:
        """The host with the URL's port, in lower case; empty for a local repository."""
        return urlsplit(self.url).netloc.rpartition("@")[2].lower()

    @property
    def origin(self) -> str:
        """The ``scheme://host:port`` that credentials are for; empty for a local repository."""
        return _origin(self.url)


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
        credentials = GitCredentials(user, token, hosts=(f"{scheme}://{netloc}",))
    return GitUrl(urlunsplit((scheme, netloc, parts.path, parts.query, "")), credentials)


def with_url_credentials(lookup: GitCredentialsLookup, uri: str) -> GitCredentialsLookup:
    """Returns a lookup that answers for the origin of a project's URI with the URI's user name and password.

    Raises:
        FetchError: The URI is malformed.
    """
    address = parse_git_url(uri.partition("#")[0])
    if address is None or address.credentials is None or address.credentials.token is None:
        return lookup
    own = address.credentials
    return lambda url: own if own.fit(url, address) else lookup(url)


def resolve_submodule_url(parent: GitUrl, text: str, *, local_paths: bool) -> GitUrl | None:
    """Parses a submodule's URL, which may be relative to its parent's (gitmodules(5)); None if it is not allowed.

    A remote repository can't have one on this machine; absolute paths are allowed if `local_paths`.

    Raises:
        FetchError: A part is missing or could be taken for an option.
    """
    if text.startswith("/"):
        return GitUrl(Path(text).as_uri()) if local_paths and parent.scheme == "file" else None
    if not text.startswith(("./", "../")):
        url = parse_git_url(text)
        return url if url is None or url.scheme != "file" or parent.scheme == "file" else None
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
