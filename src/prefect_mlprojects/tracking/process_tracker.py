"""A tracker that runs MLflow in another process, so that its import overlaps with everything else.

That process makes the calls of a `Tracker`; requests come by its stdin and are answered on its stdout, as lines of JSON.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, NoReturn, TypeVar

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.exceptions import InvalidTrackingError, TrackingError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.tracking._mlflow_internals import HTTP_LIMITS, NO_TELEMETRY, import_mlflow
from prefect_mlprojects.tracking.records import TrackedRun, TrackingRequest
from prefect_mlprojects.tracking.stores import UnreachableError, creating
from prefect_mlprojects.tracking.tracker import Tracker
from prefect_mlprojects.tracking.uris import display_uri, resolve_tracking_uri

# The path is this process's own, so that both import the same package, wherever it comes from.
_PROGRAM: Final = (
    "import json, sys; hello = json.loads(sys.stdin.buffer.readline()); sys.path[:] = hello['path']; "
    "from prefect_mlprojects.tracking.process_tracker import main; main(hello['tracking_uri'])"
)
_CLOSE_SECONDS: Final = 30.0
_STDERR_BYTES: Final = 2000

# The methods of a `Tracker` that the process executes; `_remote` adds them.
_methods: set[str] = set()
_F = TypeVar("_F", bound=Callable[..., Any])
_logger = logging.getLogger(__name__)


def _error_fields(error: Exception) -> dict[str, str]:
    if isinstance(error, TrackingError):
        return {"message": error.message, "tracking_uri": error.tracking_uri}
    return {"message": f"{type(error).__name__}: {error}", "tracking_uri": ""}


# Types that JSON lacks: how to get the fields or the text, and how to make the value of them.
_CODECS: Final[Mapping[str, tuple[type, Callable[[Any], Any], Callable[..., Any]]]] = {
    "request": (TrackingRequest, vars, TrackingRequest),
    "working copy": (WorkingCopy, vars, WorkingCopy),
    "run": (TrackedRun, vars, TrackedRun),
    "mapping": (Mapping, dict, dict),
    "path": (Path, str, Path),
    "secret": (Secret, reveal, Secret),
    "unreachable": (UnreachableError, _error_fields, UnreachableError),
    "invalid": (InvalidTrackingError, _error_fields, InvalidTrackingError),
    "error": (Exception, _error_fields, TrackingError),
}


def to_json(value: Any) -> Any:
    """Returns an argument or a result as JSON data; every mapping in it has one key, the name of a codec."""
    for name, (kind, encode, _) in _CODECS.items():
        if isinstance(value, kind):
            plain = encode(value)
            return {name: {k: to_json(v) for k, v in plain.items()} if isinstance(plain, dict) else plain}
    return value


def from_json(data: Any) -> Any:
    """Returns what `to_json` made into JSON data."""
    if not isinstance(data, dict):
        return data
    ((name, plain),) = data.items()
    make = _CODECS[name][2]
    return make(**{k: from_json(v) for k, v in plain.items()}) if isinstance(plain, dict) else make(plain)


class _TrackerProcessExitedError(Exception):
    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


def _remote(method: _F) -> _F:
    """Makes a method of `Tracker` one that the tracker process executes, or this process if that has exited."""
    _methods.add(method.__name__)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(self: ProcessTracker, *positional: Any, **named: Any) -> Any:
        arguments = signature.bind(self, *positional, **named).arguments
        del arguments["self"]
        try:
            return self._ask(method.__name__, arguments)
        except _TrackerProcessExitedError as error:
            if error.sent and "request" in arguments and not arguments["request"].run_id:
                # The process may have created the run before it died: a second one would be wrong.
                raise TrackingError(str(error), tracking_uri=self._shown) from None
            with self._lock:
                warned, self._warned = self._warned, True
            if not warned:
                _logger.warning("%s MLflow is used in this process instead.", error)
        return method(self, **arguments)

    return call  # type: ignore[return-value]  # its signature is the method's


class ProcessTracker(Tracker):
    """Keeps MLflow runs in a tracker process, which imports MLflow while this process does other things.

    The process has its own session, so a Ctrl-C at the terminal does not reach it; what it prints is not shown. It ends at
    ``close``. If this process ends without that (killed, crashed), it gives the runs that it started and that were not
    finished the status FAILED, and ends. If it dies itself, the MLflow of this process is used, with a warning.
    """

    start = _remote(Tracker.start)
    adopt = _remote(Tracker.adopt)
    set_tags = _remote(Tracker.set_tags)
    log_text = _remote(Tracker.log_text)
    finish = _remote(Tracker.finish)
    metrics = _remote(Tracker.metrics)
    metric_history = _remote(Tracker.metric_history)
    experiment_name = _remote(Tracker.experiment_name)

    def __init__(self, tracking_uri: Secret | None = None) -> None:
        """Starts the process, which opens the most likely store (default: this process's); or raises ``OSError``."""
        super().__init__()
        self._lock = threading.Lock()
        tracking_uri = tracking_uri or resolve_tracking_uri()
        self._shown = display_uri(tracking_uri)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**HTTP_LIMITS, **os.environ, **NO_TELEMETRY},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._last_number = 0
        self._exited = self._closed = self._warned = False
        self._reader = threading.Thread(target=self._read_replies, name="mlflow-tracker", daemon=True)
        self._reader.start()
        with self._lock:
            self._send({"path": sys.path, "tracking_uri": reveal(tracking_uri)})

    def close(self) -> None:
        """Ends the process once it has answered all requests; kills it if that takes more than half a minute."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._exited:
                self._send({"method": "close"})
            try:
                self._requests.close()
            except OSError:
                # It exited with the last line unread.
                self._exited = True
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._replies.close()
        self._stderr.close()

    def _ask(self, method: str, arguments: Mapping[str, Any]) -> Any:
        reply: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._closed:
                raise TrackingError("The tracker was closed before this call.", tracking_uri=self._shown)
            self._last_number += 1
            number = self._last_number
            self._pending[number] = reply
            if self._exited or not self._send({"number": number, "method": method, "arguments": to_json(arguments)}):
                self._pending.pop(number)
                raise _TrackerProcessExitedError(self._exit_message(), sent=False)
        answer = reply.result()
        for level, text in answer["logged"]:
            _logger.log(level, "%s", text)
        value = from_json(answer["value"])
        if isinstance(value, TrackingError):
            raise value
        return value

    def _send(self, message: Mapping[str, Any]) -> bool:
        """Writes one line, under the lock; False if the process has exited."""
        try:
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()
        except (OSError, ValueError):
            self._exited = True
        return not self._exited

    def _read_replies(self) -> None:
        for line in self._replies:
            answer = json.loads(line)
            with self._lock:
                reply = self._pending.pop(answer["number"])
            reply.set_result(answer)
        self._process.wait()
        with self._lock:
            self._exited = True
            unanswered, self._pending = list(self._pending.values()), {}
        for reply in unanswered:
            reply.set_exception(_TrackerProcessExitedError(self._exit_message(), sent=True))

    def _exit_message(self) -> str:
        code = self._process.poll()
        how = "" if code is None else f" (exit code {code})" if code >= 0 else f" (signal {-code})"
        # pread leaves the file's offset alone, which the tracker process writes at.
        descriptor = self._stderr.fileno()
        offset = max(0, os.fstat(descriptor).st_size - _STDERR_BYTES)
        output = os.pread(descriptor, _STDERR_BYTES, offset).decode("utf-8", "replace").strip()
        last = f" Its last output: {redact(output)}" if output else ""
        return f"The process that talks to MLflow ended unexpectedly{how}.{last}"


def main(tracking_uri: str) -> NoReturn:
    """Serves the parent process until it sends ``close`` or ends; `tracking_uri` is the most likely store."""
    # What MLflow prints goes to stderr, which is read only if this process dies.
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A shutdown signals all processes at once, but the parent still has an end to report; we end after the parent.
        signal.signal(number, signal.SIG_IGN)
    server = _Server(replies)
    closed = False
    pool = ThreadPoolExecutor(max_workers=8)
    # Not in the pool, which is waited for.
    threading.Thread(target=server.warm_up, args=(tracking_uri,), daemon=True).start()
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if closed := message["method"] == "close":
            break
        pool.submit(server.answer, message)
    pool.shutdown()
    if not closed:
        server.fail_unfinished_runs()
    # Unloading MLflow takes longer than anything else here, and the parent may be waiting for our end. A database that
    # is being created (by the warm-up) is completed.
    with creating:
        os._exit(0)


class _Server:
    def __init__(self, replies: IO[bytes]) -> None:
        self._replies = replies
        self._lock = threading.Lock()
        self._tracker = Tracker()
        self._imported = threading.Event()
        self._unfinished: dict[str, TrackedRun] = {}
        self._log = _ThreadLog()
        logging.getLogger("prefect_mlprojects").addHandler(self._log)

    def warm_up(self, tracking_uri: str) -> None:
        gc.disable()
        try:
            try:
                import_mlflow(tracking_uri)
            finally:
                self._imported.set()
            # The first request will fail with the same error, and reports it to its caller.
            with contextlib.suppress(TrackingError):
                self._tracker.warm_up(Secret(tracking_uri))
        finally:
            gc.enable()

    def answer(self, message: dict[str, Any]) -> None:
        # Two threads must not import MLflow at once: Python would let one of them use half-initialised modules.
        self._imported.wait()
        try:
            value = self._call(message["method"], from_json(message["arguments"]))
        except Exception as error:  # noqa: BLE001 - the parent raises it
            value = error
        reply = {"number": message["number"], "value": to_json(value), "logged": self._log.take()}
        # If the parent ended, the main thread learns it from stdin.
        with self._lock, contextlib.suppress(OSError):
            self._replies.write(json.dumps(reply).encode() + b"\n")
            self._replies.flush()

    def fail_unfinished_runs(self) -> None:
        for run in list(self._unfinished.values()):
            try:
                self._tracker.finish(run, "FAILED")
            except TrackingError as error:
                sys.stderr.write(f"{error}\n")

    def _call(self, method: str, arguments: dict[str, Any]) -> Any:
        if method not in _methods:
            raise ValueError(f"unknown method {method!r}")
        value = getattr(self._tracker, method)(**arguments)
        with self._lock:
            if method == "start":
                self._unfinished[value.run_id] = value
            elif method == "finish":
                self._unfinished.pop(arguments["run"].run_id, None)
        return value


class _ThreadLog(logging.Handler):
    """Keeps the records of each thread until that thread takes them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._local = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        self._local.__dict__.setdefault("records", []).append((record.levelno, redact(record.getMessage())))

    def take(self) -> list[tuple[int, str]]:
        records: list[tuple[int, str]] = self._local.__dict__.pop("records", [])
        return records
