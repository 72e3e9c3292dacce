"""The embedded Prefect server's application, for ``uvicorn --factory``; the only user of `prefect.server`.

It is Prefect's own application on a SQLite database whose write transactions begin as IMMEDIATE. Prefect begins them as
DEFERRED: when such a transaction has read and another one commits before it writes, SQLite refuses the write at once,
the server answers 503 and the client backs off for seconds. ``tests/integration/server`` checks each use of Prefect's
internals here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.server.database import dependencies
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, get_current_settings
from sqlalchemy import create_engine, event
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import SQLAlchemyError

from prefect_mlprojects._support.files import replacing, temporary_pattern
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.server.address import PROFILE
from prefect_mlprojects.server.compat import publish_profile
from prefect_mlprojects.server.guard import ServerGuard
from prefect_mlprojects.server.process import DATABASE_ERROR_PREFIX, DATABASE_EXIT_CODE

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class ImmediateSqliteConfiguration(AioSqliteConfiguration):
    """Prefect's SQLite configuration with transactions that take the write lock when they begin."""

    @asynccontextmanager
    async def begin_transaction(
        self,
        session: AsyncSession,
        with_for_update: bool = False,  # noqa: ARG002 - DEFERRED is what this class avoids
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """Begins an IMMEDIATE transaction whatever `with_for_update` is."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


class MigrationConfiguration(AioSqliteConfiguration):
    """Prefect's SQLite configuration for migrating a new file fast, which is thrown away if this process is killed.

    Two things cost time: synchronous writes, and that aiosqlite hands each of 34,000 calls to its thread and back.
    """

    async def engine(self) -> Any:
        """Returns an engine for the migrations only: plain sqlite3 behind the two coroutines that they call."""
        engine = create_engine(make_url(self.connection_url).set(drivername="sqlite"), paramstyle="named")
        event.listen(engine, "connect", self.setup_sqlite)
        event.listen(engine, "begin", self.begin_sqlite_stmt)
        return _MigrationEngine(engine)

    def setup_sqlite(self, conn: Any, record: Any) -> None:
        """Sets Prefect's pragmas and then those that avoid synchronous writes."""
        conn.isolation_level = None  # as Prefect does with aiosqlite's: `begin_sqlite_stmt` begins transactions
        super().setup_sqlite(conn, record)
        conn.execute("PRAGMA journal_mode = MEMORY")
        conn.execute("PRAGMA synchronous = OFF")


class _MigrationEngine:
    """The part of `AsyncEngine` and `AsyncConnection` that Prefect's migrations use, on a synchronous engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[_MigrationEngine, None]:
        with self._engine.connect() as self._connection:
            yield self

    async def dispose(self) -> None:
        self._engine.dispose()

    async def run_sync(self, function: Callable[[Connection | None], None]) -> None:
        function(self._connection)


def create_app() -> ServerGuard:
    """Creates the application, and a SQLite database that does not exist yet; uvicorn calls it in the server's process.

    Exits with `DATABASE_EXIT_CODE` when the database can't be created.
    """
    url: Any = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if str(url).startswith("sqlite"):
        _create_database_or_exit(str(url))
        dependencies.MODELS_DEPENDENCIES["database_config"] = ImmediateSqliteConfiguration(connection_url=url)
    settings = get_current_settings().server
    auth = Secret(settings.api.auth_string.get_secret_value()) if settings.api.auth_string else None
    try:
        publish_profile(PROFILE, str(settings.ui.api_url), auth)
    except (OSError, ValueError) as error:
        _log(f"the Prefect profile {PROFILE!r} could not be written: {error}")
    from prefect.server.api.server import create_app as create_prefect_app

    # Around the application, not in it: Prefect's own services call that one directly, under another host name.
    return ServerGuard(create_prefect_app(final=True), auth=auth, origins=settings.api.cors_allowed_origins.split(","))


def _create_database_or_exit(url: str) -> None:
    try:
        ensure_sqlite_database(url)
    except (OSError, SQLAlchemyError) as error:
        _log(f"{DATABASE_ERROR_PREFIX}{getattr(error, 'orig', None) or error}")
        sys.exit(DATABASE_EXIT_CODE)
    except Exception as error:  # noqa: BLE001 - of a Prefect whose internals differ: it migrates by itself, only slower
        _log(f"the fast migrations failed, Prefect's own follow: {type(error).__name__}: {error}")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the server's log


def ensure_sqlite_database(url: str) -> bool:
    """Creates the database file of a connection URL by Prefect's migrations unless it exists; returns whether it did."""
    file = make_url(url).database
    if not file or file.startswith((":memory:", "file:")):
        return False
    return create_database(Path(file), _migrate)


def create_database(path: Path, migrate: Callable[[Path], None]) -> bool:
    """Creates the database unless it exists; returns whether it did. One process at a time may call this.

    `migrate` works on a temporary file, without SQLite's durability: most of the time would go into synchronous writes. The
    complete file is renamed; a killed process leaves no partial database.
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
    """Deletes the file of a killed process and SQLite's journals next to it."""
    for file in path.parent.glob(temporary_pattern(path)):
        with contextlib.suppress(OSError):
            file.unlink()


def _migrate(path: Path) -> None:
    dependencies.MODELS_DEPENDENCIES["database_config"] = MigrationConfiguration(
        connection_url=f"sqlite+aiosqlite:///{path}"
    )
    database = dependencies.provide_database_interface()
    # uvicorn calls the factory on its event loop, and the migrations need one that is free.
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(asyncio.run, database.create_db()).result()
