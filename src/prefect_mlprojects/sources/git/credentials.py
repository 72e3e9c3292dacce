"""Credentials for private repositories, passed to git by its own configuration, for one host only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_USERNAME_VARIABLE = "MLPROJECTS_GIT_USERNAME"
_TOKEN_VARIABLE = "MLPROJECTS_GIT_TOKEN"  # noqa: S105 - the name of a variable
# git runs this with /bin/sh and asks it for "get"; the secret itself stands in the environment only.
_HELPER = f'!f() {{ test "$1" = get && printf "username=%s\\npassword=%s\\n" "${_USERNAME_VARIABLE}" "${_TOKEN_VARIABLE}"; }}; f'


@dataclass(frozen=True)
class GitCredentials:
    """How to get into the repositories of some hosts.

    Attributes:
        username: The user name that goes with the token; hosting services mostly take any, so None stands for ``git``.
        token: A password or access token for ``https://`` and ``http://``; None for none.
        ssh_private_key: A private key in OpenSSH's or PEM format, unencrypted, for ``ssh://``; None for none.
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
        """Returns the credentials for a repository, or None when there are none.

        Args:
            url: The repository's URL, without user name and password.
            host: Its host, with the port if the URL names one, in lower case.
        """


@contextmanager
def git_settings(
    credentials: GitCredentials | None, origin: str
) -> Iterator[tuple[dict[str, str], list[tuple[str, str]]]]:
    """Makes git use credentials for one origin, and no other: not for where it is redirected to, nor for a submodule.

    Args:
        credentials: The credentials; None leaves git to its own credential helpers and the SSH agent.
        origin: ``scheme://host[:port]`` of the repository.

    Yields:
        Variables for git's environment, and settings for its configuration. A key file lives as long as the context.
    """
    variables: dict[str, str] = {}
    settings: list[tuple[str, str]] = []
    if credentials is None:
        yield variables, settings
        return
    if origin.startswith(("http://", "https://")):
        username = credentials.username or ("git" if credentials.token is not None else None)
        if username is not None:
            settings.append((f"credential.{origin}.username", username))
        if credentials.token is not None:
            # The empty helper forgets those configured before: theirs would be asked first, and be told the token.
            settings += [(f"credential.{origin}.helper", ""), (f"credential.{origin}.helper", _HELPER)]
            variables |= {_USERNAME_VARIABLE: username or "git", _TOKEN_VARIABLE: credentials.token}
    if credentials.ssh_private_key is None:
        yield variables, settings
        return
    with tempfile.TemporaryDirectory(prefix="mlprojects-ssh-") as folder:
        variables["GIT_SSH_COMMAND"] = _ssh_command(credentials, Path(folder))
        yield variables, settings


def _ssh_command(credentials: GitCredentials, folder: Path) -> str:
    import shlex

    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30", "-o", "IdentitiesOnly=yes"]
    words += ["-i", str(_private_file(folder / "key", f"{(credentials.ssh_private_key or '').strip()}\n"))]
    if credentials.known_hosts is not None:
        hosts = _private_file(folder / "known_hosts", f"{credentials.known_hosts.strip()}\n")
        words += ["-o", f"UserKnownHostsFile={hosts}", "-o", "StrictHostKeyChecking=yes"]
    return shlex.join(words)


def _private_file(path: Path, text: str) -> Path:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    return path
