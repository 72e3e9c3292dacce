"""The errors of building an environment that don't come from a tool: the cache folder, the disk, a stop."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal


def stopped_error(manager: str, stop: StopSignal) -> EnvironmentBuildError:
    """The error of a build that was told to end."""
    reason = f" ({stop.reason})" if stop.reason else ""
    return EnvironmentBuildError(f"The building of the environment was stopped{reason}.", manager=manager)


@contextlib.contextmanager
def cache_errors(root: Path, manager: str) -> Iterator[None]:
    """Turns the operating system's errors on the cache into ones that say what to do.

    Raises:
        EnvironmentBuildError: In place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentBuildError(describe_cache_error(error, root), manager=manager) from error


def describe_cache_error(error: OSError, root: Path) -> str:
    """What an operating system's error on the cache means and what to do."""
    setting = "the environment variable PREFECT_MLPROJECTS_CACHE_DIR"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full_message(root)
    place = f" ({error.filename})" if error.filename and str(error.filename) != str(root) else ""
    return (
        f"The cache folder {root} can't be written: {error.strerror or error}{place}. "
        f"Make it writable, or name another folder in {setting}."
    )


def disk_full_message(root: Path) -> str:
    """The message for a full disk."""
    return (
        f"The disk is full: the environment does not fit below {root}. Free some space ('mlprojects env prune' removes "
        "environments), or name a folder on another disk in the environment variable PREFECT_MLPROJECTS_CACHE_DIR."
    )
