"""A program's output as lines and records: pure, without clock, thread or file."""

from __future__ import annotations

import codecs
import re
from collections import deque
from dataclasses import dataclass

from prefect_mlprojects.types import OutputSink, StreamName

MAX_LINE_CHARACTERS = 200_000
MAX_RECORD_LINES = 500
MAX_RECORD_BYTES = 500_000
MAX_RECORD_SECONDS = 0.5
SLOW_SECONDS = 0.05

_LINE_END = re.compile(r"\r\n|\n|\r")


class LineSplitter:
    r"""Cuts a stream of bytes into lines of text.

    A line ends with ``\n``, ``\r\n`` or a lone ``\r``, so that each refresh of a progress bar is a line of its own. Text
    is UTF-8; what is not is shown as U+FFFD. A line that has no end yet is held until it has, or until ``close``; one that
    grows beyond ``max_characters`` is handed on in pieces of that length.

    Args:
        max_characters: The length that a line may have.
    """

    def __init__(self, max_characters: int = MAX_LINE_CHARACTERS) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._max_characters = max_characters
        self._parts: list[str] = []
        self._length = 0
        self._held_return = False

    def feed(self, data: bytes) -> list[str]:
        """Takes the next bytes and returns the lines that are complete."""
        return self._split(self._decoder.decode(data), final=False)

    def close(self) -> list[str]:
        """Returns what is left at the end of the stream."""
        return self._split(self._decoder.decode(b"", final=True), final=True)

    def _split(self, text: str, *, final: bool) -> list[str]:
        if self._held_return:
            # Whether the return belonged to a "\r\n" shows only now.
            text = "\r" + text
            self._held_return = False
        if text.endswith("\r") and not final:
            text = text[:-1]
            self._held_return = True
        pieces = _LINE_END.split(text)
        lines: list[str] = []
        for piece in pieces[:-1]:
            self._hold(piece, lines)
            lines.append(self._take())
        self._hold(pieces[-1], lines)
        if final and self._length:
            lines.append(self._take())
        return lines

    def _hold(self, piece: str, lines: list[str]) -> None:
        while self._length + len(piece) > self._max_characters:
            room = self._max_characters - self._length
            self._parts.append(piece[:room])
            lines.append(self._take())
            piece = piece[room:]
        if piece:
            self._parts.append(piece)
            self._length += len(piece)

    def _take(self) -> str:
        line = "".join(self._parts)
        self._parts.clear()
        self._length = 0
        return line


@dataclass(frozen=True)
class OutputRecord:
    """Some lines of output.

    Attributes:
        time: When its first line came, seconds since the epoch.
        stream: ``stdout`` or ``stderr``; ``output`` where lines of both follow each other too fast to tell them apart.
        text: The lines, joined by newlines.
    """

    time: float
    stream: StreamName | str
    text: str


class RecordJoiner:
    """Joins lines into records: slow output makes a record a line, fast output one of many lines.

    A line that comes when none did for a moment is a record at once. Others are held for up to half a second, or until there are
    enough of them. Order is kept across both streams; a record that holds lines of both says ``output`` as its stream.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._streams: set[str] = set()
        self._bytes = 0
        self._since = 0.0
        self._last = 0.0

    def add(self, stream: StreamName, lines: list[str], now: float) -> list[OutputRecord]:
        """Takes lines and returns the records that are complete.

        Args:
            stream: Where they came from.
            lines: The lines.
            now: The time, seconds since the epoch.
        """
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
        """Returns when the held lines are to be flushed, seconds since the epoch; None when none are held."""
        return self._since + MAX_RECORD_SECONDS if self._lines else None

    def flush(self, now: float) -> list[OutputRecord]:
        """Returns the held lines as a record, if there are any.

        Args:
            now: The time, seconds since the epoch.
        """
        if not self._lines:
            return []
        stream = next(iter(self._streams)) if len(self._streams) == 1 else "output"
        record = OutputRecord(min(self._since, now), stream, "\n".join(self._lines))
        self._lines.clear()
        self._streams.clear()
        self._bytes = 0
        return [record]


class OutputTail:
    """Keeps the last lines, for a message.

    Args:
        max_lines: How many.
        max_characters: What a line is cut to.
    """

    def __init__(self, max_lines: int = 20, max_characters: int = 500) -> None:
        self._lines: deque[str] = deque(maxlen=max_lines)
        self._max_characters = max_characters

    def add(self, line: str) -> None:
        """Takes the next line; an empty one is not worth a place."""
        if line.strip():
            self._lines.append(line if len(line) <= self._max_characters else line[: self._max_characters] + "…")

    def lines(self) -> tuple[str, ...]:
        """Returns the last lines, the oldest first."""
        return tuple(self._lines)


class TailedOutput:
    """An ``OutputSink`` that passes output on and keeps its last lines.

    Args:
        output: Where it goes.
    """

    def __init__(self, output: OutputSink) -> None:
        self._output = output
        self._tail = OutputTail()
        self._splitters: dict[StreamName, LineSplitter] = {"stdout": LineSplitter(), "stderr": LineSplitter()}

    def write(self, stream: StreamName, data: bytes) -> None:
        """Passes the next bytes on."""
        self._output.write(stream, data)
        for line in self._splitters[stream].feed(data):
            self._tail.add(line)

    def close(self) -> tuple[str, ...]:
        """Returns the last lines, the oldest first, once there is no more output."""
        for splitter in self._splitters.values():
            for line in splitter.close():
                self._tail.add(line)
        return self._tail.lines()
