"""What is recorded of the embedded server, and its process: recognised, asked, ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HOST = "127.0.0.1"
INSTANCE_HEADER = "x-prefect-mlprojects-server"
"""The header of every answer of an embedded server; its value tells which one it is."""

_PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class ServerRecord:
    """What the state file says of the embedded server.

    Attributes:
        pid: Its process.
        birth: When that process started, as the system tells it: a recycled pid has another one.
        port: Its port.
        instance: The value of ``INSTANCE_HEADER`` in its answers: another server on that port has none or another.
        ready: Whether it has answered once. One that has not is still starting.
    """

    pid: int
    birth: str
    port: int
    instance: str
    ready: bool

    @property
    def ui_url(self) -> str:
        """The UI's address."""
        return f"http://{HOST}:{self.port}"

    @property
    def api_url(self) -> str:
        """The API's address."""
        return f"{self.ui_url}/api"


def read_record(directory: Path) -> ServerRecord | None:
    """Reads the state file of a server's folder; None when there is none that makes sense."""
    try:
        facts = json.loads((directory / "server.json").read_text(encoding="utf-8"))
        return ServerRecord(
            pid=int(facts["pid"]),
            birth=str(facts["birth"]),
            port=int(facts["port"]),
            instance=str(facts["instance"]),
            ready=bool(facts["ready"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(directory: Path, record: ServerRecord) -> None:
    """Replaces the state file of a server's folder, whole.

    Raises:
        OSError: The folder can't be written.
    """
    temporary = directory / f".server.json.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
    temporary.replace(directory / "server.json")


def process_birth(pid: int) -> str | None:
    """Returns when a process started, unique among all that had its pid; None when there is no such process."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return listed.stdout.strip() or None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    # proc(5): field 3 is the state, field 22 the start time in ticks since boot.
    return None if fields[0] in {"Z", "X"} else f"{boot}/{fields[19]}"


def is_alive(record: ServerRecord) -> bool:
    """Tells whether the recorded process, and not another that got its pid, lives."""
    return process_birth(record.pid) == record.birth


def answers(record: ServerRecord) -> bool:
    """Tells whether the recorded server, and not another on its port, answers that it is healthy."""
    import http.client  # takes longer than all of the rest of this module

    connection = http.client.HTTPConnection(HOST, record.port, timeout=_PROBE_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/api/health")
            answer = connection.getresponse()
            healthy = answer.status == 200 and answer.read(100).strip() == b"true"
        except (OSError, http.client.HTTPException):
            return False
        return healthy and answer.headers.get(INSTANCE_HEADER) == record.instance


def end(record: ServerRecord, patience: float = 10.0) -> None:
    """Ends the recorded process: asks, waits, kills; never another process that got its pid.

    Args:
        record: The process.
        patience: Seconds to wait after asking, and after killing.

    Raises:
        PermissionError: It belongs to somebody else.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not is_alive(record):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)
        deadline = time.monotonic() + patience
        while is_alive(record) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(record.pid, os.WNOHANG)
            time.sleep(0.05)
