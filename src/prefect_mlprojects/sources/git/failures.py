"""Why git failed, and what to do: a pure function of what it printed."""

from __future__ import annotations

from dataclasses import dataclass

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
        cause: ``authentication``, ``host-key``, ``missing``, ``unreachable``, ``unknown-commit``, ``broken-cache``,
            ``disk`` or ``other``.
        text: The sentence of git's that says it.
        advice: What to do; empty when there is nothing to say.
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


def _line(lines: list[str], signs: tuple[str, ...], default: str) -> str:
    return next((line.strip() for sign in signs for line in lines if sign in line.lower()), default)


def _how_to_authenticate(scheme: str, host: str) -> str:
    if scheme == "ssh":
        return f"Load a key that {host} knows into the SSH agent (ssh-add), or keep one in a git-credentials block for that host."
    return (
        f"Keep a user name and token in a git-credentials block for the host {host}, or configure a credential helper of git "
        "(git config --global credential.helper …). Nobody is asked for a password while a project runs."
    )
