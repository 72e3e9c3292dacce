"""What git's messages mean; they are quoted from git 2.39 and from hosting services."""

from __future__ import annotations

import pytest

from prefect_mlprojects.sources.git.program import explain_failure


@pytest.mark.parametrize(
    ("output", "cause", "words"),
    [
        (
            "error: unable to read askpass response from 'false'\n"
            "fatal: could not read Username for 'https://h': terminal prompts disabled",
            "authentication",
            "git-credentials block for the host h",
        ),
        ("fatal: Authentication failed for 'https://h/o/r/'", "authentication", "git-credentials block"),
        ("git@h: Permission denied (publickey).\nfatal: Could not read from remote repository.", "authentication", ""),
        ("Host key verification failed.\nfatal: Could not read from remote repository.", "host-key", "ssh-keyscan h"),
        ("remote: Repository not found.\nfatal: repository 'https://h/o/r/' not found", "missing", "Check the URL"),
        ("fatal: '/x/y' does not appear to be a git repository", "missing", "Check the URL"),
        ("fatal: unable to access 'https://h/': Could not resolve host: h", "unreachable", "Is h right"),
        ("fatal: unable to connect to h:\nh[0: 127.0.0.1]: errno=Connection refused", "unreachable", "Is h right"),
        ("fatal: remote error: upload-pack: not our ref 0123", "unknown-commit", ""),
        ("fatal: dumb http transport does not support shallow capabilities", "unknown-commit", ""),
        ("fatal: write error: No space left on device", "disk", "Free some disk space"),
        ("fatal: loose object 0123 (stored in x) is corrupt", "broken-cache", ""),
        (
            "fatal: detected dubious ownership in repository at '/srv/a b/.git'",
            "ownership",
            "git config --global --add safe.directory '/srv/a b/.git'",
        ),
        ("", "other", ""),
    ],
)
def test_git_failure_is_classified_by_cause(output: str, cause: str, words: str) -> None:
    failure = explain_failure(output, scheme="https", host="h")

    assert failure.cause == cause
    assert words in failure.advice
    assert failure.text


def test_missing_ssh_key_suggests_ssh_add() -> None:
    failure = explain_failure("git@h: Permission denied (publickey).", scheme="ssh", host="h")

    assert "ssh-add" in failure.advice
