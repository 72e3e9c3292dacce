"""Makes a new embedded server's database from a ready schema.

Prefect's migrations of an empty SQLite database take longer than all else in a first start. The schema that they end
with is shipped as SQL (``schema.sql``, written by ``scripts/update-server-schema``) and applied in a fraction
of a second; Alembic then finds the database at that revision and goes on from there. A Prefect that does not know the
revision gets no database from us and migrates from nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sqlite3
from pathlib import Path

SCHEMA_FILE = Path(__file__).with_name("schema.sql")
_REVISION_PREFIX = "-- revision: "


def create_database(path: Path) -> bool:
    """Creates the database unless it exists or the installed Prefect does not know the schema's revision.

    The file appears whole or not at all.

    Args:
        path: Where the database is to be.

    Returns:
        Whether it was created.

    Raises:
        OSError: The folder can't be written.
        sqlite3.Error: The disk is full.
    """
    if path.exists() or not SCHEMA_FILE.exists():
        return False
    script = SCHEMA_FILE.read_text(encoding="utf-8")
    revision = script.splitlines()[0].removeprefix(_REVISION_PREFIX).strip()
    if not _is_known(revision):
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(temporary)) as connection:
            connection.executescript(script)
        for suffix in ("-wal", "-shm"):  # of a database that was removed: SQLite would apply them to this one
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _is_known(revision: str) -> bool:
    specification = importlib.util.find_spec("prefect")
    if specification is None or specification.origin is None or not revision:
        return False
    folder = Path(specification.origin).parent / "server" / "database" / "_migrations" / "versions" / "sqlite"
    return any(folder.glob(f"*_{revision}_*.py"))


def dump_schema(path: Path) -> str:
    """Returns the SQL that makes a database like the one at ``path``, its rows included."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        statements = "\n".join(connection.iterdump())
    return f"{_REVISION_PREFIX}{revision}\n{statements}\n"
