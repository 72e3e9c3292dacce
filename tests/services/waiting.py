"""Waiting for conditions and processes, and free ports."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


def wait_for(condition: Callable[[], _T], what: str, seconds: float = 180, log: Path | None = None) -> _T:
    """Polls a condition until it is true and returns its result; at the time-out the test fails with `what` and `log`."""
    deadline = time.monotonic() + seconds
    pause = 0.02
    while not (found := condition()):
        said = f":\n{log.read_text(errors='replace')}" if log and log.exists() else ""
        assert time.monotonic() < deadline, f"timed out waiting for {what}{said}"
        time.sleep(pause)
        # Questions to a server take its time from what is waited for.
        pause = min(pause * 1.5, 0.5)
    return found


def is_alive(pid: int) -> bool:
    """True if a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_exit(process: subprocess.Popen[bytes], said: Path, seconds: float = 120) -> int:
    """Returns a process's exit code; one that hangs dumps its threads into `said`, its stderr (``PYTHONFAULTHANDLER=1``)."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.wait()
        raise AssertionError(f"it did not end:\n{said.read_text(errors='replace')}") from None


def free_port() -> int:
    """Returns an unused port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
