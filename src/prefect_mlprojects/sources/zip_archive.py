"""Projects in zip archives, local or behind any protocol of ``fsspec``."""

from __future__ import annotations

import stat
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.exceptions import FetchError, SourceUnavailableError
from prefect_mlprojects.settings import PREFIX, max_zip_bytes, trusted_sources
from prefect_mlprojects.sources.base import (
    SourceKind,
    WorkingCopy,
    apply_subdirectory,
    check_trusted,
    create_run_folder,
    remove_run_folder,
)
from prefect_mlprojects.sources.downloads import download
from prefect_mlprojects.types import StopSignal

_MAX_MEMBERS = 200_000
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ZipSource:
    """A zip archive: a local one by its absolute path, a remote one by its URL."""

    location: Path | str
    subdirectory: str
    uri: str

    @property
    def kind(self) -> SourceKind:
        """``zip``."""
        return "zip"

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Downloads a remote archive and unpacks it into a folder for this run; see ``Source``."""
        folder = create_run_folder(self.uri)
        try:
            if isinstance(self.location, Path):
                unpack(self.location, folder, self.uri, stop)
            else:
                with tempfile.TemporaryDirectory(prefix="mlprojects-zip-", dir=folder.parent) as temporary:
                    check = self._check_redirect if trusted_sources() else None
                    file = download(self.location, Path(temporary), report=report, stop=stop, check_redirect=check)
                    unpack(file, folder, self.uri, stop)
            root = folder if self.subdirectory else _project_root(folder)
            if root != folder:
                report(f"All files of {self.uri} are in its folder {root.name!r}, which is used as the project")
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
            root=folder,
        )

    def _check_redirect(self, target: str) -> None:
        check_trusted(target, f"{self.uri} (redirected to {strip_user_info(target)})")

    def remove(self, copy: WorkingCopy) -> None:
        """Removes the unpacked folder, unless it is to be kept; see ``Source``."""
        remove_run_folder(copy.directory)


def unpack(file: Path, folder: Path, shown: str, stop: StopSignal) -> None:
    """Unpacks a zip archive, whose redacted URI is `shown`, into an empty folder; checks it before writing the first file.

    Raises:
        FetchError: It is broken, encrypted or no zip archive; a member is a link, absolute or leads out of the folder; or it
            is larger than ``PREFECT_MLPROJECTS_MAX_ZIP_BYTES``.
    """
    limit = max_zip_bytes()
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, limit, shown)
            left = limit
            for member in members:
                if stop.requested:
                    raise SourceUnavailableError(f"Unpacking {shown!r} was stopped: {stop.reason}.", uri=shown)
                left -= _write_member(archive, member, folder, left, shown)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise FetchError(f"{shown!r} is no zip archive that can be unpacked: {error}.", uri=shown) from None
    except RuntimeError as error:
        # zipfile's error for an encrypted member.
        raise FetchError(f"{shown!r} can't be unpacked: {error}.", uri=shown) from None
    except OSError as error:
        problem = f"{error.filename or folder}: {error.strerror or error}"
        raise SourceUnavailableError(f"{shown!r} can't be unpacked: {problem}.", uri=shown) from None


def _check_members(members: list[zipfile.ZipInfo], limit: int, shown: str) -> None:
    if len(members) > _MAX_MEMBERS:
        raise FetchError(f"{shown!r} has {len(members)} files; at most {_MAX_MEMBERS} are unpacked.", uri=shown)
    for member in members:
        name, mode = member.filename, member.external_attr >> 16
        problem = ""
        if not name.strip("./") and not name.endswith("/"):
            problem = "has no name"
        elif any(0xD800 <= ord(letter) < 0xE000 for letter in name):
            problem = "has a name that is no text"
        elif name.startswith("/") or "\\" in name or ":" in PurePosixPath(name).parts[:1] or ".." in name.split("/"):
            problem = "would be written outside of its folder"
        elif mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_IFMT(mode) == 0):
            problem = "is a link or a special file"
        if problem:
            raise FetchError(f"{shown!r} is not unpacked: its member {name!r} {problem}.", uri=shown)
    total = sum(member.file_size for member in members)
    if total > limit:
        raise _too_large(shown, total, limit)


def _write_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, left: int, shown: str) -> int:
    """Writes one member and returns its actual size in bytes: the archive's own entry may be wrong."""
    target = folder / PurePosixPath(member.filename)
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(member) as source, target.open("wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            written += len(chunk)
            if written > left:
                raise _too_large(shown, written, left)
            file.write(chunk)
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
    """Returns an archive's only entry if it is a folder, as in archives of hosting services, else `folder`."""
    entries = list(folder.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
