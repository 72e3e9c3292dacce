"""Splits a program's output into lines and joins lines to log records. Pure: no clock, thread or file."""

from __future__ import annotations

import codecs
import io
import math
import re
from collections import deque
from dataclasses import dataclass
from typing import get_args

from prefect_mlprojects.types import OutputSink, StreamName

MAX_LINE_CHARACTERS = 200_000
MAX_RECORD_LINES = 500
MAX_RECORD_BYTES = 500_000
MAX_RECORD_SECONDS = 0.5
SLOW_SECONDS = 0.05
_LINE_END = re.compile("(\r\n|\r|\n)")


class LineSplitter:
    r"""Splits a stream of bytes into lines of text.

    A line ends with ``\n``, ``\r\n`` or a lone ``\r``. One that ends with a lone ``\r``, such as a refresh of a progress bar,
    is overwritten by the next; of those only one is returned per `refresh_seconds`. Invalid UTF-8 becomes U+FFFD. An
    incomplete line is kept until its end or `close`; one longer than `max_characters` is split.
    """

    def __init__(self, max_characters: int = MAX_LINE_CHARACTERS, refresh_seconds: float = 0.0) -> None:
        self._decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=False)
        self._max_characters = max_characters
        self._refresh_seconds = refresh_seconds
        self._refreshed_at = 0.0
        self._overwritten = ""
        self._pieces: list[str] = []
        self._length = 0

    def feed(self, data: bytes, now: float = 0.0) -> list[str]:
        """Takes the next bytes at the time `now` (seconds since the epoch) and returns the completed lines."""
        return self._split(self._decoder.decode(data), now)

    def close(self) -> list[str]:
        """Returns the remaining lines at the end of the stream."""
        lines = self._split(self._decoder.decode(b"", final=True), 0.0)
        last = self._take() or self._overwritten
        return [*lines, last] if last else lines

    def _split(self, text: str, now: float) -> list[str]:
        *ended, rest = _LINE_END.split(text)
        lines: list[str] = []
        for piece, end in zip(ended[::2], ended[1::2], strict=True):
            self._append(piece, lines)
            self._end_line(self._take(), end, now, lines)
        self._append(rest, lines)
        return lines

    def _end_line(self, line: str, end: str, now: float, lines: list[str]) -> None:
        if end != "\r" or not self._refresh_seconds:
            lines.append(line or self._overwritten)
            self._overwritten = ""
        elif line and now - self._refreshed_at >= self._refresh_seconds:
            lines.append(line)
            self._overwritten, self._refreshed_at = "", now
        elif line:
            self._overwritten = line

    def _append(self, piece: str, lines: list[str]) -> None:
        while self._length + len(piece) > self._max_characters:
            room = self._max_characters - self._length
            self._pieces.append(piece[:room])
            lines.append(self._take())
            piece = piece[room:]
        if piece:
            self._pieces.append(piece)
            self._length += len(piece)

    def _take(self) -> str:
        line = "".join(self._pieces)
        self._pieces.clear()
        self._length = 0
        return line


@dataclass(frozen=True)
class OutputRecord:
    """Consecutive lines of output, joined by newlines; ``output`` is the stream for lines of both streams."""

    time: float  # arrival of the first line, in seconds since the epoch
    stream: StreamName | str
    text: str


class RecordJoiner:
    """Joins lines to records: one line per record for slow output, many for fast output.

    A line after a pause becomes a record at once; others are kept for up to half a second or until a record is full. The
    order of lines is kept across both streams.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._streams: set[str] = set()
        self._bytes = 0
        self._since = 0.0
        self._last = 0.0

    def add(self, stream: StreamName, lines: list[str], now: float) -> list[OutputRecord]:
        """Takes lines of a stream at the time `now` (seconds since the epoch) and returns the completed records."""
        if not lines:
            return []
        records: list[OutputRecord] = []
        slow = not self._lines and len(lines) == 1 and now - self._last >= SLOW_SECONDS
        for line in lines:
            size = len(line.encode("utf-8", "replace")) + 1
            if self._lines and (self._bytes + size > MAX_RECORD_BYTES or len(self._lines) >= MAX_RECORD_LINES):
                records += self.flush(now)
            if not self._lines:
                self._since = now
            self._lines.append(line)
            self._streams.add(stream)
            self._bytes += size
        self._last = now
        if slow or now >= self._since + MAX_RECORD_SECONDS:
            records += self.flush(now)
        return records

    def deadline(self) -> float | None:
        """Returns when to flush the kept lines, in seconds since the epoch; None if there are none."""
        return self._since + MAX_RECORD_SECONDS if self._lines else None

    def flush(self, now: float) -> list[OutputRecord]:
        """Returns the kept lines, if any, as a record."""
        if not self._lines:
            return []
        stream = next(iter(self._streams)) if len(self._streams) == 1 else "output"
        record = OutputRecord(min(self._since, now), stream, "\n".join(self._lines))
        self._lines.clear()
        self._streams.clear()
        self._bytes = 0
        return [record]


class OutputTail:
    """Keeps the last lines, each cut to `max_characters`, for error messages."""

    def __init__(self, max_lines: int = 20, max_characters: int = 500) -> None:
        self._lines: deque[str] = deque(maxlen=max_lines)
        self._max_characters = max_characters

    def add(self, line: str) -> None:
        """Takes the next line; ignores an empty one."""
        if line.strip():
            self._lines.append(line if len(line) <= self._max_characters else line[: self._max_characters] + "…")

    def lines(self) -> tuple[str, ...]:
        """Returns the last lines, oldest first."""
        return tuple(self._lines)


class TailedOutput:
    """An `OutputSink` that forwards output and keeps its last lines."""

    def __init__(self, output: OutputSink) -> None:
        self._output = output
        self._tail = OutputTail()
        self._splitters = {stream: LineSplitter(refresh_seconds=math.inf) for stream in get_args(StreamName)}

    def write(self, stream: StreamName, data: bytes) -> None:
        """Forwards the next bytes of a stream."""
        self._output.write(stream, data)
        for line in self._splitters[stream].feed(data):
            self._tail.add(line)

    def close(self) -> tuple[str, ...]:
        """Returns the last lines, oldest first, at the end of the output."""
        for splitter in self._splitters.values():
            for line in splitter.close():
                self._tail.add(line)
        return self._tail.lines()
