"""The state file of the embedded server, and the process that it names."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from prefect_mlprojects._support.files import check_private, write_atomically
from prefect_mlprojects._support.process.tree import process_birth, process_owner_and_command

HOST = "127.0.0.1"
INSTANCE_HEADER = "x-prefect-mlprojects-server"
"""Response header of every embedded server; its value identifies the instance."""
APPLICATION = "prefect_mlprojects.server.application:create_app"
"""The server's application, as its command line names it."""

_PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class ServerAddress:
    """URLs of a Prefect server, the UI's if it is known, and whether this call started it."""

    api_url: str
    ui_url: str | None
    started: bool = False


@dataclass(frozen=True)
class ServerRecord:
    """Content of the embedded server's state file, ``server.json``.

    `birth` is the process's start time (`process_birth`), which differs if the pid was reused; `instance` the value of
    `INSTANCE_HEADER` in the server's responses; `ready` is True once it has answered; `protected` if it asks for a password.
    """

    pid: int
    birth: str
    port: int
    instance: str
    ready: bool
    protected: bool = False

    def address(self, *, started: bool = False) -> ServerAddress:
        """Returns the server's URLs."""
        return ServerAddress(f"http://{HOST}:{self.port}/api", f"http://{HOST}:{self.port}", started)


def read_record(directory: Path) -> ServerRecord | None:
    """Reads a server folder's state file; returns None if it is missing or invalid.

    Raises:
        PermissionError: Another user may have placed it there.
    """
    check_private(directory)
    try:
        data = json.loads((directory / "server.json").read_text(encoding="utf-8"))
        kinds = {"pid": int, "birth": str, "port": int, "instance": str, "ready": bool}
        # Records of older versions do not have the key; their servers had no password.
        protected = bool(data.get("protected", False))
        return ServerRecord(**{name: kind(data[name]) for name, kind in kinds.items()}, protected=protected)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_record(directory: Path, record: ServerRecord) -> None:
    """Replaces a server folder's state file."""
    write_atomically(directory / "server.json", json.dumps(asdict(record)))


def is_alive(record: ServerRecord) -> bool:
    """Returns whether the recorded process is alive; one of another user, or that is no embedded server, does not count."""
    if process_birth(record.pid) != record.birth:
        return False
    owner, command = process_owner_and_command(record.pid)
    return owner == os.geteuid() and APPLICATION in command


def answers(record: ServerRecord) -> bool:
    """Returns whether the recorded server reports that it is healthy; another server on its port does not count."""
    import http.client  # takes longer than the rest of this module

    connection = http.client.HTTPConnection(HOST, record.port, timeout=_PROBE_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/api/health")
            response = connection.getresponse()
            healthy = response.status == 200 and response.read(100).strip() == b"true"
        except (OSError, http.client.HTTPException):
            return False
        return healthy and response.headers.get(INSTANCE_HEADER) == record.instance


def count_active_runs(record: ServerRecord) -> int:
    """Returns the number of flow runs that are executing on a server without a password; 0 if it can't tell."""
    import http.client

    wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
    connection = http.client.HTTPConnection(HOST, record.port, timeout=10)
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/api/flow_runs/count", json.dumps(wanted), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return int(response.read()) if response.status == 200 else 0
        except (OSError, http.client.HTTPException, ValueError):
            return 0


def stop_process(record: ServerRecord, timeout: float = 10.0) -> None:
    """Sends SIGTERM, then SIGKILL, to the recorded process; waits up to `timeout` seconds for it to exit after each.

    Raises `PermissionError` if the process belongs to another user.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not is_alive(record):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)
        deadline = time.monotonic() + timeout
        while is_alive(record) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(record.pid, os.WNOHANG)
            time.sleep(0.05)
