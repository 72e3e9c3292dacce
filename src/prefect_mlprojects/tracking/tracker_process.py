"""The process behind a ``ProcessTracker``: makes its MLflow calls, which come by stdin and are answered on stdout."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final, NoReturn
from urllib.parse import urlsplit

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.tracking.base import TrackedRun, TrackingRequest
from prefect_mlprojects.tracking.in_process import InProcessTracker
from prefect_mlprojects.tracking.stores import UnreachableError, creating

_THREADS: Final = 8

# mlflow-skinny works without these, and where they are installed they take more than half of the time of its import.
_NOT_NEEDED: Final = ("pandas", "numpy", "scipy", "sklearn", "pyarrow")
_OWN_SCHEMES: Final = ("", "file", "http", "https", "sqlite", "postgresql", "mysql", "mssql")


def main(tracking_uri: str) -> NoReturn:
    """Serves the parent until it says ``close``, or is no more.

    Args:
        tracking_uri: The absolute tracking URI that is most likely to be used.
    """
    replies = _private_stdout()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A shutdown signals everybody at once, but the parent still has an end to report; after the parent, we end too.
        signal.signal(number, signal.SIG_IGN)
    tracker = _TrackerProcess(replies)
    requests: list[Future[None]] = []
    closed = False
    pool = ThreadPoolExecutor(_THREADS)
    pool.submit(tracker.warm_up, tracking_uri)
    for line in sys.stdin.buffer:
        message = json.loads(line)
        closed = message["op"] == "close"
        if closed:
            break
        requests = [request for request in requests if not request.done()]
        requests.append(pool.submit(tracker.answer, message))
    wait(requests)
    if not closed:
        tracker.fail_unfinished_runs()
    # Unloading all of MLflow takes longer than anything else here, and the parent may be waiting for our end. A
    # database that is just being made (by the warm-up) is made to its end.
    with creating:
        os._exit(0)


class _TrackerProcess:
    def __init__(self, replies: IO[bytes]) -> None:
        self._replies = replies
        self._lock = threading.Lock()
        self._tracker = InProcessTracker()
        self._imported = threading.Event()
        self._unfinished: dict[str, TrackedRun] = {}
        self._logged = _ThreadLog()
        logging.getLogger("prefect_mlprojects").addHandler(self._logged)

    def warm_up(self, tracking_uri: str) -> None:
        gc.disable()
        try:
            try:
                _import_mlflow(tracking_uri)
            finally:
                self._imported.set()
            self._tracker.warm_up(tracking_uri)
        except TrackingError:
            # The first request will fail with the same error, and reports it to its caller.
            return
        finally:
            gc.enable()

    def answer(self, message: dict[str, Any]) -> None:
        # Two threads must not import MLflow at once: Python would let one of them see half of it.
        self._imported.wait()
        reply: dict[str, Any] = {"number": message["number"]}
        try:
            reply["value"] = self._do(message)
        except Exception as error:  # noqa: BLE001 - it is passed on to the parent
            reply["error"] = error_to_json(error, "")
        reply["logged"] = self._logged.take()
        with self._lock:
            try:
                self._replies.write(json.dumps(reply).encode() + b"\n")
                self._replies.flush()
            except OSError:
                # The parent is gone; the main thread learns it from stdin.
                return

    def fail_unfinished_runs(self) -> None:
        for run in list(self._unfinished.values()):
            try:
                self._tracker.finish(run, "FAILED")
            except TrackingError as error:
                sys.stderr.write(f"{error}\n")

    def _do(self, message: dict[str, Any]) -> Any:
        if message["op"] == "start":
            run = self._tracker.start(request_from_json(message["request"]))
            with self._lock:
                self._unfinished[run.run_id] = run
            return vars(run)
        if message["op"] == "adopt":
            return vars(self._tracker.adopt(message["run_id"], Secret(message["tracking_uri"])))
        run = TrackedRun(**message["run"])
        if message["op"] == "set_tags":
            return self._tracker.set_tags(run, message["tags"])
        if message["op"] == "log_text":
            return self._tracker.log_text(run, message["name"], message["text"])
        if message["op"] == "finish":
            self._tracker.finish(run, message["status"], message["tags"])
            with self._lock:
                self._unfinished.pop(run.run_id, None)
            return None
        if message["op"] == "metrics":
            return dict(self._tracker.metrics(run))
        raise ValueError(f"unknown operation {message['op']!r}")


class _ThreadLog(logging.Handler):
    """Keeps what each thread logs until that thread takes it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._local = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        records: list[tuple[int, str]] = self._local.__dict__.setdefault("records", [])
        records.append((record.levelno, redact(record.getMessage())))

    def take(self) -> list[tuple[int, str]]:
        records: list[tuple[int, str]] = self._local.__dict__.pop("records", [])
        return records


def _import_mlflow(tracking_uri: str) -> None:
    """Imports MLflow without what only its full variant uses, and whole if that fails."""
    scheme = urlsplit(tracking_uri).scheme.partition("+")[0]
    if scheme not in _OWN_SCHEMES:
        # A plugin's store may use anything.
        return
    blocked = [name for name in _NOT_NEEDED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # None is Python's way to refuse an import
    try:
        importlib.import_module("mlflow")
    except Exception:  # noqa: BLE001 - whatever it is: without our doing it may not come
        for name in [name for name in sys.modules if name in blocked or name.partition(".")[0] == "mlflow"]:
            del sys.modules[name]


def _private_stdout() -> IO[bytes]:
    """Takes stdout away from everybody else: what MLflow prints goes to stderr, which is read only if we die."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


_ERRORS: Mapping[str, type[TrackingError]] = {"failed": TrackingError, "unreachable": UnreachableError}


def request_to_json(request: TrackingRequest) -> dict[str, Any]:
    """Returns a request as plain JSON."""
    fields = asdict(request)
    fields["working_copy"]["directory"] = str(request.working_copy.directory)
    return fields


def request_from_json(fields: Mapping[str, Any]) -> TrackingRequest:
    """Returns the request that ``request_to_json`` made plain."""
    copy = dict(fields["working_copy"])
    copy["directory"] = Path(copy["directory"])
    return TrackingRequest(**{**fields, "working_copy": WorkingCopy(**copy)})


def error_to_json(error: BaseException, masked_uri: str) -> dict[str, str]:
    """Returns an error as plain JSON.

    Args:
        error: The error; one that is no ``TrackingError`` becomes one.
        masked_uri: The tracking URI, passwords masked, for an error that names none.
    """
    if isinstance(error, TrackingError):
        kind = "unreachable" if isinstance(error, UnreachableError) else "failed"
        return {"kind": kind, "message": error.message, "tracking_uri": error.tracking_uri}
    return {"kind": "failed", "message": f"{type(error).__name__}: {error}", "tracking_uri": masked_uri}


def error_from_json(fields: Mapping[str, str]) -> TrackingError:
    """Returns the error that ``error_to_json`` made plain."""
    return _ERRORS[fields["kind"]](fields["message"], tracking_uri=fields["tracking_uri"])
