"""Projects in zip archives, here or behind any protocol that ``fsspec`` knows."""

from __future__ import annotations

import stat
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.settings import PREFIX, max_zip_bytes
from prefect_mlprojects.sources.base import (
    SourceKind,
    WorkingCopy,
    apply_subdirectory,
    create_run_folder,
    remove_run_folder,
)
from prefect_mlprojects.sources.downloads.download import download
from prefect_mlprojects.types import StopSignal

_MAX_MEMBERS = 200_000
_PIECE = 1 << 20


@dataclass(frozen=True)
class ZipSource:
    """A zip archive.

    Attributes:
        location: Its absolute path, or its URL.
        subdirectory: What stood after the ``#``; empty for the whole archive.
        uri: The requested URI, redacted.
    """

    location: Path | str
    subdirectory: str
    uri: str

    @property
    def kind(self) -> SourceKind:
        """Where it is: ``zip``."""
        return "zip"

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Downloads the archive when it is remote, and unpacks it into a folder of this run; see ``Source``.

        Raises:
            FetchError: It can't be had or read, it is no zip archive, what it holds would land outside of its folder or is too
                much, there is no such subdirectory, or the fetch was stopped.
        """
        if stop.requested:
            raise FetchError(f"Fetching {self.uri!r} was stopped.", uri=self.uri)
        folder = create_run_folder(self.uri)
        try:
            if isinstance(self.location, Path):
                unpack(self.location, folder, self.uri, stop)
            else:
                with tempfile.TemporaryDirectory(prefix="mlprojects-zip-", dir=folder.parent) as place:
                    file = download(self.location, Path(place), report=report, stop=stop)
                    unpack(file, folder, self.uri, stop)
            root = _project_root(folder) if not self.subdirectory else folder
            if root != folder:
                report(f"{self.uri} has all its files in the folder {root.name!r}; that is the project")
            directory = apply_subdirectory(root, self.subdirectory, self.uri)
        except BaseException:
            remove_run_folder(folder)
            raise
        name = str(self.location) if isinstance(self.location, Path) else strip_user_info(self.location)
        return WorkingCopy(
            directory=directory,
            uri=self.uri,
            kind="zip",
            source_name=f"{name}#{self.subdirectory}" if self.subdirectory else name,
            temporary=True,
        )

    def remove(self, copy: WorkingCopy) -> None:
        """Removes the folder that it was unpacked to, unless it is to be kept; see ``Source``."""
        remove_run_folder(copy.directory)


def unpack(file: Path, folder: Path, shown: str, stop: StopSignal) -> None:
    """Unpacks a zip archive; everything is checked before the first file is written.

    Args:
        file: The archive.
        folder: An empty folder.
        shown: The archive's name for messages.
        stop: Asks for the end.

    Raises:
        FetchError: It is no zip archive, broken or encrypted; a member is absolute, leads out of the folder or is a link; or it
            holds more than the setting ``PREFECT_MLPROJECTS_MAX_ZIP_BYTES`` allows.
    """
    limit = max_zip_bytes()
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, limit, shown)
            left = limit
            for member in members:
                if stop.requested:
                    raise FetchError(f"Unpacking {shown!r} was stopped: {stop.reason}.", uri=shown)
                left -= _write_member(archive, member, folder, left, shown)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise FetchError(f"{shown!r} is no zip archive that can be unpacked: {error}.", uri=shown) from None
    except RuntimeError as error:
        # Zip's way to say that a password is needed.
        raise FetchError(f"{shown!r} can't be unpacked: {error}.", uri=shown) from None
    except OSError as error:
        raise FetchError(
            f"{shown!r} can't be unpacked: {error.filename or folder}: {error.strerror or error}.", uri=shown
        ) from None


def _check_members(members: list[zipfile.ZipInfo], limit: int, shown: str) -> None:
    if len(members) > _MAX_MEMBERS:
        raise FetchError(f"{shown!r} holds {len(members)} files; at most {_MAX_MEMBERS} are unpacked.", uri=shown)
    for member in members:
        name, kind = member.filename, member.external_attr >> 16
        if (
            name.startswith(("/", "\\"))
            or "\\" in name
            or ":" in PurePosixPath(name).parts[:1]
            or ".." in name.split("/")
        ):
            raise FetchError(
                f"{shown!r} is not unpacked: its member {name!r} would land outside of its folder.", uri=shown
            )
        if kind and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_IFMT(kind) == 0):
            raise FetchError(f"{shown!r} is not unpacked: its member {name!r} is a link or a special file.", uri=shown)
    total = sum(member.file_size for member in members)
    if total > limit:
        raise _too_large(shown, total, limit)


def _write_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, left: int, shown: str) -> int:
    """Writes one member and returns how many bytes it had: the archive's own word for it may be wrong."""
    target = folder / PurePosixPath(member.filename)
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(member) as source, target.open("wb") as file:
        while piece := source.read(_PIECE):
            written += len(piece)
            if written > left:
                raise _too_large(shown, written, left)
            file.write(piece)
    if (member.external_attr >> 16) & stat.S_IXUSR:
        target.chmod(0o755)
    return written


def _too_large(shown: str, size: int, limit: int) -> FetchError:
    return FetchError(
        f"{shown!r} is not unpacked: its files have {size:,} bytes, and {limit:,} are allowed. The setting "
        f"{PREFIX}MAX_ZIP_BYTES changes that.",
        uri=shown,
    )


def _project_root(folder: Path) -> Path:
    """The only folder in an archive that has nothing else, as the archives of hosting services are made."""
    entries = list(folder.iterdir())
    if len(entries) == 1 and entries[0].is_dir():
        return entries[0]
    return folder
