"""What git knows of a local folder. Reading it runs no program that the folder names.

A repository's own configuration and attributes can name programs: a file-system monitor, filters, text conversions, hooks, an
ssh command for missing objects. Git gets settings by its environment here, which take precedence, and no transport.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefect_mlprojects._support.process.run import run_process
from prefect_mlprojects._support.redaction import redact, strip_user_info
from prefect_mlprojects.sources.git.program import allow_owner, configure, variables_for_git
from prefect_mlprojects.types import StopSignal, StreamName

_MAX_PATCH_BYTES = 10_000_000
_SECONDS = 120.0  # a file of the folder may be a pipe that never ends

_VARIABLES = {
    "GIT_OPTIONAL_LOCKS": "0",  # a run may not touch the checkout, not even its index
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",  # before git 2.44, which has the line above, nothing else prevents a fetch
    "GIT_PAGER": "cat",
}
_SETTINGS = (
    ("safe.bareRepository", "explicit"),
    ("core.fsmonitor", "false"),
    ("core.hooksPath", os.devnull),
    ("core.sshCommand", "false"),
    ("diff.external", ""),
)
# Without them, submodules would be read with their own configuration; and missing objects of history are not needed.
_STATUS = ("status", "--porcelain=v2", "-z", "--branch", "--no-ahead-behind", "--untracked-files=no", "--no-renames")
_IGNORE = "--ignore-submodules=dirty"
_DIFF = ("diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--submodule=short")
_PREFIXES = ("--src-prefix=a/", "--dst-prefix=b/")


@dataclass(frozen=True)
class GitFacts:
    """The fields of a `WorkingCopy` that git knows for a folder inside a working tree.

    There is no commit before the first one, or if git ignores the folder or refused, and no branch for a detached HEAD.
    """

    source_name: str
    commit: str | None = None
    branch: str | None = None
    repository_url: str | None = None
    dirty: bool = False


class _RefusedError(Exception):
    """Raised with git's message when it fails."""


@dataclass
class _Reader:
    """Runs git on the repository of a folder."""

    top: Path
    stop: StopSignal | None = None
    _settings: list[tuple[str, str]] = field(default_factory=lambda: list(_SETTINGS))

    def disable_filters(self) -> None:
        """Turns off all filters, which git can't do by one setting; reading the configuration itself runs nothing."""
        listed = self.run("config", "--null", "--name-only", "--get-regexp", r"^filter\.", ok=(0, 1))
        names = {key.removeprefix("filter.").rpartition(".")[0] for key in _texts(listed)}
        for name in sorted(names):
            # An empty process also makes git ignore the commands.
            self._settings += [(f"filter.{name}.{key}", "") for key in ("process", "clean", "smudge")]
            self._settings.append((f"filter.{name}.required", "false"))

    def run(self, *arguments: str, ok: Sequence[int] = (0,)) -> bytes:
        """Returns git's stdout; raises `_RefusedError`, or `FileNotFoundError` without git."""
        output: dict[StreamName, list[bytes]] = {"stdout": [], "stderr": []}
        # Only the folder's own repository: an invalid one is not looked for further up.
        variables = {**variables_for_git(), **_VARIABLES, "GIT_CEILING_DIRECTORIES": str(self.top.parent)}
        configure(variables, self._settings)
        result = run_process(
            ["git", *arguments],
            cwd=self.top,
            env=variables,
            write=lambda stream, data: output[stream].append(data),
            stop=self.stop,
            timeout=_SECONDS,
        )
        if result.ending != "exited" or result.return_code not in ok:
            text = b"".join(output["stderr"]).decode("utf-8", "replace")
            raise _RefusedError(text or f"git {arguments[0]} did not end in time")
        return b"".join(output["stdout"])


def find_repository(folder: Path) -> Path | None:
    """Returns the nearest folder at or above an absolute one that has an entry ``.git``."""
    return next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)


def read_git_facts(folder: Path, report: Callable[[str], None]) -> GitFacts | None:
    """Returns what git knows of an existing folder, given by its absolute path; None outside of a working tree.

    If git is missing or refuses, the reason is reported and the facts have no commit.
    """
    top = find_repository(folder)
    if top is None:
        return None
    below = folder.relative_to(top).as_posix()
    source_name = f"file://{top}" if below == "." else f"file://{top}#{below}"
    if shutil.which("git") is None:
        report(f"{top} is a git repository, but the program git was not found; the run is recorded without its commit.")
        return GitFacts(source_name)
    try:
        return _read(_Reader(top), folder, source_name)
    except (_RefusedError, OSError) as error:
        text = str(error)
        if "not a git repository" in text:
            return None
        reason = f"{redact(_first_line(text))}. {allow_owner(text)}".rstrip()
        report(f"The run is recorded without its commit, since git can't read {folder}: {reason}")
        return GitFacts(source_name)


def _read(git: _Reader, folder: Path, source_name: str) -> GitFacts:
    # Git refuses a repository of another user by the first command that needs one.
    git.run("rev-parse", "--git-dir")
    git.disable_filters()
    entries = _texts(git.run(*_STATUS, _IGNORE))
    headers = dict(entry[2:].split(" ", 1) for entry in entries if entry.startswith("# "))
    oid, head = headers.get("branch.oid", ""), headers.get("branch.head", "")
    commit = None if oid.startswith("(") else oid or None
    dirty = any(not entry.startswith("# ") for entry in entries)
    if commit is not None and folder != git.top and git.run("check-ignore", "--", str(folder), ok=(0, 1)):
        commit, dirty = None, False
    urls = _texts(git.run("config", "--local", "--null", "--get-regexp", r"^remote\..*\.url$", ok=(0, 1)))
    url = strip_user_info(urls[0].partition("\n")[2]) if urls else ""
    return GitFacts(source_name, commit, None if head.startswith("(") else head or None, url or None, dirty)


def _texts(output: bytes) -> list[str]:
    return [item for item in os.fsdecode(output).split("\0") if item]


def _first_line(text: str) -> str:
    match = re.search(r"(?:fatal|error): .*", text)
    return match[0] if match else text.strip().splitlines()[0] if text.strip() else "git failed"


def read_uncommitted_changes(folder: Path, stop: StopSignal) -> str | None:
    """Returns the difference of a checkout's tracked files to its commit, as a patch for ``git apply``.

    None if git can't tell, nothing differs, the patch is too large, or the files or the commits are those of another folder.
    """
    top = find_repository(folder)
    if top is None:
        return None
    git = _Reader(top, stop)
    try:
        if not _is_own(git):
            return None
        git.disable_filters()
        patch = git.run(*_DIFF, *_PREFIXES, _IGNORE, "HEAD", "--", ":/")
    except (_RefusedError, OSError):
        return None
    return None if not patch or len(patch) > _MAX_PATCH_BYTES else patch.decode("utf-8", "replace")


def _is_own(git: _Reader) -> bool:
    """Returns whether the working tree and the commits belong together: a ``.git`` file or link may name any others."""
    tree, folder = os.fsdecode(git.run("rev-parse", "--show-toplevel", "--absolute-git-dir")).splitlines()
    top, commits = git.top.resolve(), Path(folder).resolve()
    if Path(tree).resolve() != top:
        return False
    if commits.is_relative_to(top):
        return True
    # What a linked working tree (gitrepository-layout(5), worktrees/<id>/gitdir) or a submodule's repository says of it.
    configured = os.fsdecode(git.run("config", "--local", "--get", "core.worktree", ok=(0, 1))).strip()
    linked = commits / "gitdir"
    named = (
        commits / configured / ".git" if configured else Path(linked.read_text().strip()) if linked.is_file() else None
    )
    return named is not None and named.parent.resolve() == top
