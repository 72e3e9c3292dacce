"""What git knows of a folder, asked from the ``git`` program: importing GitPython takes longer than all the answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect_mlprojects._support.process.run import run_process, run_tool
from prefect_mlprojects._support.redaction import redact, strip_user_info
from prefect_mlprojects.sources.git.program import REPOSITORY_VARIABLES
from prefect_mlprojects.types import StopSignal, StreamName

MAX_PATCH_BYTES = 10_000_000
"""How large a patch is worth keeping with a run."""


@dataclass(frozen=True)
class GitFacts:
    """What git says of a folder inside a working tree.

    Attributes:
        source_name: ``file://<top of the working tree>#<folder below it>``, as MLflow names such a source.
        commit: The full SHA of the checked-out commit; None before the first one, when the folder is ignored by git, or
            when git refused to tell.
        branch: The checked-out branch; None when HEAD is detached.
        repository_url: The URL of the first remote, without user name and password; None without a remote.
        dirty: Whether tracked files differ from ``commit``; untracked files do not count, since every run leaves some.
    """

    source_name: str
    commit: str | None = None
    branch: str | None = None
    repository_url: str | None = None
    dirty: bool = False


def read_git_facts(folder: Path, report: Callable[[str], None], stop: StopSignal) -> GitFacts | None:
    """Asks git about a folder.

    Args:
        folder: An absolute path of a folder that exists.
        report: Takes a line when git can't be asked, or refuses.
        stop: Ends a git that takes long.

    Returns:
        What git says, or None when the folder is in no working tree.
    """
    top = next((place for place in (folder, *folder.parents) if (place / ".git").exists()), None)
    if top is None:
        return None
    below = folder.relative_to(top).as_posix()
    source_name = f"file://{top}" if below == "." else f"file://{top}#{below}"
    # Rename detection and untracked files are left out: they cost most, and neither changes the answer.
    status = _git(folder, ["status", "--porcelain=v2", "--branch", "--untracked-files=no", "--no-renames"], stop)
    if status is None:
        report(f"{top} is a git repository, but the program git was not found; the run is recorded without its commit.")
        return GitFacts(source_name)
    if status.exit_code != 0:
        message = status.lines[0] if status.lines else f"exit code {status.exit_code}"
        if "not a git repository" in message:
            return None
        report(f"git can't tell about {folder}, so the run is recorded without its commit: {redact(message)}")
        return GitFacts(source_name)
    commit, branch, dirty = _parse_status(status.lines)
    if below != "." and commit is not None and _is_ignored(folder, stop):
        commit, dirty = None, False
    return GitFacts(source_name, commit, branch, _first_remote(folder, stop), dirty)


def read_uncommitted_changes(folder: Path, stop: StopSignal) -> str | None:
    """Returns how the tracked files of a checkout differ from its commit, as a patch that ``git apply`` takes.

    Returns:
        The patch; None when git can't tell, or when it is larger than ``MAX_PATCH_BYTES``.
    """
    pieces: list[bytes] = []
    command = ["git", "diff", "--binary", "--no-ext-diff", "--no-color", "HEAD", "--", ":/"]

    def take(stream: StreamName, data: bytes) -> None:
        # Byte for byte: lines of a patch may end in any way.
        if stream == "stdout":
            pieces.append(data)

    try:
        result = run_process(command, cwd=folder, env=_variables(), write=take, stop=stop)
    except FileNotFoundError:
        return None
    patch = b"".join(pieces)
    if result.return_code != 0 or not patch or len(patch) > MAX_PATCH_BYTES:
        return None
    return patch.decode("utf-8", "replace")


@dataclass(frozen=True)
class _Answer:
    exit_code: int
    lines: tuple[str, ...]


def _git(folder: Path, arguments: Sequence[str], stop: StopSignal) -> _Answer | None:
    """Runs git in a folder; None when there is no git."""
    lines: list[str] = []
    try:
        result = run_tool(["git", *arguments], cwd=folder, env=_variables(), report=lines.append, stop=stop)
    except FileNotFoundError:
        return None
    return _Answer(result.exit_code, tuple(lines))


def _variables() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in REPOSITORY_VARIABLES}
    # Reading must not write the index (a run may not touch the checkout), and messages are matched in English.
    return variables | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}


def _parse_status(lines: Sequence[str]) -> tuple[str | None, str | None, bool]:
    """Reads ``git status --porcelain=v2 --branch`` (format: the manual page git-status)."""
    commit = branch = None
    dirty = False
    for line in lines:
        if line.startswith("# branch.oid "):
            oid = line.removeprefix("# branch.oid ").strip()
            commit = None if oid == "(initial)" else oid
        elif line.startswith("# branch.head "):
            head = line.removeprefix("# branch.head ").strip()
            branch = None if head == "(detached)" else head
        elif line[:2] in ("1 ", "2 ", "u "):
            dirty = True
    return commit, branch, dirty


def _is_ignored(folder: Path, stop: StopSignal) -> bool:
    answer = _git(folder, ["check-ignore", "--quiet", "."], stop)
    return answer is not None and answer.exit_code == 0


def _first_remote(folder: Path, stop: StopSignal) -> str | None:
    answer = _git(folder, ["config", "--local", "--get-regexp", r"^remote\..*\.url$"], stop)
    if answer is None or answer.exit_code != 0 or not answer.lines:
        return None
    return strip_user_info(answer.lines[0].partition(" ")[2].strip()) or None
