"""Sends a program's output to its flow run's log: in order, complete, with bounded memory.

Prefect's own log handler creates a record per line and has an unbounded queue; its server stores some 450 records a
second, so 100,000 lines would take minutes. Here lines are joined into larger records, and a program that prints faster
than the server stores is slowed down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import replace
from datetime import datetime, timezone
from types import TracebackType
from typing import TYPE_CHECKING, get_args

from prefect_mlprojects._support.output import LineSplitter, OutputRecord, RecordJoiner
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.types import StreamName

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import TaskRun

_logger = logging.getLogger(__name__)

_MAX_BATCH_BYTES = 1_000_000
_MAX_QUEUED_BYTES = 8_000_000
_SECONDS_TO_WAIT_FOR_SERVER = 60.0
_REFRESH_SECONDS = 1.0
_SECONDS_AFTER_CANCELLATION = 3.0


class FlowRunLog:
    """An output sink that writes to a task run's log; an async context manager, whose exit sends the remaining output."""

    def __init__(self, client: PrefectClient, task_run: TaskRun, *, enabled: bool = True) -> None:
        self._client = client
        self._task_run = task_run
        self._enabled = enabled
        self._splitters = {stream: LineSplitter(refresh_seconds=_REFRESH_SECONDS) for stream in get_args(StreamName)}
        self._joiner = RecordJoiner()
        self._queue: deque[tuple[OutputRecord, int]] = deque()
        self._queued_bytes = 0
        self._lost_lines = 0
        self._closing = False
        self._room = threading.Condition()
        self._wake = asyncio.Event()
        self._wake_pending = False
        self._loop = asyncio.get_running_loop()
        self._shipper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> FlowRunLog:
        if self._enabled:
            self._shipper = asyncio.create_task(self._ship())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shipper is None:
            return
        with self._room:
            for stream, splitter in self._splitters.items():
                self._enqueue(self._joiner.add(stream, splitter.close(), time.time()))
            self._enqueue(self._joiner.flush(time.time()))
            self._closing = True
        self._wake.set()
        cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
        try:
            done, _ = await asyncio.wait([self._shipper], timeout=_SECONDS_AFTER_CANCELLATION if cancelled else None)
        finally:
            self._shipper.cancel()
        for shipper in done:
            shipper.result()
        if self._lost_lines:
            _logger.warning(
                "%d lines of output came faster than Prefect's server took them; its log lacks them", self._lost_lines
            )

    def write(self, stream: StreamName, data: bytes) -> None:
        """Takes output, from any thread; blocks while too much of it waits to be sent."""
        if self._shipper is None:
            return
        with self._room:
            self._room.wait_for(
                lambda: self._queued_bytes < _MAX_QUEUED_BYTES or self._closing, timeout=_SECONDS_TO_WAIT_FOR_SERVER
            )
            had_deadline = self._joiner.deadline() is not None
            lines = self._splitters[stream].feed(data, time.time())
            if not lines:
                return
            if self._queued_bytes >= _MAX_QUEUED_BYTES:
                self._lost_lines += len(lines)
                return
            self._enqueue(self._joiner.add(stream, lines, time.time()))
            wake = not self._wake_pending and (bool(self._queue) or not had_deadline)
            self._wake_pending = self._wake_pending or wake
        if wake:
            self._loop.call_soon_threadsafe(self._wake.set)

    def _enqueue(self, records: list[OutputRecord]) -> None:
        for given in records:
            # A secret that is known by value is redacted already.
            record = replace(given, text=redact(given.text))
            size = len(record.text.encode())
            self._queue.append((record, size))
            self._queued_bytes += size

    async def _ship(self) -> None:
        while True:
            with self._room:
                deadline = self._joiner.deadline()
                done = self._closing and not self._queue
            if done:
                return
            if not self._queue and not self._closing:
                await self._sleep_until(deadline)
            with self._room:
                self._wake_pending = False
                self._wake.clear()
                deadline = self._joiner.deadline()
                if deadline is not None and deadline <= time.time():
                    self._enqueue(self._joiner.flush(time.time()))
                batch, size = self._next_batch()
            if batch:
                await self._send(batch)
                with self._room:
                    self._queued_bytes -= size
                    self._room.notify_all()

    async def _sleep_until(self, deadline: float | None) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), None if deadline is None else max(0.0, deadline - time.time()))

    def _next_batch(self) -> tuple[list[OutputRecord], int]:
        batch: list[OutputRecord] = []
        total = 0
        while self._queue and (not batch or total + self._queue[0][1] <= _MAX_BATCH_BYTES):
            record, size = self._queue.popleft()
            batch.append(record)
            total += size
        return batch, total

    async def _send(self, batch: list[OutputRecord]) -> None:
        """Sends a batch; retries for a minute while the server is unavailable."""
        deadline = time.monotonic() + _SECONDS_TO_WAIT_FOR_SERVER
        backoff = Backoff(longest=5.0)
        while True:
            try:
                await self._client.create_logs([self._as_log(record) for record in batch])
                return
            except Exception as error:  # noqa: BLE001 - whatever failed, the run continues without its log
                if time.monotonic() > deadline:
                    lines = sum(record.text.count("\n") + 1 for record in batch)
                    _logger.warning("%d lines of output could not be stored in Prefect: %s", lines, error)
                    return
                await asyncio.sleep(backoff.next())

    def _as_log(self, record: OutputRecord) -> dict[str, object]:
        return {
            "name": f"prefect_mlprojects.{record.stream}",
            "level": logging.INFO,
            "message": record.text,
            "timestamp": datetime.fromtimestamp(record.time, tz=timezone.utc).isoformat(),
            "flow_run_id": str(self._task_run.flow_run_id),
            "task_run_id": str(self._task_run.id),
        }
