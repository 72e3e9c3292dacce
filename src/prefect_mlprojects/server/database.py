"""Creates the embedded server's SQLite database so that the first start stays short.

Prefect's own migrations build it, in a temporary file without SQLite's durability: most of their time would go into
synchronous writes. The complete file is renamed; a killed process leaves no partial database.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from prefect_mlprojects._support.files import replacing, temporary_pattern

EXIT_CODE = 73
"""The server process's exit code when the database can't be created: ``EX_CANTCREAT`` of sysexits.h."""

ERROR_PREFIX = "the database could not be created: "
"""Start of the line with which the server process says why; the process that starts it shows the line."""


def create_database(path: Path, migrate: Callable[[Path], None]) -> bool:
    """Creates the database with `migrate` unless it exists; returns whether it did.

    Args:
        path: The database file. One process at a time may create it.
        migrate: Runs the migrations on a file that does not exist yet; its writes need not be durable.

    Raises:
        OSError: The folder can't be written.
        Exception: An error of `migrate`; nothing is left.
    """
    if path.exists():
        return False
    _remove_temporary_files(path)
    try:
        with replacing(path) as temporary:
            migrate(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            for suffix in ("-wal", "-shm"):  # of a database that was removed: SQLite would apply them to this one
                path.with_name(path.name + suffix).unlink(missing_ok=True)
    finally:
        _remove_temporary_files(path)
    return True


def _remove_temporary_files(path: Path) -> None:
    """Removes the file of a killed process, and SQLite's journals beside it."""
    for file in path.parent.glob(temporary_pattern(path)):
        with contextlib.suppress(OSError):
            file.unlink()
