"""Digests of the files that decide what an environment holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_LARGE_FILE = 16 * 1024 * 1024
"""Bytes from which on a file counts by its size and time of change instead of its content."""

_SOURCE_SUFFIXES = frozenset(
    (
        *(".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".cc", ".cpp", ".cxx", ".h", ".hh", ".hpp", ".cu", ".cuh"),
        *(".rs", ".f", ".f90", ".f95", ".toml", ".cfg", ".cmake", ".in", ".build"),
    )
)
_METADATA_FILES = frozenset(
    (
        *("pyproject.toml", "setup.py", "setup.cfg", "MANIFEST.in", "VERSION", "version.txt"),
        *("README.md", "README.rst", "CMakeLists.txt"),
    )
)
# Folders that hold no source: made by tools, or by the runs themselves. A run that writes into its project must not
# make the next run build the environment anew.
_SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules", "mlruns", "mlartifacts"))
_SKIPPED_AT_TOP = frozenset({"build", "dist"})


def digest_text(parts: Iterable[str]) -> str:
    """One digest of several texts; where one ends and the next begins counts.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:32]


def digest_file(path: Path) -> str:
    """A digest of a file's content, or of its size and time of change when it is large.

    Returns:
        The digest as text; "unreadable" when the file can't be read, which the installer will explain.
    """
    try:
        status = path.stat()
        if status.st_size > _LARGE_FILE:
            return f"{status.st_size}@{status.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def digest_listing(directory: Path) -> str:
    """A digest of the files in a folder of packages (``--find-links``): their names and contents.

    Args:
        directory: The folder; a file is taken for itself, and a missing one for an empty folder.

    Returns:
        The digest as text.
    """
    if directory.is_file():
        return digest_file(directory)
    try:
        files = sorted(entry.path for entry in os.scandir(directory) if entry.is_file())
    except OSError:
        files = []
    return digest_text(part for file in files for part in (Path(file).name, digest_file(Path(file))))


def digest_metadata(directory: Path) -> str:
    """A digest of what a package's folder declares: the files at its top that name it and its requirements.

    Returns:
        The digest as text.
    """
    return digest_text(
        part
        for file in sorted(_scan_files(directory))
        if file.name in _METADATA_FILES or (file.name.startswith("requirements") and file.suffix == ".txt")
        for part in (file.name, digest_file(file))
    )


def digest_package(directory: Path) -> str:
    """A digest of what is built from a package's folder.

    It takes in the files that declare the package, source files anywhere below the folder, and every file of a Python
    package (below an ``__init__.py``). Other files are left out: a run may write its results beside the code, and they
    must not count.

    Returns:
        The digest as text.
    """
    files = sorted(_package_files(directory))
    return digest_text(
        [
            digest_metadata(directory),
            *(part for file in files for part in (file.relative_to(directory).as_posix(), digest_file(file))),
        ]
    )


def _scan_files(directory: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(directory) if entry.is_file()]
    except OSError:
        return []


def _package_files(directory: Path) -> Iterator[Path]:
    packages: set[str] = set()
    for folder, names, files in os.walk(directory):
        if "pyvenv.cfg" in files:
            names.clear()
            continue
        names[:] = sorted(name for name in names if not _is_skipped(name, at_top=folder == str(directory)))
        in_package = "__init__.py" in files or Path(folder).parent.as_posix() in packages
        if in_package:
            packages.add(Path(folder).as_posix())
        for name in files:
            if (in_package or Path(name).suffix in _SOURCE_SUFFIXES) and not name.endswith((".pyc", ".pyo")):
                yield Path(folder, name)


def _is_skipped(name: str, *, at_top: bool) -> bool:
    if at_top and name in _SKIPPED_AT_TOP:
        return True
    return name in _SKIPPED_FOLDERS or name.startswith(".") or name.endswith(".egg-info")
