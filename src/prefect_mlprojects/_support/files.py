"""Small file operations that the caches need to be sure of."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that a reader sees the old content or the new, never a part of it.

    Args:
        path: The file; missing folders above it are made.
        text: Its content, written as UTF-8.

    Raises:
        OSError: It can't be written; the old content is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove_tree(path: Path) -> bool:
    """Removes a folder with all in it, also where folders in it are write-protected.

    Args:
        path: The folder; a missing one is fine.

    Returns:
        Whether it is gone.
    """
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        return True
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            Path(folder).chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)


def disk_usage(path: Path) -> int:
    """How many bytes a folder takes on the disk.

    Files that uv links from its own cache count in full, although the cache shares them.

    Args:
        path: The folder.

    Returns:
        The bytes of all blocks in it.
    """
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(folder, name)).st_blocks * 512
    return total
