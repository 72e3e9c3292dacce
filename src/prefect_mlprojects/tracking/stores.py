"""Opening MLflow's stores: what can't work says so at once, and many may open the same one at once."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from prefect_mlprojects.settings import cache_directory
from prefect_mlprojects.tracking.failures import tracking_error, unreachable
from prefect_mlprojects.tracking.mlflow_store import MlflowStore
from prefect_mlprojects.tracking.uris import sqlite_path, sqlite_uri

PROBE_SECONDS = 10.0
"""How long a store may take to show that it is there."""

_opening = threading.RLock()
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
            return _store(uri)
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
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        with quiet():
            # Any answer will do, also a refusal: what may be done there, the next call shows.
            http_request(
                get_default_host_creds(uri),
                "/health",
                "GET",
                max_retries=0,
                timeout=PROBE_SECONDS,
                raise_on_status=False,
                retry_codes=(),
            )
    except Exception as error:  # noqa: BLE001 - MLflow wraps whatever requests raised
        raise unreachable(uri, _network_reason(error)) from None


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


def _store(uri: str) -> MlflowStore:
    # MLflow's registry of stores; it keeps those it made.
    from mlflow.tracking._tracking_service import utils

    get_store: Any = utils._get_store
    return MlflowStore(get_store(uri))


def _open_sqlite(uri: str, path: Path) -> MlflowStore:
    _check_sqlite(uri, path)
    if path.exists() and path.stat().st_size > 0:
        return _store(uri)
    with _creation_lock(path):
        if not path.exists():
            _create_sqlite(path)
        return _store(uri)


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
    """Makes the database under another name and gives it its own when it is whole: a kill leaves no half of one."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        fresh.touch(mode=0o644)
        _store(sqlite_uri(fresh)).disconnect()
        try:
            os.link(fresh, path)
        except FileExistsError:
            # A program that knows nothing of our lock was quicker.
            return
        except OSError:
            # No hard links on this file system.
            fresh.rename(path)
    finally:
        for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _creation_lock(path: Path) -> Iterator[None]:
    """Lets one process at a time make a database; without a cache folder each makes one, and the first wins."""
    from filelock import FileLock, Timeout

    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    lock = FileLock(cache_directory() / "locks" / f"mlflow-{name}.lock", timeout=60)
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, Timeout):
        yield
        return
    try:
        yield
    finally:
        lock.release()


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


def _network_reason(error: Exception) -> str:
    text = str(error)
    return next((reason for reason in _NETWORK_REASONS if reason.lower() in text.lower()), text)
