"""A tracker that runs MLflow in another process, so that its import overlaps with everything else."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from types import MappingProxyType
from typing import IO, Any, Final

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.tracking.base import FinalStatus, TrackedRun, Tracker, TrackingRequest
from prefect_mlprojects.tracking.tracker_process import error_from_json, request_to_json
from prefect_mlprojects.tracking.uris import resolve_tracking_uri

# The path is this process's own, so that both import the same package, wherever it comes from.
_PROGRAM: Final = (
    "import json, sys; hello = json.loads(sys.stdin.buffer.readline()); sys.path[:] = hello['path']; "
    "from prefect_mlprojects.tracking.tracker_process import main; main(hello['tracking_uri'])"
)

_CLOSE_SECONDS: Final = 30.0
_COMPLAINT_BYTES: Final = 2000

_logger = logging.getLogger(__name__)


class _TrackerProcessGoneError(Exception):
    """Raised when the tracker process has ended."""

    def __init__(self, message: str, *, asked: bool) -> None:
        super().__init__(message)
        self.asked = asked


class ProcessTracker:
    """Keeps MLflow runs in a tracker process, which imports MLflow while this process does other things.

    It runs in its own session, so a Ctrl-C at the terminal does not reach it; what it prints never shows.
    It ends when ``close`` is called. When this process ends without that (killed, crashed), it gives the
    runs that it started and that were not finished the status FAILED, and ends. When it dies itself, this
    process's own MLflow takes over, with a warning.

    Make one with ``start_process``.
    """

    def __init__(self, process: subprocess.Popen[bytes], complaints: IO[bytes], tracking_uri: str) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("the tracker process's stdin and stdout must be pipes")
        self._process = process
        self._complaints = complaints
        self._masked_uri = redact(tracking_uri)
        self._requests = process.stdin
        self._replies = process.stdout
        self._lock = threading.Lock()
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._last_number = 0
        self._gone = False
        self._closed = False
        self._substitute: Tracker | None = None
        self._reader = threading.Thread(target=self._read_replies, name="mlflow-tracker", daemon=True)
        self._reader.start()

    @classmethod
    def start_process(cls, tracking_uri: str | None = None) -> ProcessTracker:
        """Starts the process, which at once imports MLflow and opens the store; returns in milliseconds.

        Args:
            tracking_uri: The absolute tracking URI that will be used, by default as ``resolve_tracking_uri`` finds it;
                runs of other stores work too.

        Raises:
            OSError: The process could not be started.
        """
        tracking_uri = tracking_uri or resolve_tracking_uri()
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=_process_environment(),
            start_new_session=True,
        )
        tracker = cls(process, complaints, tracking_uri)
        with tracker._lock:
            tracker._send({"path": sys.path, "tracking_uri": tracking_uri})
        return tracker

    def start(self, request: TrackingRequest) -> TrackedRun:
        """Creates the run, or continues one; see ``Tracker``."""
        try:
            return TrackedRun(**self._ask("start", request=request_to_json(request)))
        except _TrackerProcessGoneError as error:
            if error.asked and request.run_id is None:
                # It may have made the run before it died, and a second one would be a lie.
                raise TrackingError(str(error), tracking_uri=self._masked_uri) from None
            return self._own_tracker(error).start(request)

    def adopt(self, run_id: str, tracking_uri: Secret) -> TrackedRun:
        """Returns a run that somebody else created; see ``Tracker``."""
        try:
            return TrackedRun(**self._ask("adopt", run_id=run_id, tracking_uri=reveal(tracking_uri)))
        except _TrackerProcessGoneError as error:
            return self._own_tracker(error).adopt(run_id, tracking_uri)

    def set_tags(self, run: TrackedRun, tags: Mapping[str, str]) -> None:
        """Sets tags of a run; see ``Tracker``."""
        try:
            self._ask("set_tags", run=asdict(run), tags=dict(tags))
        except _TrackerProcessGoneError as error:
            self._own_tracker(error).set_tags(run, tags)

    def log_text(self, run: TrackedRun, name: str, text: str) -> None:
        """Keeps a text as an artifact of a run; see ``Tracker``."""
        try:
            self._ask("log_text", run=asdict(run), name=name, text=text)
        except _TrackerProcessGoneError as error:
            self._own_tracker(error).log_text(run, name, text)

    def finish(self, run: TrackedRun, status: FinalStatus, tags: Mapping[str, str] = MappingProxyType({})) -> None:
        """Sets the run's final status, then the tags; see ``Tracker``."""
        try:
            self._ask("finish", run=asdict(run), status=status, tags=dict(tags))
        except _TrackerProcessGoneError as error:
            self._own_tracker(error).finish(run, status, tags)

    def metrics(self, run: TrackedRun) -> Mapping[str, float]:
        """Returns the run's metrics; see ``Tracker``."""
        try:
            values: dict[str, float] = self._ask("metrics", run=asdict(run))
        except _TrackerProcessGoneError as error:
            return self._own_tracker(error).metrics(run)
        return values

    def close(self) -> None:
        """Ends the process when it has done what it was asked; it is killed if that takes more than half a minute."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._gone:
                self._send({"op": "close"})
            try:
                self._requests.close()
            except OSError:
                # It is gone, with the last line unread.
                self._gone = True
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._replies.close()
        self._complaints.close()
        if self._substitute is not None:
            self._substitute.close()

    def _ask(self, op: str, **arguments: Any) -> Any:
        reply: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._closed:
                raise TrackingError("The tracker was closed before this call.", tracking_uri=self._masked_uri)
            if self._gone:
                raise _TrackerProcessGoneError(self._last_words(), asked=False)
            self._last_number += 1
            number = self._last_number
            self._pending[number] = reply
            if not self._send({"op": op, "number": number, **arguments}):
                self._pending.pop(number, None)
                raise _TrackerProcessGoneError(self._last_words(), asked=False)
        answer = reply.result()
        for level, message in answer.get("logged", ()):
            _logger.log(level, "%s", message)
        if "error" in answer:
            raise error_from_json(answer["error"])
        return answer["value"]

    def _send(self, message: Mapping[str, Any]) -> bool:
        """Writes one line, under the lock; False when nobody is there to read it."""
        try:
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()
        except (OSError, ValueError):
            self._gone = True
            return False
        return True

    def _read_replies(self) -> None:
        for line in self._replies:
            answer = json.loads(line)
            with self._lock:
                reply = self._pending.pop(answer["number"])
            reply.set_result(answer)
        self._process.wait()
        with self._lock:
            self._gone = True
            orphans, self._pending = list(self._pending.values()), {}
        for reply in orphans:
            reply.set_exception(_TrackerProcessGoneError(self._last_words(), asked=True))

    def _last_words(self) -> str:
        code = self._process.poll()
        how = "" if code is None else f" (exit code {code})" if code >= 0 else f" (signal {-code})"
        # pread leaves the file's offset alone, which the tracker process writes at.
        descriptor = self._complaints.fileno()
        size = os.fstat(descriptor).st_size
        text = (
            os.pread(descriptor, _COMPLAINT_BYTES, max(0, size - _COMPLAINT_BYTES)).decode("utf-8", "replace").strip()
        )
        return f"The process that talks to MLflow ended unexpectedly{how}." + (
            f" Its last words: {redact(text)}" if text else ""
        )

    def _own_tracker(self, error: _TrackerProcessGoneError) -> Tracker:
        with self._lock:
            if self._substitute is None:
                from prefect_mlprojects.tracking.in_process import InProcessTracker

                _logger.warning("%s MLflow is used in this process instead.", error)
                self._substitute = InProcessTracker()
            return self._substitute


def _process_environment() -> dict[str, str]:
    variables = dict(os.environ)
    # Nobody waits for minutes for a server that is gone; and a helper's life is not worth reporting.
    variables.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    variables.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    variables["MLFLOW_DISABLE_TELEMETRY"] = "true"
    return variables
