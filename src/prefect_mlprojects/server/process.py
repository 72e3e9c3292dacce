"""Chooses the Prefect server for runs: the configured one, or an embedded one that all processes of a user share.

Nothing here imports Prefect: the command line resolves the address before it pays for that import.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from prefect_mlprojects._support.files import close_files, open_private, private_directory
from prefect_mlprojects._support.locks import LockTimeoutError, hold_lock
from prefect_mlprojects._support.process.tree import process_birth
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.access import login_link, new_auth, read_auth, remember_auth, write_auth
from prefect_mlprojects.server.address import (
    check_reachable,
    choose_port,
    configured_api_url,
    publish_in_process,
    read_setting,
    ui_url_of,
    uses_proxy,
)
from prefect_mlprojects.server.environment import server_environment
from prefect_mlprojects.server.record import (
    APPLICATION,
    HOST,
    INSTANCE_HEADER,
    ServerAddress,
    ServerRecord,
    answers,
    count_active_runs,
    is_alive,
    read_record,
    stop_process,
    write_record,
)
from prefect_mlprojects.settings import server_auth, server_directory, server_port, server_start_timeout

__all__ = ["ServerAddress", "ServerStatus", "ensure_server", "resolve_api", "server_status", "stop_server"]

Announce = Callable[[str], None]

DATABASE_EXIT_CODE = 73
"""The server process's exit code when its database can't be created: ``EX_CANTCREAT`` of sysexits.h."""
DATABASE_ERROR_PREFIX = "the database could not be created: "
"""Start of the line with which the server process says why."""

_BUSY_SECONDS = 30.0
_MAX_LOG_BYTES = 5_000_000
_LOG_MARK = "=== server started "


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
            f"The embedded Prefect server is running: {login_link(self.address.ui_url)} (API: {self.address.api_url}, process "
            f"{self.pid}{health}). Folder: {self.directory}"
        )


def resolve_api(announce: Announce | None = None) -> ServerAddress:
    """Returns the configured Prefect server, or the embedded one, which is started if it is not running.

    `announce` receives progress lines of a start; None prints them to stderr.

    Raises:
        PrefectServerError: The configured server can't be reached, or the embedded one can't be started.
    """
    configured = configured_api()
    if configured:
        check_reachable(configured)
        return ServerAddress(configured, ui_url_of(configured))
    return ensure_server(announce)


def configured_api() -> str | None:
    """Returns the address of the configured Prefect API, whose password is then known if it is the embedded server's."""
    configured = configured_api_url()
    if configured:
        # A profile may have the password of another server.
        _remember_if_embedded(configured)
    return configured


def _remember_if_embedded(api_url: str) -> None:
    """Uses the embedded server's password for a configured URL that is the embedded server's."""
    directory = server_directory()
    with contextlib.suppress(PermissionError):
        record = read_record(directory)
        if record is not None and record.address().api_url == api_url.rstrip("/") and is_alive(record):
            remember_auth(api_url, read_auth(directory) if record.protected else None)


def ensure_server(announce: Announce | None = None) -> ServerAddress:
    """Returns the embedded server; starts it in the background if it is not running.

    Any number of processes may call this at the same time: one starts the server, the others wait for it. Raises
    `PrefectServerError` if it could not be started.
    """
    directory = server_directory()
    report = announce or _print_to_stderr
    with _folder_errors(directory):
        record = read_record(directory)
        if record is not None and _is_acceptable(record) and is_alive(record) and answers(record):
            return _published(directory, record)
        private_directory(directory)
        with hold_lock(
            directory / "server.lock",
            timeout=server_start_timeout() + _BUSY_SECONDS,
            on_wait=lambda: report("Waiting for the Prefect server that another process is starting ..."),
        ):
            record = _wait_for_recorded(directory, report)
            if record is not None and not _is_acceptable(record):
                record = _replace_unprotected(record, report)
            if record is not None:
                return _published(directory, record)
            return _published(directory, _start(directory, report), started=True)


@contextlib.contextmanager
def _folder_errors(directory: Path) -> Iterator[None]:
    """Converts an ``OSError`` on the server's folder to a `PrefectServerError` with advice."""
    try:
        yield
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


def _published(directory: Path, record: ServerRecord, *, started: bool = False) -> ServerAddress:
    address = record.address(started=started)
    remember_auth(address.api_url, read_auth(directory) if record.protected else None)
    publish_in_process(address.api_url)
    return address


def _is_acceptable(record: ServerRecord) -> bool:
    return record.protected or not server_auth()


def _replace_unprotected(record: ServerRecord, report: Announce) -> ServerRecord | None:
    """Stops a server without a password, as older versions started them; one with active runs is used.

    The caller holds the lock.
    """
    who = f"The Prefect server (process {record.pid}) was started without a password"
    if count_active_runs(record):
        report(f"{who} and has active runs. Restart it once they have ended: `mlprojects server stop`.")
        return record
    report(f"{who}; starting one with a password. Workers that use it have to be restarted.")
    stop_process(record)
    return None


def server_status() -> ServerStatus:
    """Returns whether the embedded server is running, and where."""
    directory = server_directory()
    with _folder_errors(directory):
        record = read_record(directory)
        if record is None or not is_alive(record):
            return ServerStatus(directory)
        return ServerStatus(directory, _published(directory, record), record.pid, answers(record))


def stop_server() -> bool:
    """Stops the embedded server and returns whether it was running; its database and state file stay."""
    directory = server_directory()
    with _folder_errors(directory):
        record = read_record(directory)
        if record is None or not is_alive(record):
            return False
        stop_process(record)
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


def _start(directory: Path, report: Announce) -> ServerRecord:
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
    close_files(directory, "prefect.db*", "server.*")
    for attempt in range(3):
        record, process = _spawn(directory, choose_port(HOST, port if attempt == 0 else 0), log, url)
        failure = _wait_until_healthy(record, process, server_start_timeout(), report)
        if failure is None:
            record = replace(record, ready=True)
            write_record(directory, record)
            link = login_link(_published(directory, record).ui_url)
            report(f"Prefect server: {link}  (stays running; stop it with `mlprojects server stop`)")
            return record
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
    auth = _choose_auth(directory, port)
    environment = server_environment(os.environ, port, url, auth)
    instance = uuid4().hex
    argv = [sys.executable, "-m", "uvicorn", "--factory", APPLICATION]
    argv += ["--host", HOST, "--port", str(port), "--timeout-keep-alive", "5", "--log-level", "warning"]
    argv += ["--header", f"{INSTANCE_HEADER}:{instance}"]
    with os.fdopen(open_private(log, os.O_WRONLY | os.O_APPEND), "ab") as output:
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
            umask=0o077,
        )
    birth = process_birth(process.pid) or ""
    record = ServerRecord(process.pid, birth, port, instance, ready=False, protected=auth is not None)
    try:
        write_record(directory, record)
    except BaseException:
        stop_process(record)
        raise
    return record, process


def _choose_auth(directory: Path, port: int) -> Secret | None:
    """Returns the password of a server that starts on a port, and stores it; None if it shall have none.

    It stays the same over restarts, for browsers and workers. On another port it is new: whoever took the last one may have
    received it from a client.
    """
    configured = read_setting("PREFECT_SERVER_API_AUTH_STRING", "server", "api", "auth_string")
    last = read_record(directory)
    kept = read_auth(directory) if last is not None and last.port == port else None
    auth = Secret(configured) if configured else (kept or new_auth()) if server_auth() else None
    write_auth(directory, auth)
    return auth


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
