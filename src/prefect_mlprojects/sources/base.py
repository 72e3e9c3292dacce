"""What a source is: the place a project comes from, and the working copy that a run gets of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from prefect_mlprojects.types import StopSignal

SourceKind: TypeAlias = Literal["local", "git", "zip"]
"""Where projects come from."""


@dataclass(frozen=True)
class WorkingCopy:
    """A project's files on this machine, and which version of them it is.

    Attributes:
        directory: The project's folder with the ``#subdirectory`` applied, absolute.
        uri: What was asked for, with any password in it masked.
        kind: Where it came from.
        source_name: What MLflow shows as the run's source (``mlflow.source.name``), passwords masked: for a folder
            inside a git repository ``file://<repository>#<subdirectory>``, as MLflow writes it.
        commit: The full SHA of the commit that is checked out, when the files are under git's control.
        branch: The branch that is checked out; None when no branch is, or outside git.
        repository_url: The URL of the repository's first remote, passwords masked; None without one.
        dirty: Whether tracked files differ from ``commit``; untracked ones do not count.
        temporary: Whether the copy belongs to one run and is to be removed when the run has ended.
    """

    directory: Path
    uri: str
    kind: SourceKind
    source_name: str
    commit: str | None = None
    branch: str | None = None
    repository_url: str | None = None
    dirty: bool = False
    temporary: bool = False


class Source(Protocol):
    """A place that a project comes from, as ``detect_source`` recognised it."""

    @property
    def kind(self) -> SourceKind:
        """Where it is."""

    @property
    def uri(self) -> str:
        """What was asked for, with any password in it masked."""

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Makes the working copy; a fetch that fails or is stopped leaves nothing behind.

        Args:
            stop: Asks for the end.
            report: Takes lines about the progress, from any thread.

        Raises:
            FetchError: It could not be fetched, or was stopped.
        """

    def remove(self, copy: WorkingCopy) -> None:
        """Removes a temporary copy that this source made; for any other, and when called again, it does nothing."""


def describe_working_copy(copy: WorkingCopy) -> str:
    """Says where a working copy comes from and which version it is, for people to read."""
    version = f" at {copy.commit[:12]}" if copy.commit else ""
    version += f" ({copy.branch})" if copy.branch and copy.kind == "git" else ""
    place = copy.source_name if copy.kind != "local" else copy.directory
    return f"{place}{version}{' (with uncommitted changes)' if copy.dirty else ''}"
