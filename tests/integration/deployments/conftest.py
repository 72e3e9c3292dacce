"""Real workers on the session's Prefect server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import use_server

PROJECT = """\
name: NAME
entry_points:
  main:
    parameters:
      count: {type: int, default: 0}
      word: {type: string, default: ""}
      needed: float
    command: "echo got {count} {word} {needed}"
  sleep:
    command: "echo sleeping $((20 + 3)); sleep 600 & wait"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: Any) -> Path:
    """A project of the test's own, tracked in a store of its own."""
    folder = tmp_path / "project"
    folder.mkdir()
    # All tests share a server, on which a deployment has its project's name.
    (folder / "MLproject").write_text(PROJECT.replace("NAME", f"deployed-{uuid.uuid4().hex[:8]}"))
    monkeypatch.chdir(tmp_path)
    use_server(monkeypatch, prefect_server.api_url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return folder


@pytest.fixture
def call(prefect_server: Any) -> Callable[..., Any]:
    """Calls a coroutine function of Prefect's client: ``call("read_deployment", id)``."""
    from prefect_mlprojects.server.api import call_api

    async def method(client: Any, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return await getattr(client, name)(*arguments, **named)

    return lambda name, *arguments, **named: call_api(prefect_server.api_url, method, name, arguments, named)


@pytest.fixture
def pool(call: Callable[..., Any]) -> Iterator[str]:
    """A process work pool of the test's own."""
    from prefect.client.schemas.actions import WorkPoolCreate

    name = f"test-{uuid.uuid4().hex[:8]}"
    call("create_work_pool", WorkPoolCreate(name=name, type="process"))
    yield name
    call("delete_work_pool", name)


@contextmanager
def started(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs ``mlprojects`` in the background, and ends it as Ctrl-C does."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect_mlprojects", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"it did not end: {log.read_text()}") from None
