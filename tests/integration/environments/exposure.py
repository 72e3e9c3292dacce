"""Finds the files that expose a secret to other users."""

from __future__ import annotations

from pathlib import Path


def exposed_files(root: Path, secret: str) -> list[Path]:
    """Returns the files below a folder that hold a secret and that other users can open."""
    found = [file for file in root.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
    return [file for file in found if _open_to_others(file, root)]


def _open_to_others(file: Path, root: Path) -> bool:
    inside = [folder for folder in file.parents if folder.is_relative_to(root)]
    return bool(file.stat().st_mode & 0o044) and all(folder.stat().st_mode & 0o011 for folder in inside)
