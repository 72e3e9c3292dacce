"""Output for a Prefect server that takes it more slowly than it comes."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from prefect_mlprojects.tasks import flow_log
from prefect_mlprojects.tasks.flow_log import FlowRunLog


class SlowClient:
    """Takes a second for each request, as a busy server does."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    async def create_logs(self, logs: list[dict[str, Any]]) -> None:
        await asyncio.sleep(1)
        self.lines += [line for log in logs for line in log["message"].split("\n")]


def test_output_that_had_to_be_dropped_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flow_log, "_MAX_QUEUED_BYTES", 400_000)
    monkeypatch.setattr(flow_log, "_SECONDS_TO_WAIT_FOR_SERVER", 0.05)
    client: Any = SlowClient()
    task_run: Any = SimpleNamespace(id=uuid4(), flow_run_id=uuid4())

    async def run() -> None:
        async with FlowRunLog(client, task_run) as log:
            for number in range(20):
                await asyncio.to_thread(log.write, "stdout", f"{number:0150000}\n".encode() * 2)

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())

    lost = 40 - len(client.lines)
    assert lost > 0
    assert f"{lost} lines of output came faster" in caplog.text
