"""A run's output: live from the files that the bootstrap writes, and at the end from the Jobs API."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from prefect_mlprojects.backends.databricks.storage import Storage
from prefect_mlprojects.types import OutputSink

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.jobs import Run

_logger = logging.getLogger(__name__)
_EXIT_FILE = "exit.json"


class LiveOutput:
    """Reads the numbered files of a run's output folder, each once.

    Args:
        storage: Holds the folder.
        folder: The folder.
        output: Takes the output.
    """

    def __init__(self, storage: Storage, folder: str, output: OutputSink) -> None:
        self._storage = storage
        self._folder = folder
        self._output = output
        self._next = 1
        self.exit_code: int | None = None
        self.seen = False

    def read(self) -> bool:
        """Passes new output on; returns whether there was any. Trouble with the files only delays it."""
        try:
            names = {name for name, _ in self._storage.names(self._folder)}
            return self._pass_on(names)
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.debug("The output of the run can't be read now: %s", error)
            return False

    def _pass_on(self, names: set[str]) -> bool:
        before = self._next
        while True:
            number = f"{self._next:08d}"
            name = next((f"{number}.{end}" for end in ("out", "err") if f"{number}.{end}" in names), None)
            if name is None:
                break
            data = self._storage.read(f"{self._folder}/{name}")
            self._output.write("stdout" if name.endswith(".out") else "stderr", data)
            self._next += 1
            self.seen = True
        if _EXIT_FILE in names and self.exit_code is None:
            self.exit_code = int(json.loads(self._storage.read(f"{self._folder}/{_EXIT_FILE}"))["exit_code"])
        return self._next != before


def driver_output(client: WorkspaceClient, run: Run, output: OutputSink, *, whole: bool) -> str:
    """Passes on what the Jobs API keeps of the driver's output and returns the run's error; both may be missing.

    Args:
        client: The workspace.
        run: The run.
        output: Takes the output.
        whole: Whether the driver's output is wanted too, because nothing of it came live.
    """
    task_id = run.tasks[0].run_id if run.tasks else run.run_id
    if task_id is None:
        return ""
    try:
        kept = client.jobs.get_run_output(task_id)
    except Exception as error:  # noqa: BLE001 - a run whose cluster never started has none
        _logger.debug("The run has no output: %s", error)
        return ""
    if whole and kept.logs:
        output.write("stdout", kept.logs.encode() + b"\n")
    if whole and kept.error_trace:
        output.write("stderr", kept.error_trace.encode() + b"\n")
    return kept.error or ""
