"""What a repository is: commit, branch, remote, uncommitted changes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_mlprojects._support.process.run import run_process
from prefect_mlprojects._support.redaction import redact, strip_user_info
from prefect_mlprojects.sources.git.program import REPOSITORY_VARIABLES, allow_owner
from prefect_mlprojects.types import StopSignal, StreamName

if TYPE_CHECKING:
    from git import Repo

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


def read_git_facts(folder: Path, report: Callable[[str], None]) -> GitFacts | None:
    """Returns what git knows of an existing folder, given by its absolute path; None if it is in no working tree.

    `report` takes a line if git can't be asked, or refuses. The run is then recorded without its commit.
    """
    top = next((place for place in (folder, *folder.parents) if (place / ".git").exists()), None)
    if top is None:
        return None
    below = folder.relative_to(top).as_posix()
    source_name = f"file://{top}" if below == "." else f"file://{top}#{below}"
    if shutil.which("git") is None:
        # GitPython can't even be imported then.
        report(f"{top} is a git repository, but the program git was not found; the run is recorded without its commit.")
        return GitFacts(source_name)
    from git import Repo
    from git.exc import GitError

    try:
        with Repo(top) as repository, repository.git.custom_environment(**_git_environment()):
            return _read(repository, folder, source_name)
    except (GitError, OSError, ValueError) as error:
        message = _first_line(error)
        if "not a git repository" in message or type(error).__name__ == "InvalidGitRepositoryError":
            return None
        advice = allow_owner(str(error))
        report(
            f"The run is recorded without its commit, since git can't read {folder}: {redact(message)}. {advice}".rstrip()
        )
        return GitFacts(source_name)


def _read(repository: Repo, folder: Path, source_name: str) -> GitFacts:
    # The first command: git refuses a repository of another user here. `Repo.is_dirty` runs `git diff`, which may write the
    # index. Renames and untracked files are left out: they cost most, and neither changes the answer.
    changes = repository.git.status("--porcelain", "--untracked-files=no", "--no-renames")
    dirty = bool(changes)
    commit = repository.head.commit.hexsha if repository.head.is_valid() else None
    branch = None if repository.head.is_detached else repository.active_branch.name
    if commit is not None and folder != Path(str(repository.working_dir)) and repository.ignored(str(folder)):
        commit, dirty = None, False
    url = repository.remotes[0].url if repository.remotes else ""
    return GitFacts(source_name, commit, branch, strip_user_info(url) or None, dirty)


def _first_line(error: Exception) -> str:
    """Returns git's own first words: GitPython puts the command around them."""
    text = str(getattr(error, "stderr", "") or error)
    match = re.search(r"(?:fatal|error): .*", text)
    return (match[0] if match else text.strip().splitlines()[0] if text.strip() else type(error).__name__).rstrip("'")


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


def _git_environment() -> dict[str, str]:
    # Reading must not write the index (a run may not touch the checkout), and messages are matched in English.
    return {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in REPOSITORY_VARIABLES} | _git_environment()
