"""Long works as progress artifacts: how far an image or a download is, in Prefect's UI."""

from __future__ import annotations

import asyncio
import logging
from contextvars import copy_context
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.context import TaskRunContext

_logger = logging.getLogger(__name__)

_SHORT_SECONDS = 2.0
"""What ends sooner needs no artifact."""
_SECONDS_BETWEEN_UPDATES = 1.0


class ProgressArtifacts:
    """The progress artifacts of one task run: one for each long work, made when that turns out to be long.

    What can't be written is logged, since the run itself does not depend on it.

    Args:
        context: The task run; None outside of one, where nothing is written.
    """

    def __init__(self, context: TaskRunContext | None) -> None:
        self._task_run = context.task_run if context is not None else None
        self._loop = asyncio.get_running_loop()
        # Prefect keeps in it which server is meant; a thread that tells its progress has none, or another's.
        self._context = copy_context()
        self._latest: dict[str, float] = {}
        self._written: dict[str, tuple[UUID, float]] = {}
        self._writer: asyncio.Task[None] | None = None

    def take(self, what: str, fraction: float) -> None:
        """Notes how far a work is; from any thread."""
        if self._task_run is not None:
            self._loop.call_soon_threadsafe(self._note, what, fraction, context=self._context)

    def _note(self, what: str, fraction: float) -> None:
        self._latest[what] = fraction
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_now_and_then())

    async def _write_now_and_then(self) -> None:
        await asyncio.sleep(_SHORT_SECONDS)
        async with get_client() as client:
            while True:
                await self._write(client)
                await asyncio.sleep(_SECONDS_BETWEEN_UPDATES)

    async def finish(self) -> None:
        """Writes the last word on what was long; to be called when the task is over."""
        if self._writer is None:
            return
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        if self._written:
            async with get_client() as client:
                await self._write(client)

    async def _write(self, client: PrefectClient) -> None:
        assert self._task_run is not None
        for what, fraction in self._latest.items():
            artifact, written = self._written.get(what, (None, -1.0))
            if fraction == written:
                continue
            try:
                if artifact is None:
                    made = await client.create_artifact(
                        ArtifactCreate(
                            type="progress",
                            # Without a key it shows with its run only, and not among the artifacts of all.
                            description=what,
                            data=fraction * 100,
                            task_run_id=self._task_run.id,
                            flow_run_id=self._task_run.flow_run_id,
                        )
                    )
                    artifact = made.id
                else:
                    await client.update_artifact(artifact, ArtifactUpdate(data=fraction * 100))
            except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
                _logger.warning("The progress of %r could not be written: %s", what, error)
                continue
            self._written[what] = (artifact, fraction)
