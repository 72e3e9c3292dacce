"""Turns cancellations through Prefect's API or UI into stop requests.

Prefect's engine ignores its flow run's state while the flow's code runs: a run in a thread or a script would stay in
Cancelling. One event subscription serves all runs of an event loop; a slow poll catches events that a lost websocket missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID
from weakref import WeakKeyDictionary

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL

from prefect_mlprojects.server.compat import subscribe_to_events
from prefect_mlprojects.types import StopSignal

_logger = logging.getLogger(__name__)

# Most runs end before a websocket would pay off; the first poll catches a cancellation from before it was connected.
_SECONDS_BEFORE_SUBSCRIBING = 0.3
_SECONDS_BETWEEN_POLLS = 10.0
_SECONDS_BETWEEN_SUBSCRIPTIONS = 2.0

REASON = "it was cancelled in Prefect"


class _Watcher:
    """Watches the flow runs of one event loop and one Prefect API."""

    def __init__(self) -> None:
        self._stops: dict[UUID, StopSignal] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, flow_run_id: UUID, stop: StopSignal) -> None:
        self._stops[flow_run_id] = stop
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._subscribe()), asyncio.create_task(self._poll_slowly())]

    def remove(self, flow_run_id: UUID) -> None:
        self._stops.pop(flow_run_id, None)
        if not self._stops:
            for task in self._tasks:
                task.cancel()
            self._tasks = []

    async def _poll(self) -> None:
        if not self._stops:
            return
        types = FlowRunFilterStateType(any_=[StateType.CANCELLING, StateType.CANCELLED])
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(self._stops)), state=FlowRunFilterState(type=types))
        try:
            async with get_client() as client:
                cancelled = await client.read_flow_runs(
                    flow_run_filter=wanted, sort=FlowRunSort.ID_DESC, limit=len(self._stops)
                )
        except Exception as error:  # noqa: BLE001 - a later poll succeeds once the server is back
            _logger.debug("Could not read the cancelled flow runs: %s", error)
            return
        for flow_run in cancelled:
            self._request_stop(flow_run.id)

    def _request_stop(self, flow_run_id: UUID) -> None:
        if stop := self._stops.get(flow_run_id):
            stop.request(REASON)

    async def _poll_slowly(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_POLLS)
            await self._poll()

    async def _subscribe(self) -> None:
        await asyncio.sleep(_SECONDS_BEFORE_SUBSCRIBING)
        while True:
            try:
                async with subscribe_to_events("prefect.flow-run.Cancelling", "prefect.flow-run.Cancelled") as events:
                    await self._poll()
                    async for event in events:
                        prefix, _, identifier = event.resource.id.rpartition(".")
                        if prefix == "prefect.flow-run":
                            self._request_stop(UUID(identifier))
            except Exception as error:  # noqa: BLE001 - the websocket is reopened; polling continues
                _logger.debug("Lost the subscription to Prefect's events: %s", error)
            await asyncio.sleep(_SECONDS_BETWEEN_SUBSCRIPTIONS)


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Watcher]] = WeakKeyDictionary()


@asynccontextmanager
async def watch_cancellation(flow_run_id: UUID, stop: StopSignal) -> AsyncIterator[None]:
    """Requests `stop` once the flow run is cancelled in Prefect, during the block."""
    watchers = _watchers.setdefault(asyncio.get_running_loop(), {})
    watcher = watchers.setdefault(str(PREFECT_API_URL.value()), _Watcher())
    watcher.add(flow_run_id, stop)
    try:
        yield
    finally:
        watcher.remove(flow_run_id)
