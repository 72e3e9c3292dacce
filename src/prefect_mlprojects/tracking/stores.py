"""Opening MLflow's stores: what can't work says so at once, and many may open the same one at once."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from prefect_mlprojects._support.files import replacing, temporary_pattern
from prefect_mlprojects._support.locks import hold_lock
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.settings import cache_directory
from prefect_mlprojects.tracking.mlflow_store import MlflowStore, ask_server, mlflow_store
from prefect_mlprojects.tracking.uris import sqlite_path, sqlite_uri

PROBE_SECONDS = 10.0
"""How long a store may take to show that it is there."""

_LEFTOVER_SECONDS = 600.0

_opening = threading.RLock()
creating = threading.Lock()
"""Held while a database is made: a process that wants to end cleanly waits for it."""

_opened: dict[str, tuple[MlflowStore, tuple[int, int] | None]] = {}
_gates_lock = threading.Lock()
_gates: dict[str, threading.BoundedSemaphore] = {}
_quiet = threading.local()
_filtered: set[str] = set()

# What these say during our calls is either of no interest or said by the error that we raise.
_CHATTY_LOGGERS = (
    "mlflow.store.db.utils",
    "alembic.runtime.migration",
    "alembic.runtime.plugins",
    "urllib3.connectionpool",
)


def open_store(uri: str) -> MlflowStore:
    """Returns MLflow's store for a tracking URI; MLflow keeps one for each URI.

    Args:
        uri: An absolute tracking URI.

    Raises:
        TrackingError: The store can't be opened; ``UnreachableError`` when it does not answer.
    """
    with _opening, quiet():
        try:
            path = sqlite_path(uri)
            if path is not None:
                return _open_sqlite(uri, path)
            if urlsplit(uri).scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
                _check_database(uri)
            return mlflow_store(uri)
        except Exception as error:  # noqa: BLE001 - drivers raise whatever they like; the type is made one here
            raise tracking_error(error, uri, "open the tracking store") from None


def check_reachable(uri: str) -> None:
    """Asks an MLflow server whether it is there; for stores of other kinds it does nothing.

    MLflow itself retries for minutes, so that a server that is down would look like a run that hangs.

    Args:
        uri: An absolute tracking URI.

    Raises:
        UnreachableError: Nothing answers.
    """
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    try:
        with quiet():
            ask_server(uri, PROBE_SECONDS)
    except Exception as error:  # noqa: BLE001 - MLflow wraps whatever requests raised
        raise unreachable(uri, str(error)) from None


def gate(uri: str) -> threading.BoundedSemaphore:
    """Returns what limits this process's simultaneous calls of one store.

    SQLite has one writer at a time. The other databases have MLflow's pool of 15 connections, of which one call holds
    two: with more callers than that, all would wait for the second.

    Args:
        uri: An absolute tracking URI.
    """
    with _gates_lock:
        return _gates.setdefault(uri, threading.BoundedSemaphore(1 if uri.startswith("sqlite") else 6))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what MLflow and its libraries log from this thread meanwhile, as far as it is chatter."""
    for name in _CHATTY_LOGGERS:
        if name not in _filtered:
            logging.getLogger(name).addFilter(_is_wanted)
            _filtered.add(name)
    before = getattr(_quiet, "on", False)
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = before


def _is_wanted(_record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "on", False)


def _open_sqlite(uri: str, path: Path) -> MlflowStore:
    opened = _opened.get(uri)
    if opened is not None:
        store, identity = opened
        if _identity(path) == identity:
            return store
        # The file was deleted or replaced; MLflow's connections still lead to the old one.
        store.disconnect()
    _check_sqlite(uri, path)
    if _identity(path) is not None and path.stat().st_size > 0:
        store = mlflow_store(uri)
    else:
        with _creation_lock(path):
            if not path.exists():
                with creating:
                    _create_sqlite(path)
            store = mlflow_store(uri)
    _opened[uri] = (store, _identity(path))
    return store


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _check_sqlite(uri: str, path: Path) -> None:
    """Tries the file with plain SQLite: MLflow would retry for a minute and a half before it says what is wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            address = f"file:{quote(str(path))}?mode=rw"
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=20)) as database:
                database.execute("PRAGMA schema_version").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise tracking_error(error, uri, "open the tracking database") from None


def _create_sqlite(path: Path) -> None:
    """Creates the database in a temporary file and renames it, so that a killed process leaves no partial file."""
    _remove_leftovers(path)
    # A program that knows nothing of our lock may create it meanwhile.
    with replacing(path, overwrite=False) as fresh:
        try:
            fresh.touch(mode=0o644)
            mlflow_store(sqlite_uri(fresh)).disconnect()
        finally:
            fresh.with_name(f"{fresh.name}-journal").unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Deletes stale temporary files next to ``path``; recent ones may belong to a live process."""
    for leftover in path.parent.glob(temporary_pattern(path)):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()


@contextlib.contextmanager
def _creation_lock(path: Path) -> Iterator[None]:
    """Lets one process at a time make a database; without a cache folder each makes one, and the first wins."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # LockTimeoutError is one
            stack.enter_context(hold_lock(cache_directory() / "locks" / f"mlflow-{name}.lock", timeout=60))
        yield


def _check_database(uri: str) -> None:
    """Connects once: MLflow would retry for a minute and a half before it says what is wrong."""
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.pool import NullPool

    url = make_url(uri)
    default_port = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}[url.get_backend_name()]
    if url.host:
        try:
            socket.create_connection((url.host, url.port or default_port), timeout=PROBE_SECONDS).close()
        except OSError as error:
            raise unreachable(uri, str(error)) from None
    engine = create_engine(url, poolclass=NullPool)
    engine.connect().close()
    engine.dispose()


_ADVICE: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"database is locked", re.IGNORECASE),
        "Another process kept the database locked for long; run again, or use an MLflow server for many runs at once.",
    ),
    (
        re.compile(r"disk is full|No space left|disk I/O error", re.IGNORECASE),
        "Free some space on the disk that holds the database.",
    ),
    (
        re.compile(r"readonly database|unable to open database file|Permission denied|Read-only file", re.IGNORECASE),
        "Make the file and its folder writable, or set MLFLOW_TRACKING_URI to another place.",
    ),
    (
        re.compile(r"file is not a database|malformed|file is encrypted", re.IGNORECASE),
        "The file is damaged or no MLflow database: restore or move it, or set MLFLOW_TRACKING_URI to another place.",
    ),
    (
        re.compile(r"Can't locate revision", re.IGNORECASE),
        "The database was made by a newer MLflow than the one installed here; upgrade MLflow here.",
    ),
    (
        re.compile(r"No module named '(?:psycopg2|MySQLdb|pymysql|pyodbc)", re.IGNORECASE),
        "Install the database's driver in this environment.",
    ),
    (
        re.compile(r"\b(?:401|403)\b|UNAUTHENTICATED|PERMISSION_DENIED", re.IGNORECASE),
        "Give the server's credentials in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
        "or in MLFLOW_TRACKING_TOKEN.",
    ),
)

_ROLLED_BACK = re.compile(r"database is locked|deadlock", re.IGNORECASE)
_BROKEN_OFF = re.compile(r"server closed the connection|connection (?:reset|refused|timed out)", re.IGNORECASE)

# How mlflow/utils/rest_utils.py says that it got no answer, after all its retries.
_NETWORK_FAILURE = re.compile(
    r"API request to \S+ failed with (?:timeout )?exception (?!.*too many \d+ error)", re.DOTALL
)

_NETWORK_REASONS = (
    "Connection refused",
    "Name or service not known",
    "Temporary failure in name resolution",
    "No route to host",
    "Network is unreachable",
    "Connection reset by peer",
    "certificate verify failed",
    "timed out",
)

# What SQLAlchemy adds to a driver's message: how it came to the statement, the statement with its values, a link.
_SQLALCHEMY_NOTES = re.compile(
    r"\(raised as a result of Query-invoked autoflush;[^)]*\)\s*|\s*(?:\[SQL: |\(Background on this error).*", re.DOTALL
)


class UnreachableError(TrackingError):
    """The store did not answer at all, so asking again later may help."""


def tracking_error(error: BaseException, uri: str, what: str) -> TrackingError:
    """Says in one error what failed, at which store, why, and what to do.

    Args:
        error: What MLflow, SQLAlchemy or the system raised.
        uri: The tracking URI.
        what: What was being done, after "could not": ``"create the run"``.
    """
    if isinstance(error, TrackingError):
        return error
    if _NETWORK_FAILURE.search(str(error)):
        return unreachable(uri, str(error))
    shown = redact(uri)
    reason = _reason(error)
    advice = next((text for pattern, text in _ADVICE if pattern.search(reason)), "")
    message = f"MLflow could not {what} at {shown}: {reason}" + (f" {advice}" if advice else "")
    return TrackingError(message, tracking_uri=shown)


def did_nothing(error: TrackingError) -> bool:
    """Returns whether a call certainly changed nothing and may succeed if retried: another one blocked it."""
    return _ROLLED_BACK.search(str(error)) is not None


def may_pass(error: TrackingError) -> bool:
    """Returns whether a call may succeed if retried, although it may have been executed this time."""
    return isinstance(error, UnreachableError) or _BROKEN_OFF.search(str(error)) is not None


def unreachable(uri: str, reason: str) -> UnreachableError:
    """Makes the error for a store that does not answer."""
    shown = redact(uri)
    reason = next((known for known in _NETWORK_REASONS if known.lower() in reason.lower()), redact(reason))
    return UnreachableError(
        f"The MLflow tracking store {shown} can't be reached: {reason}. "
        "Start it, or set MLFLOW_TRACKING_URI to another.",
        tracking_uri=shown,
    )


def _reason(error: BaseException) -> str:
    text = " ".join(_SQLALCHEMY_NOTES.sub("", redact(str(error))).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
