"""The embedded Prefect server's application, for ``uvicorn --factory``.

It is Prefect's own application on a SQLite database whose transactions that may write begin as IMMEDIATE. Prefect
begins them as DEFERRED: when one that has read wants to write and another has committed in between, SQLite refuses at
once, the server answers 503 and the client backs off for seconds. Checked against prefect 3.8;
``tests/integration/server`` notices when it stops working.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from prefect.server.database import dependencies
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class ImmediateSqliteConfiguration(AioSqliteConfiguration):
    """Prefect's SQLite configuration with transactions that take the write lock when they begin."""

    @asynccontextmanager
    async def begin_transaction(
        self,
        session: AsyncSession,
        with_for_update: bool = False,  # noqa: ARG002 - what the caller asks for is not enough
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """Begins an IMMEDIATE transaction whatever the caller asks for."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def create_app() -> FastAPI:
    """Makes the application; called once by uvicorn in the server's process."""
    url: Any = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if str(url).startswith("sqlite"):
        dependencies.MODELS_DEPENDENCIES["database_config"] = ImmediateSqliteConfiguration(connection_url=url)
    from prefect.server.api.server import create_app as create_prefect_app

    return create_prefect_app(final=True)
