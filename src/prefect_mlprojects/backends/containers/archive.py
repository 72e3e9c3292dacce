"""A project's files as a reproducible tar archive, and their content digest.

Docker uses it as the build context and to copy files into a container; Kubernetes and Databricks get the project's code as one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import posixpath
import stat
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from prefect_mlprojects._support.documents import read_limited
from prefect_mlprojects._support.files import may_access
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.sources.base import WorkingCopy

IGNORE_FILE = ".dockerignore"
EXCLUDED = tuple(
    f"**/{name}"
    for name in (
        *(".git", "mlruns", "mlartifacts", "mlflow.db", "mlflow.db-*", "__pycache__", ".venv", ".ipynb_checkpoints"),
        *(".mypy_cache", ".pytest_cache", ".ruff_cache"),
    )
)
"""Patterns, in .dockerignore syntax, of files that are never part of a project's code."""

FOLLOWED_LIMIT = 1 << 30
"""Bytes of files outside a project that its links may add to it."""

_Root: TypeAlias = tuple[Path, str]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProjectFile:
    """A file, folder or symbolic link of a project.

    `name` is its path relative to the project's folder, with slashes; `mode` is 0o755 for folders and executable files, else
    0o644, independent of the umask; `target` is a symbolic link's.
    """

    name: str
    path: Path
    mode: int
    target: str | None = None


def project_files(
    copy: WorkingCopy, *, backend: str = "local", mounted: Collection[str] = ()
) -> tuple[ProjectFile, ...]:
    """Lists a project's files sorted by name, without those that ``EXCLUDED`` or its ``.dockerignore`` match.

    The patterns are Docker's (https://docs.docker.com/build/concepts/context/#dockerignore-files), matched by its SDK; the
    project's come last and may re-include files that ``EXCLUDED`` matches. Sockets, pipes and devices are skipped.

    A link that leads out of the project is replaced by the files it leads to, at most `FOLLOWED_LIMIT` bytes. Links that lead
    out of a fetched repository are kept: its authors must not read this machine's files. So are links into `mounted` folders.

    Raises `BackendError` if a folder or the ``.dockerignore`` can't be read, or the followed links exceed the limit.
    """
    try:
        listing = _Listing(copy, backend, mounted)
        root = copy.directory.resolve()
        files = sorted(listing.walk(root, "", ((root, ""),)), key=lambda file: file.name)
    except OSError as error:
        raise BackendError(
            f"The project's files can't be listed: {error.filename or copy.directory}: {error.strerror or error}.",
            backend=backend,
        ) from None
    if listing.kept:
        _logger.warning("Links that lead out of the fetched files are not followed: %s", ", ".join(listing.kept))
    return tuple(files)


class _Listing:
    """Walks a project's folder, and the folders outside that its links lead to.

    A root is a walked folder, resolved, and its name in the archive. Links into a root stay links, which ends cycles.
    """

    def __init__(self, copy: WorkingCopy, backend: str, mounted: Collection[str]) -> None:
        from docker.utils.build import PatternMatcher

        self._matcher = PatternMatcher([*EXCLUDED, *_own_patterns(copy.directory), "!Dockerfile"])
        self._copy, self._backend, self._mounted = copy, backend, mounted
        self._followed_size = 0
        self.kept: list[str] = []

    def walk(self, folder: Path, name: str, roots: tuple[_Root, ...]) -> Iterator[ProjectFile]:
        """Yields the files below a folder that is called `name` in the archive."""
        for path in list(folder.iterdir()):
            child = posixpath.join(name, path.name)
            matched = self._matcher.matches(child)
            if not matched:
                yield from self._file(path, child, roots)
            if not path.is_symlink() and path.is_dir() and (not matched or self._may_re_include(child)):
                yield from self.walk(path, child, roots)

    def _may_re_include(self, folder: str) -> bool:
        return any(each.exclusion and each.cleaned_pattern.startswith(folder) for each in self._matcher.patterns)

    def _file(self, path: Path, name: str, roots: tuple[_Root, ...]) -> Iterator[ProjectFile]:
        mode, target = path.lstat().st_mode, None
        if stat.S_ISLNK(mode):
            target = self._link_target(path, name, roots)
            mode = mode if target is not None else path.stat().st_mode
        if target is not None:
            yield ProjectFile(name, path, 0o777, target)
            return
        if path.is_symlink() or len(roots) > 1:
            self._count(path, name if len(roots) == 1 else roots[1][1])
        if stat.S_ISDIR(mode):
            yield ProjectFile(name, path, 0o755)
            if path.is_symlink():
                real = path.resolve()
                yield from self.walk(real, name, (*roots, (real, name)))
        elif stat.S_ISREG(mode):
            yield ProjectFile(name, path, 0o755 if mode & stat.S_IXUSR else 0o644)

    def _link_target(self, path: Path, name: str, roots: tuple[_Root, ...]) -> str | None:
        """Returns the target of a link in the archive; None for a link that is to be followed."""
        text, folder = str(path.readlink()), posixpath.dirname(name)
        within = PurePosixPath(folder).relative_to(roots[-1][1] or ".")
        if not text.startswith("/") and not posixpath.normpath(within / text).startswith(".."):
            return text
        # Unlike Path.resolve, it doesn't raise for a link to itself.
        target = Path(os.path.realpath(path))
        for root, root_name in roots:
            if target.is_relative_to(root):
                return posixpath.relpath(posixpath.join(root_name, target.relative_to(root).as_posix()), folder or ".")
        # A link that dangles here may lead to something in the container.
        if not _is_readable(target) or any(Path(text).is_relative_to(each) for each in self._mounted):
            return text
        if self._copy.kind == "local" or (self._copy.kind == "git" and target.is_relative_to(_clone(self._copy))):
            return None
        self.kept.append(f"{name} -> {text}")
        return text

    def _count(self, path: Path, link: str) -> None:
        # Folders and empty files count too: trees like /proc have no size.
        self._followed_size += max(path.stat().st_size, 4096)
        if self._followed_size > FOLLOWED_LIMIT:
            raise BackendError(
                f"The link '{link}' leads out of the project, to {(self._copy.directory / link).resolve()}: the files that "
                f"such links lead to exceed {FOLLOWED_LIMIT >> 20} MiB. Add it to the project's {IGNORE_FILE}, and mount the "
                "folder as a volume or pass its path as a parameter.",
                backend=self._backend,
            )


def _clone(copy: WorkingCopy) -> Path:
    folder = copy.directory.resolve()
    return next((each for each in (folder, *folder.parents) if (each / ".git").exists()), folder)


def _is_readable(path: Path) -> bool:
    return may_access(path, os.R_OK) and (path.is_dir() or path.is_file())


def _own_patterns(directory: Path) -> list[str]:
    file = directory / IGNORE_FILE
    if not file.is_file():
        return []
    lines = (line.strip() for line in read_limited(file).decode("utf-8", errors="replace").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def content_digest(
    files: tuple[ProjectFile, ...], extra: Mapping[str, bytes] | None = None, *, backend: str = "local"
) -> str:
    """Returns the SHA-256 of names, modes and contents, in hexadecimal; equal for equal files on any machine.

    Raises `BackendError` if a file can't be read.
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
    """Yields a tar archive in chunks; its bytes depend on names, modes and contents only.

    All names are put into the folder `prefix`; `extra` replaces files of the same name; `owner` is a user and a group id. Busybox
    reads long and non-ASCII names in ``tarfile.GNU_FORMAT`` only.

    Raises `BackendError` if a file can't be read, or its size changes while it is read.
    """
    buffer, extra = io.BytesIO(), dict(extra or {})
    # Without time and file name in gzip's header the same files give the same bytes.
    packed = gzip.GzipFile("", "wb", 6, buffer, mtime=0) if compressed else buffer
    archive = tarfile.open(fileobj=packed, mode="w|", format=tar_format)  # noqa: SIM115
    folder = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    if folder:
        # Without an entry of its own, tar creates the folder owned by root.
        own = _info(folder.rstrip("/"), 0o755, owner)
        own.type = tarfile.DIRTYPE
        archive.addfile(own)
    for file in files:
        if file.name not in extra:
            _add(archive, file, folder, owner, backend)
            yield from _drain(buffer)
    for name, content in sorted(extra.items()):
        info = _info(folder + name, 0o644, owner)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    archive.close()
    if compressed:
        packed.close()
    yield from _drain(buffer)


def _drain(buffer: io.BytesIO) -> Iterator[bytes]:
    # An empty chunk would end an HTTP request.
    if data := buffer.getvalue():
        buffer.seek(0)
        buffer.truncate()
        yield data


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
