"""The Prefect server that runs use: the configured one, or one that this package starts in the background and shares.

Nothing here imports Prefect: a command line asks for the server's address before it pays for that import.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from prefect_mlprojects._redaction import mask_text
from prefect_mlprojects._server_profile import configured_api_url
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.settings import server_directory, server_port, server_start_timeout

Announce = Callable[[str], None]

_HOST = "127.0.0.1"
_PROBE_SECONDS = 2.0
_REACH_SECONDS = 10.0
_MAX_LOG_BYTES = 5_000_000
_STOP_SECONDS = 10.0


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
class _Record:
    """What the state file says of the embedded server.

    Attributes:
        pid: Its process.
        birth: When that process started, as the system tells it: a recycled pid has another one.
        port: Its port.
    """

    pid: int
    birth: str
    port: int

    @property
    def address(self) -> ServerAddress:
        return ServerAddress(f"http://{_HOST}:{self.port}/api", f"http://{_HOST}:{self.port}")


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


def check_reachable(api_url: str, timeout: float = _REACH_SECONDS) -> None:
    """Makes sure that a Prefect server answers.

    Args:
        api_url: The API's address.
        timeout: Seconds to wait for an answer.

    Raises:
        PrefectServerError: It does not, with the address (passwords masked) and what to do.
    """
    shown = mask_text(api_url)

    def fail(why: str, advice: str) -> PrefectServerError:
        return PrefectServerError(f"The Prefect server at {shown} {why}. {advice}", api_url=shown)

    advice = "Start it, correct PREFECT_API_URL, or unset it to use the embedded server."
    try:
        status, body = _get(api_url.rstrip("/") + "/health", timeout)
    except TimeoutError:
        raise fail(f"did not answer within {timeout:g} s", advice) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise fail(f"can't be reached: {_reason(error)}", advice) from None
    if status in {401, 403}:
        raise fail(f"refused access ({status})", "Set PREFECT_API_KEY or PREFECT_API_AUTH_STRING.")
    if status >= 500:
        raise fail(f"is in trouble: it answered {status}", "Look at its log.")
    if status != 200 or body.strip() != b"true":
        raise fail("does not look like a Prefect server", "PREFECT_API_URL usually ends with /api.")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _get(url: str, timeout: float) -> tuple[int, bytes]:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("it is not an http(s) address")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    headers = {}
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif auth := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {b64encode(auth.encode()).decode()}"
    with contextlib.closing(connection):
        connection.request("GET", parts.path or "/", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(1000)


def ensure_server(announce: Announce | None = None) -> ServerAddress:
    """Returns the embedded server, starting it in the background when it does not run.

    Any number of processes may call this at the same time: one starts it, the others wait for it.

    Args:
        announce: Takes lines about the start; None prints them to stderr.

    Raises:
        PrefectServerError: It could not be started.
    """
    directory = server_directory()
    record = _healthy_record(directory)
    if record is not None:
        return record.address
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
                lock.acquire(timeout=server_start_timeout() + 30)
            stack.callback(lock.release)
            record = _healthy_record(directory)
            return record.address if record is not None else _start(directory, say)
    except TimeoutError:
        raise PrefectServerError(
            f"Another process has been starting the Prefect server in {directory} for too long. Look at"
            f" {directory / 'server.log'}."
        ) from None
    except OSError as error:
        raise PrefectServerError(
            f"The embedded Prefect server needs the folder {directory}, which can't be used: {_reason(error)}. Set"
            " PREFECT_MLPROJECTS_SERVER_DIR (or PREFECT_HOME) to a folder that can be written, or PREFECT_API_URL to a"
            " server that runs."
        ) from None


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - our own messages go to stderr


def _healthy_record(directory: Path) -> _Record | None:
    record = _read_record(directory)
    return record if record is not None and _is_alive(record) and _answers(record) else None


def _read_record(directory: Path) -> _Record | None:
    try:
        facts = json.loads((directory / "server.json").read_text(encoding="utf-8"))
        return _Record(pid=int(facts["pid"]), birth=str(facts["birth"]), port=int(facts["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(directory: Path, record: _Record) -> None:
    temporary = directory / f".server.json.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
    temporary.replace(directory / "server.json")


def _is_alive(record: _Record) -> bool:
    return _birth(record.pid) == record.birth


def _birth(pid: int) -> str | None:
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


def _answers(record: _Record) -> bool:
    try:
        return _get(record.address.api_url + "/health", _PROBE_SECONDS) == (200, b"true")
    except (OSError, http.client.HTTPException):
        return False


def _start(directory: Path, say: Announce) -> ServerAddress:
    """Starts the server; the caller holds the lock."""
    _end_leftover(directory)
    configured_database = _configured_database()
    first = False
    if configured_database is None:
        database = directory / "prefect.db"
        first = not database.exists()
        _create_database(database)
    say(f"Starting a local Prefect server ({'the first start takes' if first else 'this takes'} some 15 s) …")
    log = directory / "server.log"
    deadline = time.monotonic() + server_start_timeout()
    for attempt in range(3):
        port = _choose_port(server_port() if attempt == 0 else 0)
        record, process = _spawn(directory, port, log, configured_database)
        failure = _wait_until_healthy(record, process, deadline, say)
        if failure is None:
            _write_record(directory, record)
            address = record.address
            say(f"Prefect server: {address.ui_url}  (it stays; stop it with: mlprojects server stop)")
            return ServerAddress(address.api_url, address.ui_url, started=True)
        if "address already in use" not in _tail(log):
            break
    raise PrefectServerError(f"The embedded Prefect server {failure}. Its log, {log}, ends:\n{_tail(log)}")


def _configured_database() -> str | None:
    for name in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        if os.environ.get(name):
            return os.environ[name]
    return None


def _create_database(path: Path) -> None:
    import sqlite3

    from prefect_mlprojects._server_database import create_database

    try:
        create_database(path)
    except sqlite3.Error as error:
        raise OSError(None, f"the database could not be created: {error}") from error


def _end_leftover(directory: Path) -> None:
    """Ends a recorded server that is alive but does not answer: it would hold the database."""
    record = _read_record(directory)
    if record is not None and _is_alive(record):
        _end(record)
    with contextlib.suppress(FileNotFoundError):
        (directory / "server.json").unlink()


def _choose_port(preferred: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, preferred))
        except OSError:
            probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _spawn(
    directory: Path, port: int, log: Path, configured_database: str | None
) -> tuple[_Record, subprocess.Popen[bytes]]:
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    # What a surrounding run, or this process's own Prefect client, was told must not reach the server.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PREFECT__")
        and name not in {"PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_MLPROJECTS_EXECUTION_ID", "MLFLOW_RUN_ID"}
    }
    environment |= {
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_SERVER_API_HOST": _HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"http://{_HOST}:{port}/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": configured_database
        or f"sqlite+aiosqlite:///{directory / 'prefect.db'}",
    }
    argv = [sys.executable, "-m", "uvicorn", "--factory", "prefect_mlprojects._server_app:create_app"]
    argv += ["--host", _HOST, "--port", str(port), "--timeout-keep-alive", "5", "--log-level", "warning"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record = _Record(process.pid, _birth(process.pid) or "", port)
    return record, process


def _wait_until_healthy(
    record: _Record, process: subprocess.Popen[bytes], deadline: float, say: Announce
) -> str | None:
    """Waits for the first good answer; returns what went wrong otherwise."""
    started = time.monotonic()
    told = started
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.1)
            return f"ended at its start (exit code {code})"
        if _answers(record):
            return None
        now = time.monotonic()
        if now > deadline:
            _end(record)
            process.wait()
            return f"did not answer within {server_start_timeout():g} s (PREFECT_MLPROJECTS_SERVER_START_TIMEOUT)"
        if now - told >= 5:
            told = now
            say(f"  … still starting ({now - started:.0f} s)")


def _tail(log: Path, lines: int = 15) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 20_000))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return mask_text("\n".join(f"  {line}" for line in text.splitlines()[-lines:]))


def _end(record: _Record) -> None:
    """Ends the recorded process: asks, waits, kills; never another process that got its pid."""
    for number, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
        if not _is_alive(record):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)
        deadline = time.monotonic() + patience
        while _is_alive(record) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(record.pid, os.WNOHANG)
            time.sleep(0.05)


def server_status() -> ServerStatus:
    """Tells whether the embedded server runs, and where."""
    directory = server_directory()
    record = _read_record(directory)
    if record is None or not _is_alive(record):
        return ServerStatus(running=False, healthy=False, address=None, pid=None, directory=directory)
    return ServerStatus(
        running=True, healthy=_answers(record), address=record.address, pid=record.pid, directory=directory
    )


def stop_server() -> bool:
    """Stops the embedded server; its database stays.

    Returns:
        Whether it ran.
    """
    directory = server_directory()
    record = _read_record(directory)
    if record is None:
        return False
    alive = _is_alive(record)
    if alive:
        _end(record)
    with contextlib.suppress(OSError):
        (directory / "server.json").unlink()
    return alive
