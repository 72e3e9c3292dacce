"""Runs the ``git`` program: without prompts, hooks or other surprises, and with a run's credentials."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prefect_mlprojects._support.process.run import run_tool
from prefect_mlprojects._support.progress import report_progress
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import MASK
from prefect_mlprojects.exceptions import SourceUnavailableError
from prefect_mlprojects.settings import trusted_sources
from prefect_mlprojects.sources.git import GIT_SCHEMES, GitCredentials, GitUrl, git_settings, secret_transport
from prefect_mlprojects.types import StopSignal

# A git hook or a wrapper may have set these for another repository than the project's.
_REPOSITORY_VARIABLE = re.compile(
    "GIT_(DIR|WORK_TREE|INDEX_FILE|COMMON_DIR|OBJECT_DIRECTORY|ALTERNATE_OBJECT_DIRECTORIES|NAMESPACE|PREFIX)"
)


def variables_for_git() -> dict[str, str]:
    """Returns this process's environment without variables that name a repository, for messages in English."""
    return {name: value for name, value in os.environ.items() if not _REPOSITORY_VARIABLE.fullmatch(name)} | {
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
    }


_SETTINGS: tuple[tuple[str, str], ...] = (
    ("core.hooksPath", os.devnull),
    ("core.fsmonitor", "false"),
    # Objects that runs use may look unreferenced to git; the cache is never cleaned behind their backs.
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
    # A dead connection is noticed after two minutes without a byte.
    ("http.lowSpeedLimit", "1"),
    ("http.lowSpeedTime", "120"),
)

_PROGRESS = re.compile(r"(remote: )?(?P<phase>[A-Z][a-z]+ [a-z]+): +((?P<percent>\d+)% )?\(?\d+")
"""A line of ``git --progress``, such as ``Receiving objects:  42% (21/50), 1.00 MiB | 2.00 MiB/s``."""


@dataclass(frozen=True)
class GitAnswer:
    """Git's exit code and its output: the lines of stdout and stderr together, with secrets masked."""

    exit_code: int
    lines: tuple[str, ...]

    @property
    def succeeded(self) -> bool:
        """Whether the exit code is 0."""
        return self.exit_code == 0

    @property
    def text(self) -> str:
        """The output as one text."""
        return "\n".join(self.lines)


@dataclass(frozen=True)
class GitProgram:
    """Git with the environment for one repository, whose credentials, `secrets`, are masked; created by ``use_git``."""

    variables: Mapping[str, str] = field(repr=False)
    stop: StopSignal
    shown: str
    secrets: tuple[str, ...] = field(default=(), repr=False)
    login: str = "own"  # a digest of the credentials; those that git itself finds are this user's own

    def run(
        self, *arguments: str, folder: Path | None = None, report: Callable[[str], None] | None = None
    ) -> GitAnswer:
        """Runs git in a folder until it exits, by default in none; `report` receives each line of output, with secrets masked.

        A user's values among `arguments` must come after ``--`` or be checked.

        Raises:
            FetchError: Git is not installed, or a stop was requested.
        """
        lines: list[str] = []

        def take(line: str) -> None:
            if progress := _PROGRESS.match(line):
                # The other phases are short.
                if progress["phase"] == "Receiving objects":
                    report_progress(f"fetching {self.shown}", float(progress["percent"]), 100)
                return
            for secret in self.secrets:
                line = line.replace(secret, MASK)
            lines.append(redact(line))
            if report is not None:
                report(lines[-1])

        try:
            # In the working directory, git would use the configuration of a repository there: its credential helper, its ssh.
            folder = folder or Path("/")
            result = run_tool(["git", *arguments], cwd=folder, env=self.variables, report=take, stop=self.stop)
        except FileNotFoundError:
            raise SourceUnavailableError(
                "The program git was not found; projects in git repositories need it. Install it (apt install git, "
                "brew install git).",
                uri=self.shown,
            ) from None
        if self.stop.requested:
            raise SourceUnavailableError(
                f"The fetch of {self.shown!r} was stopped: {self.stop.reason}.", uri=self.shown
            )
        return GitAnswer(result.exit_code, tuple(lines))


@contextmanager
def use_git(url: GitUrl, credentials: GitCredentials | None, stop: StopSignal, shown: str) -> Iterator[GitProgram]:
    """Yields a git that has the credentials of one repository and never prompts, neither in the terminal nor by a window.

    The user's own configuration, credential helpers and SSH agent work as usual; they are the only credentials if None.
    """
    variables = variables_for_git() | {
        # In place of programs that ask by a window, one that fails at once.
        "GIT_ASKPASS": "false",
        "SSH_ASKPASS": "false",
        "SSH_ASKPASS_REQUIRE": "never",
        "GCM_INTERACTIVE": "never",
        "GIT_ALLOW_PROTOCOL": ":".join(GIT_SCHEMES),
        # Large files are fetched in a separate step, with the same credentials.
        "GIT_LFS_SKIP_SMUDGE": "1",
    }
    if "GIT_SSH_COMMAND" not in variables and "GIT_SSH" not in variables:
        variables["GIT_SSH_COMMAND"] = "ssh -o BatchMode=yes -o ConnectTimeout=30"
    with ExitStack() as stack:
        more, settings = stack.enter_context(git_settings(credentials, f"{url.scheme}://{url.host}"))
        variables |= more
        if url.is_secret:
            more, settings_of_url = stack.enter_context(secret_transport(url, variables.get("PATH", os.defpath)))
            variables |= more
            settings = [*settings, *settings_of_url]
        # Elsewhere than at the trusted address, see CachedRepository.
        redirects = [("http.followRedirects", "false")] if trusted_sources() else []
        configure(variables, [*_SETTINGS, *redirects, *settings])
        yield GitProgram(variables, stop, shown, _secrets(credentials), _login(credentials))


def _login(credentials: GitCredentials | None) -> str:
    if credentials is None:
        return "own"
    data = "\0".join(filter(None, (credentials.username, credentials.token, credentials.ssh_private_key))).encode()
    return hashlib.scrypt(data, salt=b"mlprojects", n=2**14, r=8, p=1, dklen=16).hex()


def _secrets(credentials: GitCredentials | None) -> tuple[str, ...]:
    if credentials is None:
        return ()
    # A lone user name of a URL may be a token.
    secret = credentials.token or (credentials.username if credentials.ssh_private_key is None else None)
    return (secret,) if secret else ()


def configure(variables: dict[str, str], settings: Sequence[tuple[str, str]]) -> None:
    """Appends settings to git's configuration in the environment (git-config(1), GIT_CONFIG_COUNT)."""
    value = variables.get("GIT_CONFIG_COUNT", "")
    count = int(value) if value.isdecimal() else 0
    for number, (key, setting) in enumerate(settings, count):
        variables[f"GIT_CONFIG_KEY_{number}"] = key
        variables[f"GIT_CONFIG_VALUE_{number}"] = setting
    variables["GIT_CONFIG_COUNT"] = str(count + len(settings))


# Parts of git's messages in lower case, in the order of their precedence.
_SIGNS: Mapping[str, str] = {
    "host-key": "host key verification failed|no ed25519 host key is known|remote host identification has changed",
    "authentication": "authentication failed|could not read username|could not read password|permission denied (|"
    "the requested url returned error: 401|the requested url returned error: 403|invalid username or password|access denied",
    "redirected": "the requested url returned error: 30|unable to update url base from redirection",
    "disk": "no space left|read-only file system",
    "unreachable": "could not resolve host|couldn't connect to server|connection refused|connection timed out|"
    "network is unreachable|no route to host|operation too slow|unable to look up|connection reset|"
    "the remote end hung up|early eof|failed to connect|unable to connect",
    "unknown-commit": "not our ref|unadvertised object|couldn't find remote ref|no such remote ref|"
    "did not send all necessary objects|shallow capabilities|server does not support shallow",
    "missing": "repository not found|does not appear to be a git repository|the requested url returned error: 404|"
    "' not found|no such file or directory|does not exist",
    "broken-cache": "not a git repository: '|bad object|object file|is corrupt|packfile|inflate:|unresolved deltas|"
    "loose object|unable to read tree|missing blob|bad config line",
}


@dataclass(frozen=True)
class GitFailure:
    """Why git failed: a cause (a key of ``_SIGNS``, ``ownership`` or ``other``), git's own sentence, and advice or ""."""

    cause: str
    text: str
    advice: str = ""


def explain_failure(output: str, *, scheme: str, host: str) -> GitFailure:
    """Finds the cause of a failure in git's English output; `scheme` and `host` are the repository's."""
    lines = [line for line in output.splitlines() if line.strip()]
    messages = [line for line in lines if line.lower().startswith(("fatal:", "error:", "remote:"))]
    text = (messages or lines or ["git printed nothing"])[0].strip()
    if advice := allow_owner(output):
        return GitFailure("ownership", next(line for line in lines if "dubious ownership" in line), advice)
    low = output.lower()
    for cause, alternatives in _SIGNS.items():
        signs = alternatives.split("|")
        if any(sign in low for sign in signs):
            found = (line.strip() for sign in signs for line in lines if sign in line.lower())
            return GitFailure(cause, text if cause == "host-key" else next(found, text), _advice(cause, scheme, host))
    return GitFailure("other", text)


def allow_owner(output: str) -> str:
    """Returns how to allow a repository of another user (git-config(1), safe.directory); empty if git refused none."""
    refused = re.search(r"dubious ownership in repository at '(.*)'", output)
    if refused is None:
        return ""
    return f"If you trust its owner, run `git config --global --add safe.directory {shlex.quote(refused[1])}`."


def _advice(cause: str, scheme: str, host: str) -> str:
    if cause == "authentication" and scheme == "ssh":
        cause = "ssh"
    advice = {
        "host-key": f"Add the host's key to known_hosts (ssh-keyscan {host}), once you have checked it.",
        "ssh": f"Load a key that {host} knows into the SSH agent (ssh-add), or keep one in a git-credentials block for "
        "that host.",
        "authentication": f"Keep a user name and token in a git-credentials block for the host {host}, or configure a "
        "credential helper of git (git config --global credential.helper …). Nobody is asked for a password while a project "
        "runs.",
        "redirected": "Name the address that it redirects to, since only trusted sources may run here.",
        "disk": "Free some disk space.",
        "unreachable": f"Is {host or 'the host'} right, and can it be reached from here?",
        "missing": "Check the URL; services also say so of a private repository without credentials.",
    }
    return advice.get(cause, "")
