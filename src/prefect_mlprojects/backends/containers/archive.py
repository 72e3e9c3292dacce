"""A project's files as a reproducible tar archive, and their content digest.

Docker uses it as the build context and to copy files into a container; Kubernetes and Databricks get the project's code as one.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prefect_mlprojects.exceptions import BackendError

IGNORE_FILE = ".dockerignore"
EXCLUDED = (
    "**/.git",
    "**/mlruns",
    "**/mlartifacts",
    "**/mlflow.db",
    "**/mlflow.db-*",
    "**/__pycache__",
    "**/.venv",
    "**/.ipynb_checkpoints",
    "**/.mypy_cache",
    "**/.pytest_cache",
    "**/.ruff_cache",
)
"""Patterns, in .dockerignore syntax, of files that are never part of a project's code."""


@dataclass(frozen=True)
class ProjectFile:
    """A file, folder or symbolic link of a project.

    Attributes:
        name: Its path relative to the project's folder, with slashes.
        path: Its absolute path.
        mode: Its permission bits: 0o755 for folders and executable files, else 0o644, independent of the umask.
        target: A symbolic link's target; None for files and folders.
    """

    name: str
    path: Path
    mode: int
    target: str | None = None


def project_files(directory: Path, *, backend: str = "local") -> tuple[ProjectFile, ...]:
    """Lists a project's files sorted by name, without those that ``EXCLUDED`` or its ``.dockerignore`` match.

    The patterns are Docker's (https://docs.docker.com/build/concepts/context/#dockerignore-files), parsed by its SDK; the
    project's come last and may re-include files that ``EXCLUDED`` matches. Sockets, pipes and devices are skipped.

    Raises:
        BackendError: A folder or the ``.dockerignore`` can't be read.
    """
    from docker.utils.build import exclude_paths

    try:
        patterns = [*EXCLUDED, *_own_patterns(directory)]
        names = sorted(exclude_paths(str(directory), patterns))
    except OSError as error:
        raise BackendError(
            f"The project's files can't be listed: {error.filename or directory}: {error.strerror or error}.",
            backend=backend,
        ) from None
    return tuple(entry for name in names if name and (entry := _entry(directory, name)) is not None)


def _own_patterns(directory: Path) -> list[str]:
    file = directory / IGNORE_FILE
    if not file.is_file():
        return []
    lines = (line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _entry(directory: Path, name: str) -> ProjectFile | None:
    path = directory / name
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return ProjectFile(name, path, 0o777, str(path.readlink()))
    if stat.S_ISDIR(mode):
        return ProjectFile(name, path, 0o755)
    if stat.S_ISREG(mode):
        return ProjectFile(name, path, 0o755 if mode & stat.S_IXUSR else 0o644)
    return None


def content_digest(
    files: tuple[ProjectFile, ...], extra: Mapping[str, bytes] | None = None, *, backend: str = "local"
) -> str:
    """Returns the SHA-256 of names, modes and contents, in hexadecimal; equal for equal files on any machine.

    Raises:
        BackendError: A file can't be read.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.mode:o}\0{file.target or ''}\0".encode("utf-8", "surrogateescape"))
        if file.target is None and not file.path.is_dir():
            digest.update(_file_digest(file, backend))
    for name, content in sorted((extra or {}).items()):
        digest.update(f"{name}\0extra\0".encode())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _file_digest(file: ProjectFile, backend: str) -> bytes:
    try:
        with file.path.open("rb") as content:
            digest = hashlib.sha256()
            while chunk := content.read(1 << 20):
                digest.update(chunk)
            return digest.digest()
    except OSError as error:
        raise _unreadable(file, error, backend) from None


def write_archive(
    target: IO[bytes],
    files: tuple[ProjectFile, ...],
    *,
    prefix: str = "",
    extra: Mapping[str, bytes] | None = None,
    compressed: bool = False,
    owner: tuple[int, int] = (0, 0),
    backend: str = "local",
) -> None:
    """Writes a tar archive whose bytes depend on names, modes and contents only; see ``iterate_archive``.

    Raises:
        BackendError: A file can't be read, or its size changed while it was read.
    """
    pieces = iterate_archive(files, prefix=prefix, extra=extra, compressed=compressed, owner=owner, backend=backend)
    for chunk in pieces:
        target.write(chunk)


def iterate_archive(
    files: tuple[ProjectFile, ...],
    *,
    prefix: str = "",
    extra: Mapping[str, bytes] | None = None,
    compressed: bool = False,
    owner: tuple[int, int] = (0, 0),
    tar_format: int = tarfile.PAX_FORMAT,
    backend: str = "local",
) -> Iterator[bytes]:
    """Yields the archive in chunks, without holding it in memory or on disk.

    Args:
        files: The result of ``project_files``.
        prefix: The folder that all names are put into; empty for none.
        extra: Further files by name; they replace files of the same name.
        compressed: Whether to compress with gzip.
        owner: User and group id of all files.
        tar_format: ``tarfile.PAX_FORMAT``, or ``tarfile.GNU_FORMAT`` for busybox, which reads long and non-ASCII names in that
            format only.
        backend: The backend's name, for errors.

    Raises:
        BackendError: A file can't be read, or its size changed while it was read.
    """
    buffer = _Pieces()
    extra = dict(extra or {})
    if compressed:
        import gzip

        # Without time and file name in gzip's header the same files give the same bytes.
        packed = gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0, compresslevel=6)
        archive = tarfile.open(fileobj=packed, mode="w|", format=tar_format)  # noqa: SIM115
    else:
        packed = None
        archive = tarfile.open(fileobj=buffer, mode="w|", format=tar_format)  # noqa: SIM115
    folder = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    if folder:
        # Without an entry of its own, tar creates the folder owned by root.
        own = _info(folder.rstrip("/"), 0o755, owner)
        own.type = tarfile.DIRTYPE
        archive.addfile(own)
    for file in files:
        if file.name in extra:
            continue
        _add(archive, file, folder, owner, backend)
        yield from buffer.take()
    for name, content in sorted(extra.items()):
        info = _info(folder + name, 0o644, owner)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
        yield from buffer.take()
    archive.close()
    if packed is not None:
        packed.close()
    yield from buffer.take()


def _add(archive: tarfile.TarFile, file: ProjectFile, folder: str, owner: tuple[int, int], backend: str) -> None:
    info = _info(folder + file.name, file.mode, owner)
    try:
        if file.target is not None:
            info.type, info.linkname = tarfile.SYMTYPE, file.target
            archive.addfile(info)
        elif file.path.is_dir():
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        else:
            with file.path.open("rb") as content:
                info.size = os.fstat(content.fileno()).st_size
                archive.addfile(info, content)
    except OSError as error:
        raise _unreadable(file, error, backend) from None


def _info(name: str, mode: int, owner: tuple[int, int]) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode = mode
    info.uid, info.gid = owner
    return info


def _unreadable(file: ProjectFile, error: OSError, backend: str) -> BackendError:
    return BackendError(
        f"The project's file {file.path} can't be read: {error.strerror or error}. Make it readable, or add it to the "
        f"project's {IGNORE_FILE}.",
        backend=backend,
    )


class _Pieces(io.RawIOBase):
    """A writable buffer that is drained in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]  # any buffer, as RawIOBase has it
        self._pieces.append(piece)
        return len(piece)

    def take(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        return pieces
