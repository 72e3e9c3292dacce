"""The Prefect server that runs use: the configured one, or one that this package starts in the background and shares.

Nothing here imports Prefect: a command line asks for the server's address before it pays for that import.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.profile import configured_api_url, read_setting
from prefect_mlprojects.server.state import (
    HOST,
    INSTANCE_HEADER,
    ServerRecord,
    answers,
    end,
    is_alive,
    process_birth,
    read_record,
    write_record,
)
from prefect_mlprojects.settings import server_directory, server_port, server_start_timeout

Announce = Callable[[str], None]

_BUSY_SECONDS = 30.0
_MAX_LOG_BYTES = 5_000_000
_LOG_MARK = "=== server started "
_NOT_FOR_THE_SERVER = {
    # What a surrounding run, or this process's own Prefect client, was told.
    "PREFECT_API_URL",
    "PREFECT_API_KEY",
    "PREFECT_MLPROJECTS_EXECUTION_ID",
    "MLFLOW_RUN_ID",
}


@dataclass(frozen=True)
class ServerAddress:
    """Where a Prefect server is.

    Attributes:
        api_url: The API's address.
        ui_url: The UI's address, when it is known.
        started: Whether this call started it.
    """

    api_url: str
    ui_url: str | None
    started: bool = False


@dataclass(frozen=True)
class ServerStatus:
    """Whether the embedded server runs.

    Attributes:
        running: Whether its process is alive.
        healthy: Whether it answers.
        address: Where it is; None when it does not run.
        pid: Its process; None when it does not run.
        directory: Where its database and log are.
    """

    running: bool
    healthy: bool
    address: ServerAddress | None
    pid: int | None
    directory: Path

    def __str__(self) -> str:
        if not self.running or self.address is None:
            return f"The embedded Prefect server does not run. Its folder: {self.directory}"
        health = "" if self.healthy else "; it does not answer"
        return (
            f"The embedded Prefect server runs: {self.address.ui_url}  (API: {self.address.api_url}, process {self.pid}"
            f"{health}). Its folder: {self.directory}"
        )


def resolve_api(announce: Announce | None = None) -> ServerAddress:
    """Returns the Prefect server to use: the configured one, or the embedded one, which is started when it does not run.

    Args:
        announce: Takes lines about a server that is being started; None prints them to stderr.

    Raises:
        PrefectServerError: The configured server can't be reached, or the embedded one can't be started.
    """
    configured = configured_api_url()
    if configured:
        check_reachable(configured)
        return ServerAddress(configured, _ui_of(configured))
    return ensure_server(announce)


def check_reachable(api_url: str, timeout: float = 10.0) -> None:
    """Makes sure that a Prefect server answers.

    Args:
        api_url: The API's address.
        timeout: Seconds to wait for an answer.

    Raises:
        PrefectServerError: It does not, with the address (passwords masked) and what to do.
    """
    from prefect_mlprojects.server.address import check_reachable as check

    check(api_url, timeout)


def _ui_of(api_url: str) -> str | None:
    if os.environ.get("PREFECT_UI_URL"):
        return os.environ["PREFECT_UI_URL"]
    if "api.prefect.cloud/api" in api_url:
        return (
            api_url.replace("https://api.prefect.cloud/api", "https://app.prefect.cloud")
            .replace("/accounts/", "/account/")
            .replace("/workspaces/", "/workspace/")
        )
    return api_url.rstrip("/").removesuffix("/api") if api_url.rstrip("/").endswith("/api") else None


def ensure_server(announce: Announce | None = None) -> ServerAddress:
    """Returns the embedded server, starting it in the background when it does not run.

    Any number of processes may call this at the same time: one starts it, the others wait for it.

    Args:
        announce: Takes lines about the start; None prints them to stderr.

    Raises:
        PrefectServerError: It could not be started.
    """
    directory = server_directory()
    record = read_record(directory)
    if record is not None and is_alive(record) and answers(record):
        return _address(record)
    from filelock import FileLock

    say = announce or _print_to_stderr
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "server.lock")
        with contextlib.ExitStack() as stack:
            try:
                lock.acquire(timeout=0)
            except TimeoutError:
                say("Waiting for the Prefect server that another process is starting …")
                lock.acquire(timeout=server_start_timeout() + _BUSY_SECONDS)
            stack.callback(lock.release)
            record = _wait_for_recorded(directory, say)
            return _address(record) if record is not None else _start(directory, say)
    except TimeoutError:
        raise PrefectServerError(
            f"Another process has been starting the Prefect server in {directory} for too long. Look at"
            f" {directory / 'server.log'}."
        ) from None
    except OSError as error:
        raise PrefectServerError(
            f"The embedded Prefect server needs the folder {directory}, which can't be used:"
            f" {error.strerror or str(error) or type(error).__name__}. Set PREFECT_MLPROJECTS_SERVER_DIR (or PREFECT_HOME) to"
            " a folder that can be written, or PREFECT_API_URL to a server that runs."
        ) from None


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - our own messages go to stderr


def _address(record: ServerRecord, *, started: bool = False) -> ServerAddress:
    return ServerAddress(record.api_url, record.ui_url, started)


def _wait_for_recorded(directory: Path, say: Announce) -> ServerRecord | None:
    """Returns the recorded server once it answers; None when there is none. The caller holds the lock.

    A server that lives is not answering because it is busy, or because whoever started it was killed before it was
    ready: both pass, and ending it would fail the runs that use it. One that never answers is ended, since it holds
    the port and the database.
    """
    record = read_record(directory)
    if record is None or not is_alive(record):
        return None
    if not answers(record):
        say(f"Waiting for the Prefect server (process {record.pid}) to answer …")
        patience = min(_BUSY_SECONDS, server_start_timeout()) if record.ready else server_start_timeout()
        failure = _wait_until_healthy(record, None, patience, say)
        if failure is not None:
            end(record)
            say(f"The Prefect server (process {record.pid}) {failure}; another one takes its place.")
            return None
    if not record.ready:
        write_record(directory, replace(record, ready=True))
    return record


def _start(directory: Path, say: Announce) -> ServerAddress:
    """Starts the server; the caller holds the lock."""
    database = _configured_database()
    first = False
    if database is None:
        path = directory / "prefect.db"
        first = not path.exists()
        _create_database(path)
        database = f"sqlite+aiosqlite:///{path}"
    say(f"Starting a local Prefect server ({'the first start takes' if first else 'this takes'} some 15 s) …")
    if _goes_through_a_proxy():
        say(f"HTTP_PROXY is set: Prefect's client asks that proxy for {HOST} too, unless NO_PROXY={HOST} is set.")
    log = directory / "server.log"
    for attempt in range(3):
        record, process = _spawn(directory, _choose_port(server_port() if attempt == 0 else 0), log, database)
        failure = _wait_until_healthy(record, process, server_start_timeout(), say)
        if failure is None:
            write_record(directory, replace(record, ready=True))
            say(f"Prefect server: {record.ui_url}  (it stays; stop it with: mlprojects server stop)")
            return _address(record, started=True)
        end(record)
        if "address already in use" not in _tail(log):
            break
    raise PrefectServerError(f"The embedded Prefect server {failure}. Its log, {log}, ends:\n{_tail(log)}")


def _goes_through_a_proxy() -> bool:
    if not any(name.lower() in {"http_proxy", "all_proxy"} for name in os.environ):
        return False
    from urllib.request import getproxies_environment, proxy_bypass

    return bool(getproxies_environment().keys() & {"http", "all"}) and not proxy_bypass(HOST)


def _configured_database() -> str | None:
    for name in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        url = read_setting(name, "server", "database", "connection_url")
        if url:
            return url
    return None


def _create_database(path: Path) -> None:
    import sqlite3

    from prefect_mlprojects.server.database import create_database

    try:
        create_database(path)
    except sqlite3.Error as error:
        raise OSError(None, f"the database could not be created: {error}") from error


def _choose_port(preferred: int) -> int:
    """Returns the preferred port, or a free one when something else has it."""
    with socket.socket() as caller, socket.socket() as probe:
        # Where binding to one address succeeds although a server listens on all of them (macOS), it answers.
        caller.settimeout(1)
        taken = preferred != 0 and caller.connect_ex((HOST, preferred)) == 0
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, 0 if taken else preferred))
        except OSError:
            probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _spawn(directory: Path, port: int, log: Path, database: str) -> tuple[ServerRecord, subprocess.Popen[bytes]]:
    """Starts the server's process and records it at once: it must be found again if this process is killed now."""
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PREFECT__") and name not in _NOT_FOR_THE_SERVER
    }
    environment |= {
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
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
        end(record)
        raise
    return record, process


def _wait_until_healthy(
    record: ServerRecord, process: subprocess.Popen[bytes] | None, patience: float, say: Announce
) -> str | None:
    """Waits for the first good answer; returns what went wrong otherwise."""
    started = time.monotonic()
    told = started
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
        if now - started > patience:
            return f"did not answer within {patience:g} s (PREFECT_MLPROJECTS_SERVER_START_TIMEOUT)"
        if now - told >= 5:
            told = now
            say(f"  … still starting ({now - started:.0f} s)")


def _tail(log: Path, lines: int = 15) -> str:
    """Returns the last lines that the last server wrote."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 20_000))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return redact("\n".join(f"  {line}" for line in text.rpartition(_LOG_MARK)[2].splitlines()[-lines:]))


def server_status() -> ServerStatus:
    """Tells whether the embedded server runs, and where."""
    directory = server_directory()
    record = read_record(directory)
    if record is None or not is_alive(record):
        return ServerStatus(running=False, healthy=False, address=None, pid=None, directory=directory)
    return ServerStatus(
        running=True, healthy=answers(record), address=_address(record), pid=record.pid, directory=directory
    )


def stop_server() -> bool:
    """Stops the embedded server; its database stays, and so does its record, which nobody believes of a dead process.

    Returns:
        Whether it ran.

    Raises:
        PrefectServerError: It belongs to somebody else.
    """
    record = read_record(server_directory())
    if record is None or not is_alive(record):
        return False
    try:
        end(record)
    except PermissionError:
        raise PrefectServerError(
            f"The embedded Prefect server (process {record.pid}) belongs to another user, who has to stop it.",
            api_url=record.api_url,
        ) from None
    return True
