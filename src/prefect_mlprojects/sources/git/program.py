"""Runs the ``git`` program: without prompts, hooks or other surprises, and with a run's credentials.

GitPython is not used for it: it can't be stopped in the middle of a fetch, and shows the command line, and with it a password,
in its errors.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prefect_mlprojects._support.process.run import run_tool
from prefect_mlprojects._support.progress import report_progress
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import MASK
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources.git.credentials import GitCredentials, git_settings
from prefect_mlprojects.sources.git.urls import GIT_SCHEMES, GitUrl
from prefect_mlprojects.types import StopSignal

# A git hook or a wrapper may have these set for another repository than the project's.
REPOSITORY_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
)
"""Variables that would point git at another repository than the one it is run in."""

_SETTINGS: tuple[tuple[str, str], ...] = (
    ("core.hooksPath", os.devnull),
    ("core.fsmonitor", "false"),
    # What runs use may look unused to git; the cache is never cleaned behind their backs.
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
    # Packs stay packs: thousands of loose objects are slow to read.
    ("fetch.unpackLimit", "1"),
    # With version 2 a server gives any commit that it has.
    ("protocol.version", "2"),
    ("fetch.recurseSubmodules", "false"),
    ("submodule.recurse", "false"),
    ("advice.detachedHead", "false"),
    ("core.askPass", ""),
    # A connection that has died is noticed after two minutes without a byte.
    ("http.lowSpeedLimit", "1"),
    ("http.lowSpeedTime", "120"),
)


_PROGRESS = re.compile(r"(remote: )?(?P<phase>[A-Z][a-z]+ [a-z]+): +((?P<percent>\d+)% )?\(?\d+")
"""A line of ``git --progress``, such as ``Receiving objects:  42% (21/50), 1.00 MiB | 2.00 MiB/s``."""


@dataclass(frozen=True)
class GitAnswer:
    """What git said.

    Attributes:
        exit_code: Its exit code.
        lines: What it printed, stdout and stderr together, with secrets masked.
    """

    exit_code: int
    lines: tuple[str, ...]

    @property
    def succeeded(self) -> bool:
        """Whether it did what it was asked."""
        return self.exit_code == 0

    @property
    def text(self) -> str:
        """What it printed."""
        return "\n".join(self.lines)


@dataclass(frozen=True)
class GitProgram:
    """Git, ready to be run for one repository; made by ``use_git``.

    Attributes:
        variables: Its environment.
        stop: Ends it.
        shown: The project's URI for errors, passwords masked.
        secrets: Texts that are masked in what it prints.
    """

    variables: Mapping[str, str] = field(repr=False)
    stop: StopSignal
    shown: str
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def run(
        self, *arguments: str, folder: Path | None = None, report: Callable[[str], None] | None = None
    ) -> GitAnswer:
        """Runs git and waits for its end.

        Args:
            *arguments: What comes after ``git``; what a user gave must stand behind ``--`` or be checked.
            folder: Where it runs.
            report: Takes each line as it is printed, secrets masked.

        Raises:
            FetchError: There is no git, or a stop was requested.
        """
        lines: list[str] = []

        def take(line: str) -> None:
            if shown := _PROGRESS.match(line):
                # Of several phases; the one that brings the data is what takes long.
                if shown["phase"] == "Receiving objects":
                    report_progress(f"fetching {self.shown}", float(shown["percent"]), 100)
                return
            line = self._masked(line)
            lines.append(line)
            if report is not None:
                report(line)

        try:
            result = run_tool(["git", *arguments], cwd=folder, env=self.variables, report=take, stop=self.stop)
        except FileNotFoundError:
            raise FetchError(
                "The program git was not found; projects in git repositories need it. Install it (apt install git, "
                "brew install git).",
                uri=self.shown,
            ) from None
        if self.stop.requested:
            raise FetchError(f"The fetch of {self.shown!r} was stopped: {self.stop.reason}.", uri=self.shown)
        return GitAnswer(result.exit_code, tuple(lines))

    def _masked(self, line: str) -> str:
        for secret in self.secrets:
            line = line.replace(secret, MASK)
        return redact(line)


@contextmanager
def use_git(url: GitUrl, credentials: GitCredentials | None, stop: StopSignal, shown: str) -> Iterator[GitProgram]:
    """Gives a git that knows the credentials of one repository.

    It never asks anybody anything: not at the terminal, not by a window. The user's own configuration, credential helpers
    and SSH agent work as usual.

    Args:
        url: The repository.
        credentials: The credentials; None for those that git finds itself.
        stop: Ends what is under way.
        shown: The project's URI for errors, passwords masked.
    """
    variables = {name: value for name, value in os.environ.items() if name not in REPOSITORY_VARIABLES}
    variables |= {
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        # Programs that ask by a window; this one fails at once.
        "GIT_ASKPASS": "false",
        "SSH_ASKPASS": "false",
        "SSH_ASKPASS_REQUIRE": "never",
        "GCM_INTERACTIVE": "never",
        "GIT_ALLOW_PROTOCOL": ":".join(GIT_SCHEMES),
        # Large files come in a step of their own, with the same credentials.
        "GIT_LFS_SKIP_SMUDGE": "1",
    }
    if "GIT_SSH_COMMAND" not in variables and "GIT_SSH" not in variables:
        variables["GIT_SSH_COMMAND"] = "ssh -o BatchMode=yes -o ConnectTimeout=30"
    with git_settings(credentials, url.origin) as (more, settings):
        variables |= more
        _configure(variables, [*_SETTINGS, *settings])
        yield GitProgram(variables, stop, shown, _secrets(credentials))


def _secrets(credentials: GitCredentials | None) -> tuple[str, ...]:
    if credentials is None:
        return ()
    # A lone user name of a URL may be a token.
    secret = credentials.token or (credentials.username if credentials.ssh_private_key is None else None)
    return (secret,) if secret else ()


def _configure(variables: dict[str, str], settings: Sequence[tuple[str, str]]) -> None:
    """Hands settings to git by its environment (git-config(1), GIT_CONFIG_COUNT), after those that are there."""
    try:
        count = int(variables.get("GIT_CONFIG_COUNT", "0"))
    except ValueError:
        count = 0
    for number, (key, value) in enumerate(settings, count):
        variables[f"GIT_CONFIG_KEY_{number}"] = key
        variables[f"GIT_CONFIG_VALUE_{number}"] = value
    variables["GIT_CONFIG_COUNT"] = str(count + len(settings))


_AUTHENTICATION = (
    "authentication failed",
    "could not read username",
    "could not read password",
    "permission denied (",
    "the requested url returned error: 401",
    "the requested url returned error: 403",
    "invalid username or password",
    "access denied",
    "http basic: access denied",
)
_HOST_KEY = ("host key verification failed", "no ed25519 host key is known", "remote host identification has changed")
_MISSING = (
    "repository not found",
    "does not appear to be a git repository",
    "the requested url returned error: 404",
    "access denied or repository not exported",
    "' not found",
    "no such file or directory",
    "does not exist",
)
_UNREACHABLE = (
    "could not resolve host",
    "couldn't connect to server",
    "connection refused",
    "connection timed out",
    "network is unreachable",
    "no route to host",
    "operation too slow",
    "unable to look up",
    "connection reset",
    "the remote end hung up",
    "early eof",
    "failed to connect",
    "unable to connect",
)
_UNKNOWN_COMMIT = (
    "not our ref",
    "unadvertised object",
    "couldn't find remote ref",
    "no such remote ref",
    "did not send all necessary objects",
    "shallow capabilities",
    "server does not support shallow",
)
_BROKEN = (
    "not a git repository: '",
    "bad object",
    "object file",
    "is corrupt",
    "packfile",
    "inflate:",
    "unresolved deltas",
    "loose object",
    "unable to read tree",
    "missing blob",
    "bad config line",
)


@dataclass(frozen=True)
class GitFailure:
    """Why git failed.

    Attributes:
        cause: ``ownership``, ``authentication``, ``host-key``, ``missing``, ``unreachable``, ``unknown-commit``, ``broken-cache``,
            ``disk`` or ``other``.
        text: The sentence of git's that says it.
        advice: What to do; may be empty.
    """

    cause: str
    text: str
    advice: str = ""


def explain_failure(output: str, *, scheme: str, host: str) -> GitFailure:
    """Finds out from git's output why it failed.

    Args:
        output: What it printed, in English, secrets masked.
        scheme: The repository's transport.
        host: Its host.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if line.lower().startswith(("fatal:", "error:", "remote:"))]
    text = (telling or lines or ["git said nothing"])[0].strip()
    low = output.lower()
    if advice := allow_owner(output):
        return GitFailure("ownership", _line(lines, ("dubious ownership",), text), advice)
    if any(sign in low for sign in _HOST_KEY):
        return GitFailure(
            "host-key", text, f"Add the host's key to known_hosts (ssh-keyscan {host}), once you have checked it."
        )
    if any(sign in low for sign in _AUTHENTICATION):
        return GitFailure("authentication", _line(lines, _AUTHENTICATION, text), _how_to_authenticate(scheme, host))
    if "no space left" in low or "read-only file system" in low:
        return GitFailure("disk", _line(lines, ("no space left", "read-only"), text), "Free some disk space.")
    for cause, signs, advice in (
        ("unreachable", _UNREACHABLE, f"Is {host or 'the host'} right, and can it be reached from here?"),
        ("unknown-commit", _UNKNOWN_COMMIT, ""),
        ("missing", _MISSING, "Check the URL; services also say so of a private repository without credentials."),
        ("broken-cache", _BROKEN, ""),
    ):
        if any(sign in low for sign in signs):
            return GitFailure(cause, _line(lines, signs, text), advice)
    return GitFailure("other", text)


def allow_owner(output: str) -> str:
    """Returns how to allow a repository of another user (git-config(1), safe.directory); empty if git refused none."""
    refused = re.search(r"dubious ownership in repository at '(.*)'", output)
    if refused is None:
        return ""
    return f"If you trust its owner, run `git config --global --add safe.directory {shlex.quote(refused[1])}`."


def _line(lines: list[str], signs: tuple[str, ...], default: str) -> str:
    return next((line.strip() for sign in signs for line in lines if sign in line.lower()), default)


def _how_to_authenticate(scheme: str, host: str) -> str:
    if scheme == "ssh":
        return f"Load a key that {host} knows into the SSH agent (ssh-add), or keep one in a git-credentials block for that host."
    return (
        f"Keep a user name and token in a git-credentials block for the host {host}, or configure a credential helper of git "
        "(git config --global credential.helper …). Nobody is asked for a password while a project runs."
    )
