"""A run's output: live from the files that the bootstrap writes, and at the end from the Jobs API."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prefect_mlprojects.backends.databricks.storage import Storage
from prefect_mlprojects.types import OutputSink, StreamName

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.jobs import Run

_logger = logging.getLogger(__name__)
_EXIT_FILE = "exit.json"
_KEPT = 400  # Bytes by which the place in the driver's own output is found again.
_STREAMS: dict[bytes, StreamName] = {b"out": "stdout", b"err": "stderr"}


class LiveOutput:
    """Reads the numbered files of a run's output folder, each once.

    A look costs one request, for the file that comes next, and one more for each that was there.
    """

    def __init__(self, storage: Storage, folder: str, output: OutputSink) -> None:
        self._storage = storage
        self._folder = folder
        self._output = output
        self._next = 1
        self.last = b""
        self.exit_code: int | None = None
        self.problem = ""

    @property
    def seen(self) -> bool:
        """Whether anything came."""
        return self._next > 1

    @property
    def complete(self) -> bool:
        """Whether all came: the bootstrap told how the command ended, after its last output."""
        return self.seen and self.exit_code is not None

    def read(self) -> bool:
        """Passes new output on; returns whether there was any. Trouble with the files only delays it."""
        before = self._next
        try:
            while (data := self._storage.read(f"{self._folder}/{self._next:08d}")) is not None:
                pieces = list(parse_chunk(data))
                self._next += 1
                for stream, piece in pieces:
                    self._output.write(stream, piece)
                    self.last = (self.last + piece)[-_KEPT:]
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.debug("The output of the run can't be read now: %s", error)
        return self._next != before

    def finish(self) -> None:
        """Reads the rest, once the run has ended, and how its command ended."""
        self.read()
        try:
            data = self._storage.read(f"{self._folder}/{_EXIT_FILE}")
            if data is not None:
                told = json.loads(data)
                self.exit_code, self.problem = int(told["exit_code"]), str(told["problem"])
        except Exception as error:  # noqa: BLE001 - as above
            _logger.debug("How the command ended can't be read: %s", error)


def parse_chunk(data: bytes) -> Iterator[tuple[StreamName, bytes]]:
    """Takes a file of the bootstrap apart: pieces of both streams in their order.

    Raises:
        ValueError: It is not whole: it is still being written.
    """
    while data:
        head, newline, rest = data.partition(b"\n")
        name, _, size = head.partition(b" ")
        length = int(size)
        if not newline or len(rest) < length:
            raise ValueError("the file is not whole")
        yield _STREAMS[name], rest[:length]
        data = rest[length:]


def driver_output(client: WorkspaceClient, run: Run, output: OutputSink, live: LiveOutput | None) -> str:
    """Passes on what the Jobs API keeps of the driver's output and did not come live; returns the run's error.

    All of it may be missing: a run whose cluster never started has neither.

    Args:
        client: The workspace.
        run: The run.
        output: Takes the output.
        live: What came live; None for nothing.
    """
    task_id = run.tasks[0].run_id if run.tasks else run.run_id
    if task_id is None:
        return ""
    try:
        kept = client.jobs.get_run_output(task_id)
    except Exception as error:  # noqa: BLE001 - a run whose cluster never started has none
        _logger.debug("The run has no output: %s", error)
        return ""
    logs = kept.logs or ""
    if live is not None and live.complete:
        return kept.error or ""
    if live is not None and live.seen:
        # The driver ended before it could write the rest: a killed driver, a cluster that was taken away.
        logs = _after(logs, live.last.decode("utf-8", "replace"))
    if logs:
        output.write("stdout", logs.encode() + (b"" if logs.endswith("\n") else b"\n"))
    if kept.logs_truncated:
        output.write("stderr", b"(Databricks keeps no more of the driver's output than this.)\n")
    if kept.error_trace and kept.error_trace not in (kept.logs or ""):
        output.write("stderr", kept.error_trace.encode() + b"\n")
    return kept.error or ""


def _after(logs: str, last: str) -> str:
    """What follows the last text that was passed on; nothing where that can't be found."""
    place = logs.rfind(last.strip()) if last.strip() else -1
    return logs[place + len(last.strip()) :].lstrip("\n") if place >= 0 else ""
