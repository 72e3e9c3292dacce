"""Tracking stores: opening them, calls of them, and the errors of calls. A store that can't be used fails at once."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from prefect_mlprojects._support.files import replacing, temporary_pattern
from prefect_mlprojects._support.locks import hold_lock
from prefect_mlprojects._support.redaction import redact, redact_url
from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.settings import cache_directory
from prefect_mlprojects.tracking import _mlflow_internals as internals
from prefect_mlprojects.tracking._mlflow_internals import MlflowStore
from prefect_mlprojects.tracking.uris import display_uri, scheme_of, sqlite_path, sqlite_uri

_PROBE_SECONDS = 10.0
# After an answer a store is trusted to be there for so long: a probe costs one small request.
_TRUST_SECONDS = 1.0
_STALE_SECONDS = 600.0
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_opening = threading.Lock()
# Held while a database is created: a process that ends by itself waits for it.
creating = threading.Lock()
_stores_lock = threading.Lock()
_stores: dict[Secret, Store] = {}
_quiet = threading.local()
_T = TypeVar("_T")


class Store:
    """A tracking store as this process uses it; get it from `store_of`, which keeps one per URI."""

    def __init__(self, uri: Secret) -> None:
        self.shown = display_uri(uri)
        self._uri = reveal(uri)
        self._scheme = scheme_of(self._uri)
        # SQLite has one writer at a time. Other databases have MLflow's pool of 15 connections, of which one call holds
        # two: with more callers than that, all would wait for the second.
        self._gate = threading.BoundedSemaphore(1 if self._scheme == "sqlite" else 6)
        self._sqlite: tuple[MlflowStore, tuple[int, int] | None] | None = None
        self._answered = -math.inf

    def call(self, action_name: str, action: Callable[[MlflowStore], _T]) -> _T:
        """Returns what `action` returns; every failure is a ``TrackingError`` that says "could not `action_name`"."""
        try:
            with _without_noise():
                store = self._open()
                with self._gate:
                    result = action(store)
        except Exception as error:  # noqa: BLE001 - stores raise whatever their drivers do
            self.distrust()
            raise tracking_error(error, self.shown, action_name) from None
        self._answered = time.monotonic()
        return result

    def distrust(self) -> None:
        """Makes the next call probe the store first."""
        self._answered = -math.inf

    def _open(self) -> MlflowStore:
        # MLflow retries a store that is down for minutes, which would look like a run that hangs: it is probed first.
        untrusted = time.monotonic() - self._answered >= _TRUST_SECONDS
        path = sqlite_path(self._uri)
        try:
            with _opening:
                if path is not None:
                    return self._open_sqlite(path)
                if untrusted and self._scheme in _DATABASE_PORTS:
                    _probe_database(self._uri)
                store = MlflowStore(self._uri)
            if untrusted and self._scheme in ("http", "https"):
                internals.ask_server(self._uri, _PROBE_SECONDS)
        except Exception as error:  # noqa: BLE001 - stores raise whatever their drivers do
            kind = "store" if path is None else "database"
            raise tracking_error(error, self.shown, f"open the tracking {kind}") from None
        return store

    def _open_sqlite(self, path: Path) -> MlflowStore:
        if self._sqlite is not None:
            store, identity = self._sqlite
            if _identity(path) == identity:
                return store
            # The file was deleted or replaced; MLflow's connections still lead to the old one.
            store.disconnect()
        _probe_sqlite(path)
        is_created = path.exists() and path.stat().st_size > 0
        with contextlib.nullcontext() if is_created else _creation_lock(path):
            if not path.exists():
                with creating:
                    _create_sqlite(path)
            store = MlflowStore(self._uri)
        self._sqlite = store, _identity(path)
        return store


def store_of(uri: Secret) -> Store:
    """Returns this process's store for an absolute tracking URI."""
    with _stores_lock:
        return _stores.setdefault(uri, Store(uri))


def download_artifacts(uri: str, folder: Path, tracking_uri: Secret | None) -> Path:
    """Downloads an artifact, a registered model or a file of DBFS into an empty folder; returns the local path.

    With no `tracking_uri` the store is the one that this process uses. Raises whatever MLflow raises.
    """
    import mlflow.artifacts

    store = reveal(tracking_uri) if tracking_uri is not None else None
    registry = mlflow.get_registry_uri()
    if store is not None:
        if registry == mlflow.get_tracking_uri():
            # No registry was set apart from the tracking store, so the models are where the runs are.
            registry = store
        uri = internals.model_location(uri, store, registry)
    download = partial(mlflow.artifacts.download_artifacts, tracking_uri=store, registry_uri=registry)
    return Path(download(artifact_uri=uri, dst_path=str(folder)))


def check_store(tracking_uri: Secret) -> None:
    """Reads one experiment with the credentials in the URI; raises ``MlflowException`` if that is refused or fails."""
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=reveal(tracking_uri)).search_experiments(max_results=1)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Drops the records of this thread that noisy loggers emit meanwhile."""
    for name in internals.NOISY_LOGGERS:
        logging.getLogger(name).addFilter(_is_wanted)  # a no-op if it is there
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = False


def _is_wanted(_record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "on", False)


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _probe_sqlite(path: Path) -> None:
    """Opens the file, if it exists, with plain SQLite: MLflow would retry for a minute and a half before it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        address = f"file:{quote(str(path))}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=20)) as database:
            database.execute("PRAGMA schema_version").fetchone()


def _create_sqlite(path: Path) -> None:
    """Creates the database in a temporary file and renames it, so that a killed process leaves no partial file."""
    for stale in path.parent.glob(temporary_pattern(path)):
        with contextlib.suppress(OSError):
            # A recent one may belong to a live process.
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                stale.unlink()
    # A program that does not take our lock may create it meanwhile.
    with replacing(path, overwrite=False) as temporary:
        try:
            temporary.touch(mode=0o644)
            MlflowStore(sqlite_uri(temporary)).disconnect()
        finally:
            temporary.with_name(f"{temporary.name}-journal").unlink(missing_ok=True)


@contextlib.contextmanager
def _creation_lock(path: Path) -> Iterator[None]:
    """Lets one process at a time create a database; without a cache folder each creates one, and the first wins."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # LockTimeoutError is one
            stack.enter_context(hold_lock(cache_directory() / "locks" / f"mlflow-{name}.lock", timeout=60))
        yield


def _probe_database(uri: str) -> None:
    from sqlalchemy import create_engine, engine, pool

    url = engine.make_url(uri)
    if url.host:
        port = url.port or _DATABASE_PORTS[url.get_backend_name()]
        try:
            socket.create_connection((url.host, port), timeout=_PROBE_SECONDS).close()
        except OSError as error:
            raise _unreachable(redact_url(uri), str(error)) from None
    create_engine(url, poolclass=pool.NullPool).connect().close()


_ADVICE = {
    r"database is locked": "Another process kept the database locked for too long: run again, or use an MLflow server "
    "for many runs at once.",
    r"disk is full|No space left|disk I/O error": "Free some space on the disk that holds the database.",
    r"readonly database|unable to open database file|Permission denied|Read-only file": "Make the file and its folder "
    "writable, or set MLFLOW_TRACKING_URI to another store.",
    r"file is not a database|malformed|file is encrypted": "The file is damaged or not an MLflow database: restore or "
    "move it, or set MLFLOW_TRACKING_URI to another store.",
    r"Can't locate revision": "The database was made by a newer MLflow than the one installed here; upgrade MLflow here.",
    r"No module named '(?:psycopg2|MySQLdb|pymysql|pyodbc)": "Install the database's driver in this environment.",
    r"\b(?:401|403)\b|UNAUTHENTICATED|PERMISSION_DENIED": "Set the server's credentials in MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, or in MLFLOW_TRACKING_TOKEN.",
}

_ROLLED_BACK = re.compile("(?i)database is locked|deadlock")
_BROKEN_OFF = re.compile("(?i)server closed the connection|connection (?:reset|refused|timed out)")
_NETWORK_REASON = re.compile(
    "(?i)Connection refused|Name or service not known|Temporary failure in name resolution|No route to host|"
    "Network is unreachable|Connection reset by peer|certificate verify failed|timed out"
)

# What SQLAlchemy adds to a driver's message: how it came to the statement, the statement with its values, a link.
_SQLALCHEMY_NOTES = re.compile(
    r"\(raised as a result of Query-invoked autoflush;[^)]*\)\s*|\s*(?:\[SQL: |\(Background on this error).*", re.DOTALL
)


class UnreachableError(TrackingError):
    """The store did not answer; a later attempt may succeed."""


def is_transient(error: Exception, *, once: bool) -> bool:
    """Returns whether a call may succeed if retried; a call that is made only `once` must have been rolled back."""
    if _ROLLED_BACK.search(str(error)):
        return True
    return not once and (isinstance(error, UnreachableError) or _BROKEN_OFF.search(str(error)) is not None)


def tracking_error(error: BaseException, shown: str, action_name: str) -> TrackingError:
    """Returns one error that says what failed, at which store (its redacted URI), why, and what to do."""
    if isinstance(error, TrackingError):
        return error
    if internals.NETWORK_FAILURE.search(str(error)):
        return _unreachable(shown, str(error))
    reason = " ".join(_SQLALCHEMY_NOTES.sub("", redact(str(error))).split()) or type(error).__name__
    reason += "" if reason.endswith((".", "!", "?")) else "."
    advice = next((f" {text}" for pattern, text in _ADVICE.items() if re.search(pattern, reason, re.IGNORECASE)), "")
    return TrackingError(f"MLflow could not {action_name} at {shown}: {reason}{advice}", tracking_uri=shown)


def _unreachable(shown: str, reason: str) -> UnreachableError:
    known = _NETWORK_REASON.search(reason)
    reason = known[0] if known else redact(reason)
    return UnreachableError(
        f"The MLflow tracking store {shown} can't be reached: {reason}. "
        "Start it, or set MLFLOW_TRACKING_URI to another store.",
        tracking_uri=shown,
    )
