"""File operations: private folders and files, atomic replacement, removal of whole trees, disk usage."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
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
    """Writes a small UTF-8 file by an atomic rename; only its owner may read it. Creates missing parent folders."""
    make_directories(path.parent)
    with replacing(path) as temporary:
        write_private(temporary, text)


def write_private(path: Path, text: str) -> None:
    """Writes a UTF-8 file that only its owner may read."""
    with os.fdopen(open_private(path, os.O_WRONLY | os.O_TRUNC), "w", encoding="utf-8") as file:
        file.write(text)


def open_private(path: Path, flags: int) -> int:
    """Opens a file, which is created if it does not exist, and lets only its owner read it, whatever the umask."""
    descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # of another user: the folder decides whose files are used
        os.fchmod(descriptor, 0o600)
    return descriptor


def make_directories(path: Path) -> None:
    """Creates a folder and its missing parents for their owner only, whatever the umask."""
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)


def check_private(path: Path) -> Path:
    """Checks that only this user may have placed files in a folder, and lets nobody else read it; a missing one passes.

    A folder of root that only root may write is accepted as it is: a prepared cache.

    Raises:
        PermissionError: It belongs to another user, or others may write to it.
    """
    try:
        found, user = path.stat(), os.geteuid()
    except (FileNotFoundError, NotADirectoryError):
        return path
    if found.st_uid != user and (found.st_uid != 0 or found.st_mode & 0o022):
        raise _insecure(path, f"it belongs to another user ({_user_name(found.st_uid)})")
    if found.st_uid != user:
        return path
    if found.st_mode & stat.S_IWOTH:
        raise _insecure(path, f"every user may write to it; check its files, then run `chmod 700 {path}`")
    if found.st_mode & stat.S_IWGRP:
        foreign = [entry.name for entry in os.scandir(path) if entry.stat(follow_symlinks=False).st_uid != user]
        if foreign:
            raise _insecure(path, f"its group may write to it, and {foreign[0]!r} in it belongs to another user")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


def private_directory(path: Path) -> Path:
    """Creates a folder for its owner only, or checks an existing one as `check_private` does."""
    make_directories(path)
    return check_private(path)


def close_files(folder: Path, *patterns: str) -> None:
    """Lets only the owner read existing files of a folder, which an older version or another umask left open."""
    for file in (file for pattern in patterns for file in folder.glob(pattern)):
        with contextlib.suppress(OSError):
            file.chmod(0o600)


def _insecure(path: Path, why: str) -> PermissionError:
    return PermissionError(errno.EACCES, why, str(path))


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


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
