"""File operations: atomic replacement, removal of whole trees, disk usage."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder and renames it to `path` when the block succeeds.

    Readers see the old content or the new one, never a part. A killed process leaves at most the temporary file or folder,
    which `temporary_pattern(path)` matches; an error leaves only the old content. With `overwrite` False, a file that
    another process created meanwhile stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        if overwrite:
            temporary.replace(path)
            return
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.replace(path)
    finally:
        # After a rename this finds nothing.
        if temporary.is_dir():
            remove_tree(temporary)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink()


def temporary_pattern(path: Path) -> str:
    """Returns the glob pattern of the names that `replacing` gives its temporary files, and SQLite to their journals."""
    return f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}*"


def write_atomically(path: Path, text: str) -> None:
    """Writes a small UTF-8 file by an atomic rename; creates missing parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_private(path: Path, text: str) -> None:
    """Writes a new UTF-8 file that only its owner may read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def remove_tree(path: Path) -> bool:
    """Removes a folder, write-protected subfolders included; returns whether it is gone. A missing one is no error."""
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        return True
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            Path(folder).chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)


def may_access(path: Path, mode: int) -> bool:
    """As ``os.access``, but for the effective user, which may be another than the real one."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def is_within(path: Path, root: Path | None) -> bool:
    """Whether a path, which need not exist, is `root` or below it once all links are followed; true without a `root`."""
    if root is None:
        return True
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    except (OSError, ValueError):
        return False


def disk_usage(path: Path) -> int:
    """Returns the bytes of all blocks in a folder; files hard-linked from uv's cache count in full."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(folder, name)).st_blocks * 512
    return total


def list_directory(folder: Path) -> list[os.DirEntry[str]]:
    """Returns a folder's entries, sorted by name; none if it can't be read."""
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []
