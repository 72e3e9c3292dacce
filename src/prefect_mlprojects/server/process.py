"""Chooses the Prefect server for runs: the configured one, or an embedded one that all processes of a user share.

Nothing here imports Prefect: the command line resolves the address before it pays for that import.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from prefect_mlprojects._support.files import write_atomically
from prefect_mlprojects._support.locks import LockTimeoutError, hold_lock
from prefect_mlprojects._support.process.tree import process_birth
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.address import (
    check_reachable,
    choose_port,
    configured_api_url,
    publish_in_process,
    read_setting,
    ui_url_of,
    uses_proxy,
)
from prefect_mlprojects.settings import server_directory, server_port, server_start_timeout

Announce = Callable[[str], None]

HOST = "127.0.0.1"
INSTANCE_HEADER = "x-prefect-mlprojects-server"
"""Response header of every embedded server; its value identifies the instance."""

DATABASE_EXIT_CODE = 73
"""The server process's exit code when its database can't be created: ``EX_CANTCREAT`` of sysexits.h."""
DATABASE_ERROR_PREFIX = "the database could not be created: "
"""Start of the line with which the server process says why."""

_BUSY_SECONDS = 30.0
_PROBE_SECONDS = 2.0
_MAX_LOG_BYTES = 5_000_000
_LOG_MARK = "=== server started "
# Variables of an enclosing run, or for Prefect clients only.
_CLIENT_VARIABLES = {"PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_MLPROJECTS_EXECUTION_ID", "MLFLOW_RUN_ID"}


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
    `INSTANCE_HEADER` in the server's responses; `ready` is True once it has answered.
    """

    pid: int
    birth: str
    port: int
    instance: str
    ready: bool

    def address(self, *, started: bool = False) -> ServerAddress:
        """Returns the server's URLs."""
        return ServerAddress(f"http://{HOST}:{self.port}/api", f"http://{HOST}:{self.port}", started)


@dataclass(frozen=True)
class ServerStatus:
    """State of the embedded server; `address` and `pid` are None if its process is not alive, `healthy` if it answers."""

    directory: Path
    address: ServerAddress | None = None
    pid: int | None = None
    healthy: bool = False

    @property
    def running(self) -> bool:
        """True if its process is alive."""
        return self.address is not None

    def __str__(self) -> str:
        if self.address is None:
            return f"The embedded Prefect server is not running. Folder: {self.directory}"
        health = "" if self.healthy else ", does not answer"
        return (
            f"The embedded Prefect server is running: {self.address.ui_url} (API: {self.address.api_url}, process "
            f"{self.pid}{health}). Folder: {self.directory}"
        )


def resolve_api(announce: Announce | None = None) -> ServerAddress:
    """Returns the configured Prefect server, or the embedded one, which is started if it is not running.

    `announce` receives progress lines of a start; None prints them to stderr.

    Raises:
        PrefectServerError: The configured server can't be reached, or the embedded one can't be started.
    """
    configured = configured_api_url()
    if configured:
        check_reachable(configured)
        return ServerAddress(configured, ui_url_of(configured))
    return ensure_server(announce)


def ensure_server(announce: Announce | None = None) -> ServerAddress:
    """Returns the embedded server; starts it in the background if it is not running.

    Any number of processes may call this at the same time: one starts the server, the others wait for it. Raises
    `PrefectServerError` if it could not be started.
    """
    directory = server_directory()
    record = read_record(directory)
    if record is not None and is_alive(record) and answers(record):
        return _published(record.address())
    report = announce or _print_to_stderr
    try:
        with hold_lock(
            directory / "server.lock",
            timeout=server_start_timeout() + _BUSY_SECONDS,
            on_wait=lambda: report("Waiting for the Prefect server that another process is starting ..."),
        ):
            record = _wait_for_recorded(directory, report)
            return _published(record.address() if record is not None else _start(directory, report))
    except LockTimeoutError:
        raise PrefectServerError(
            f"Another process has been starting the Prefect server in {directory} for too long. See"
            f" {directory / 'server.log'}."
        ) from None
    except OSError as error:
        raise PrefectServerError(
            f"The embedded Prefect server needs the folder {directory}, which can't be used:"
            f" {error.strerror or str(error) or type(error).__name__}. Set PREFECT_MLPROJECTS_SERVER_DIR (or PREFECT_HOME)"
            " to a writable folder, or PREFECT_API_URL to a running server."
        ) from None


def _published(address: ServerAddress) -> ServerAddress:
    publish_in_process(address.api_url)
    return address


def server_status() -> ServerStatus:
    """Returns whether the embedded server is running, and where."""
    directory = server_directory()
    record = read_record(directory)
    if record is None or not is_alive(record):
        return ServerStatus(directory)
    return ServerStatus(directory, record.address(), record.pid, answers(record))


def stop_server() -> bool:
    """Stops the embedded server and returns whether it was running; its database and state file stay."""
    record = read_record(server_directory())
    if record is None or not is_alive(record):
        return False
    try:
        stop_process(record)
    except PermissionError:
        raise PrefectServerError(
            f"The embedded Prefect server (process {record.pid}) belongs to another user, who has to stop it.",
            api_url=record.address().api_url,
        ) from None
    return True


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - our own messages go to stderr


def _wait_for_recorded(directory: Path, report: Announce) -> ServerRecord | None:
    """Returns the recorded server once it answers, None if there is none. The caller holds the lock.

    A live server does not answer while it is busy, or because the process that started it was killed before it was
    ready: both pass, and stopping it would fail the runs that use it. One that never answers is stopped, since it
    occupies the port and the database.
    """
    record = read_record(directory)
    if record is None or not is_alive(record):
        return None
    if not answers(record):
        report(f"Waiting for the Prefect server (process {record.pid}) to answer ...")
        timeout = min(_BUSY_SECONDS, server_start_timeout()) if record.ready else server_start_timeout()
        failure = _wait_until_healthy(record, None, timeout, report)
        if failure is not None:
            stop_process(record)
            report(f"The Prefect server (process {record.pid}) {failure}; starting another one.")
            return None
    if not record.ready:
        write_record(directory, replace(record, ready=True))
    return record


def _start(directory: Path, report: Announce) -> ServerAddress:
    """Starts the server; the caller holds the lock."""
    variables = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
    configured = (read_setting(name, "server", "database", "connection_url") for name in variables)
    path = directory / "prefect.db"
    url = next(filter(None, configured), f"sqlite+aiosqlite:///{path}")
    first = url.endswith(f":///{path}") and not path.exists()
    report(f"Starting a local Prefect server ({'the first start takes' if first else 'this takes'} some 15 s) ...")
    if uses_proxy(HOST):
        report(f"HTTP_PROXY is set: Prefect's client asks that proxy for {HOST} too, unless NO_PROXY={HOST} is set.")
    log = directory / "server.log"
    # The port of the last server: its address is in profiles, links and other processes.
    last = read_record(directory)
    port = server_port(last.port if last is not None else None)
    for attempt in range(3):
        record, process = _spawn(directory, choose_port(HOST, port if attempt == 0 else 0), log, url)
        failure = _wait_until_healthy(record, process, server_start_timeout(), report)
        if failure is None:
            write_record(directory, replace(record, ready=True))
            report(f"Prefect server: {record.address().ui_url}  (stays running; stop it with `mlprojects server stop`)")
            return record.address(started=True)
        stop_process(record)
        tail = _tail(log)
        if first and process.returncode == DATABASE_EXIT_CODE:
            raise OSError(
                None, next((line.strip() for line in tail.splitlines() if DATABASE_ERROR_PREFIX in line), failure)
            )
        # Prefect's own shutdown may log much after uvicorn's line about the port.
        if "address already in use" not in _tail(log, 500):
            break
    raise PrefectServerError(f"The embedded Prefect server {failure}. The end of its log, {log}:\n{tail}")


def _spawn(directory: Path, port: int, log: Path, url: str) -> tuple[ServerRecord, subprocess.Popen[bytes]]:
    """Starts the server's process and records it at once, so that it is found if this process is killed now."""
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PREFECT__") and name not in _CLIENT_VARIABLES
    }
    environment |= {
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": url,
    }
    instance = uuid4().hex
    argv = [sys.executable, "-m", "uvicorn", "--factory", "prefect_mlprojects.server.application:create_app"]
    argv += ["--host", HOST, "--port", str(port), "--timeout-keep-alive", "5", "--log-level", "warning"]
    argv += ["--header", f"{INSTANCE_HEADER}:{instance}"]
    with log.open("ab") as output:
        output.write(f"{_LOG_MARK}{time.strftime('%Y-%m-%d %H:%M:%S')} on port {port}\n".encode())
        output.flush()
        process = subprocess.Popen(
            argv,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record = ServerRecord(process.pid, process_birth(process.pid) or "", port, instance, ready=False)
    try:
        write_record(directory, record)
    except BaseException:
        stop_process(record)
        raise
    return record, process


def _wait_until_healthy(
    record: ServerRecord, process: subprocess.Popen[bytes] | None, timeout: float, report: Announce
) -> str | None:
    """Waits until the server answers; returns None, or what went wrong. `process` is None for another process's child."""
    reported = started = time.monotonic()
    while True:
        if answers(record):
            return None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return f"ended at its start (exit code {process.wait(timeout=0.1)})"
        elif is_alive(record):
            time.sleep(0.1)
        else:
            return "ended"
        now = time.monotonic()
        if now - started > timeout:
            return f"did not answer within {timeout:g} s (PREFECT_MLPROJECTS_SERVER_START_TIMEOUT)"
        if now - reported >= 5:
            reported = now
            report(f"  ... still starting ({now - started:.0f} s)")


def _tail(log: Path, lines: int = 15) -> str:
    """Returns the last lines that the latest server wrote to the log."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 20_000))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return redact("\n".join(f"  {line}" for line in text.rpartition(_LOG_MARK)[2].splitlines()[-lines:]))


def read_record(directory: Path) -> ServerRecord | None:
    """Reads a server folder's state file; returns None if it is missing or invalid."""
    try:
        data = json.loads((directory / "server.json").read_text(encoding="utf-8"))
        kinds = {"pid": int, "birth": str, "port": int, "instance": str, "ready": bool}
        return ServerRecord(**{name: kind(data[name]) for name, kind in kinds.items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(directory: Path, record: ServerRecord) -> None:
    """Replaces a server folder's state file."""
    write_atomically(directory / "server.json", json.dumps(asdict(record)))


def is_alive(record: ServerRecord) -> bool:
    """Returns whether the recorded process is alive; another process that got its pid does not count."""
    return process_birth(record.pid) == record.birth


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
