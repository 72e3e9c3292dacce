"""What tests with real services need: patience, and ports."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


def wait_for(condition: Callable[[], _T], what: str, seconds: float = 180) -> _T:
    """Returns what the condition does once that is true; a test that waits in vain fails with what it waited for."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)
    return found


def wait_for_exit(process: subprocess.Popen[bytes], said: Path, seconds: float = 120) -> int:
    """Returns a process's exit code; one that hangs is made to tell where, for which it needs ``PYTHONFAULTHANDLER=1``.

    Args:
        process: The process.
        said: The file that its standard error goes to.
        seconds: How long it may take.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.wait()
        raise AssertionError(f"it did not end:\n{said.read_text(errors='replace')}") from None


def free_port() -> int:
    """Returns a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
