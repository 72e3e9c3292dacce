"""Reads the log of a flow run, once or until the run has ended."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from prefect_mlprojects.server.api import read_all

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import Log

_POLL_SECONDS = 0.5
_SETTLE_SECONDS = 2.0
"""How long a record is held back: Prefect's log handler sends a batch every two seconds, so older records may still come."""


async def print_logs(
    client: PrefectClient, flow_run_id: str, follow: bool, tail: int | None, timestamps: bool, stdout_only: bool
) -> None:
    """Prints the lines of a flow run's log by time; with `follow`, until the run has ended."""
    identifier = UUID(flow_run_id)
    flow_run = await client.read_flow_run(identifier)
    ended = flow_run.state is not None and flow_run.state.is_final()

    def show(log: Log) -> list[str]:
        if stdout_only and log.name != "prefect_mlprojects.stdout":
            return []
        time = f"{log.timestamp.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z " if timestamps else ""
        return [f"{time}{line}" for line in log.message.split("\n")]

    stored = await _read(client, identifier)
    lines: deque[str] = deque((line for log in stored for line in show(log)), maxlen=tail)
    for line in lines:
        click.echo(line)
    if follow and not ended:
        async for log in _follow(client, identifier, stored):
            for line in show(log):
                click.echo(line)


async def _read(client: PrefectClient, flow_run_id: UUID, since: datetime | None = None) -> list[Log]:
    """Returns the stored records from a time on, oldest first."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterTimestamp
    from prefect.client.schemas.sorting import LogSort

    wanted = LogFilter(
        flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]),
        timestamp=LogFilterTimestamp.model_validate({"after_": since}) if since is not None else None,
    )
    return await read_all(partial(client.read_logs, wanted), sort=LogSort.TIMESTAMP_ASC)


async def _follow(client: PrefectClient, flow_run_id: UUID, printed: list[Log]) -> AsyncIterator[Log]:
    """Yields new records in the order of their times, until the run has ended and its last record was read.

    Prefect can stream logs, but its servers do so only if ``PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED`` is set.
    """
    seen = {log.id for log in printed}
    waiting: list[tuple[datetime, int, Any]] = []
    newest = printed[-1].timestamp if printed else None
    final = False
    while True:
        # Records come in batches of several processes: one that is a little older may come later.
        since = newest - timedelta(seconds=3 * _SETTLE_SECONDS) if newest is not None else None
        for log in await _read(client, flow_run_id, since):
            if log.id not in seen:
                seen.add(log.id)
                heapq.heappush(waiting, (log.timestamp, len(seen), log))
                newest = max(newest or log.timestamp, log.timestamp)
        settled = datetime.now(timezone.utc) - timedelta(seconds=_SETTLE_SECONDS)
        while waiting and (final or waiting[0][0] <= settled):
            yield heapq.heappop(waiting)[2]
        if final:
            return
        flow_run = await client.read_flow_run(flow_run_id)
        final = flow_run.state is not None and flow_run.state.is_final()
        # The last batch is sent when the run's process ends.
        await asyncio.sleep(_SETTLE_SECONDS if final else _POLL_SECONDS)
