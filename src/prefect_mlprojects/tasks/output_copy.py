"""Keeps a copy of a run's output, whole or its end, for the MLflow run's artifacts."""

from __future__ import annotations

import logging
import tempfile
import threading
from typing import IO

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.types import StreamName

_logger = logging.getLogger(__name__)


class OutputCopy:
    """An output sink that keeps the last `limit` bytes of both streams, in the order they came, on disk; thread-safe.

    Two files of `limit` bytes are written in turn, so that at most twice the limit is on disk and nothing is copied.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._files: list[IO[bytes]] = []
        self._size = 0
        self._dropped = 0

    def write(self, stream: StreamName, data: bytes) -> None:
        """Takes output; a full disk ends the copy, not the run."""
        del stream
        if self._limit <= 0:
            return
        with self._lock:
            try:
                self._append(data[-self._limit :])
                self._dropped += max(0, len(data) - self._limit)
            except OSError as error:
                _logger.warning("The output can't be kept for the MLflow run: %s", error)
                self._limit = 0

    def _append(self, data: bytes) -> None:
        if not self._files or self._size + len(data) > self._limit:
            self._files.append(tempfile.TemporaryFile(prefix="mlprojects-output-"))  # noqa: SIM115 - closed by `text`
            self._size = 0
        if len(self._files) > 2:
            oldest = self._files.pop(0)
            self._dropped += oldest.tell()
            oldest.close()
        self._files[-1].write(data)
        self._size += len(data)

    def text(self) -> str:
        """Returns the copy, redacted, with a first line that says how much is missing; closes it."""
        with self._lock:
            data = b""
            for file in self._files:
                file.seek(0)
                data += file.read()
                file.close()
            self._files.clear()
            dropped = self._dropped + max(0, len(data) - self._limit)
        text = redact(data[-self._limit :].decode("utf-8", "backslashreplace") if data else "")
        return f"[{dropped} bytes before this are left out]\n{text}" if dropped else text
