"""Folders of a project: the subdirectory that a URI names, and what to say of one that is not there."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import FetchError


def apply_subdirectory(root: Path, subdirectory: str, uri: str) -> Path:
    """Returns the folder ``subdirectory`` below ``root``.

    Args:
        root: The folder of the whole project, absolute.
        subdirectory: What stood after the ``#``; empty for ``root`` itself.
        uri: The project's URI for error messages, passwords masked.

    Raises:
        FetchError: It leads out of ``root`` (also through a symbolic link), or there is no such folder.
    """
    parts = PurePosixPath(subdirectory)
    folder = root / parts
    if parts.is_absolute() or ".." in parts.parts or not folder.resolve().is_relative_to(root.resolve()):
        raise FetchError(
            f"The subdirectory {subdirectory!r} of {uri!r} leads out of the project. Name a folder inside it.", uri=uri
        )
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FetchError(
            f"The subdirectory {subdirectory!r} of {uri!r} {what}: {folder}{nearest_folder(folder)}", uri=uri
        )
    return folder


def nearest_folder(folder: Path) -> str:
    """Returns the end of a "does not exist" sentence.

    It names the sibling whose name is most like the missing one, or the last parent that exists.

    Args:
        folder: The absolute path that does not exist.
    """
    parent = folder.parent
    # os.path.isdir, unlike Path.is_dir, is False for names that are too long.
    if not os.path.isdir(parent):  # noqa: PTH112
        existing = next((ancestor for ancestor in parent.parents if os.path.isdir(ancestor)), None)  # noqa: PTH112
        return f" (of its path only {str(existing)!r} is there)." if existing is not None else "."
    try:
        siblings = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    except OSError:
        return "."
    close = nearest(folder.name, siblings)
    return f". Did you mean {str(parent / close)!r}?" if close else "."
