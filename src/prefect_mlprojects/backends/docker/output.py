"""Reads a container's output in order and without loss, over connections that may break."""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects.types import StreamName

_logger = logging.getLogger(__name__)

_HEADER_SIZE = 8
_STREAMS: dict[int, StreamName] = {1: "stdout", 2: "stderr"}
_DRAIN_SECONDS = 60.0
"""Seconds for which a broken connection is retried after the container's exit."""

Piece = tuple[StreamName, bytes]


class ContainerOutput:
    """Reads a container's output in a background thread and writes it to an output.

    After a broken connection it reads the engine's log of the container and skips the part that was written already. It counts
    lines and the bytes after the last one, since the log holds invalid UTF-8 as other bytes.
    """

    def __init__(self, engine: Any, container_id: str, output: TailedOutput, *, tty: bool) -> None:
        self._engine = engine
        self._id = container_id
        self._output = output
        self._tty = tty
        self._seen: dict[StreamName, _Position] = {"stdout": _Position(), "stderr": _Position()}
        self._pieces = 0
        self._container_ended = threading.Event()
        self._reader: threading.Thread | None = None

    def attach(self) -> None:
        """Attaches to a container before its start; delivers incomplete lines at once."""
        stream = self._engine.attach(self._id, stdout=True, stderr=True, stream=True, logs=True, demux=not self._tty)
        self._read_in_thread(self._attached(stream))

    def follow_log(self) -> None:
        """Begins to read the log of a started container, from its first line."""
        self._read_in_thread(self._log())

    def finish(self) -> None:
        """Waits until all output was read; called after the container's exit."""
        self._container_ended.set()
        if self._reader is None:
            return
        before = -1
        # Waits as long as output keeps coming.
        while self._reader.is_alive() and before != self._pieces:
            before = self._pieces
            self._reader.join(_DRAIN_SECONDS)

    def _read_in_thread(self, source: Iterator[Piece]) -> None:
        self._reader = threading.Thread(target=self._read, args=(source,), name="container-output", daemon=True)
        self._reader.start()

    def _read(self, source: Iterator[Piece]) -> None:
        from docker.errors import DockerException
        from urllib3.exceptions import HTTPError

        left = _DRAIN_SECONDS
        while True:
            error: Exception | None = None
            try:
                for name, data in source:
                    self._pieces += 1
                    self._seen[name].advance(data)
                    self._output.write(name, data)
                if self._container_ended.is_set() or not self._engine.inspect_container(self._id)["State"]["Running"]:
                    return
            except (DockerException, HTTPError, OSError, ValueError) as broken:
                # ValueError: the connection was closed while it was read.
                error = broken
            if "does not support reading" in str(error):
                _logger.warning("The engine keeps no log of the container: output since the connection broke is lost")
                return
            if left <= 0:
                _logger.warning("The container's output could not be read to its end: %s", error)
                return
            if self._container_ended.is_set():
                left -= 1
            time.sleep(1)
            source = _unseen(self._log(), self._seen)

    def _attached(self, stream: Any) -> Iterator[Piece]:
        with contextlib.closing(stream):
            for piece in stream:
                pieces: Iterable[Piece] = (
                    [("stdout", piece)] if self._tty else zip(_STREAMS.values(), piece, strict=True)
                )
                yield from ((name, data) for name, data in pieces if data)

    def _log(self) -> Iterator[Piece]:
        """Yields the container's log from its start, and follows it; parses the frames of the engine's API.

        https://docs.docker.com/reference/api/engine/version/v1.43/#tag/Container/operation/ContainerAttach
        """
        # Docker's SDK reads the same frames, but drops their stream.
        response = self._engine.get(
            f"{self._engine.base_url}/v{self._engine.api_version}/containers/{self._id}/logs",
            params={"stdout": 1, "stderr": 1, "follow": 1},
            stream=True,
            timeout=(60, None),
        )
        with contextlib.closing(response):
            if not response.ok:
                raise OSError(response.text.strip())
            if self._tty:
                yield from (("stdout", data) for data in response.raw.stream(1 << 14))
                return
            while header := _exactly(response.raw, _HEADER_SIZE):
                kind, length = struct.unpack(">BxxxL", header)
                yield _STREAMS.get(kind, "stdout"), _exactly(response.raw, length)


def _exactly(raw: Any, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := raw.read(length - len(data))):
        data += more
    if data and len(data) < length:
        raise OSError("the connection ended in the middle of a frame")
    return data


@dataclass
class _Position:
    """How far a stream was read: complete lines, and bytes after the last of them."""

    lines: int = 0
    rest: int = 0

    def advance(self, data: bytes) -> None:
        self.lines += data.count(b"\n")
        self.rest = len(data) - data.rfind(b"\n") - 1 if b"\n" in data else self.rest + len(data)


def _unseen(source: Iterator[Piece], seen: dict[StreamName, _Position]) -> Iterator[Piece]:
    """Yields the part of a log that was not written yet."""
    left = {name: replace(position) for name, position in seen.items()}
    for name, data in source:
        position = left[name]
        while position.lines and data:
            _, newline, data = data.partition(b"\n")
            position.lines -= len(newline)
        skipped = min(position.rest, len(data))
        position.rest -= skipped
        if data[skipped:]:
            yield name, data[skipped:]
