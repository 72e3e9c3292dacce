"""The output of ``mlprojects run`` on stderr: the four steps with their times, and a summary."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prefect_mlprojects.exceptions import shown
from prefect_mlprojects.tasks.session import STEPS, RunObserver, quiet_on_broken_pipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect_mlprojects.tasks.session import RunResult, StepEvent
    from prefect_mlprojects.tracking import TrackedRun
    from prefect_mlprojects.types import StreamName

_MARKS = {"started": "…", "finished": "✓", "failed": "✗", "cancelled": "■"}
_STYLES = {"started": "cyan", "finished": "green", "failed": "red", "cancelled": "yellow"}


class StderrOutput:
    """Writes the project's stdout and stderr to our stderr, so that stdout has only the JSON result."""

    def write(self, stream: StreamName, data: bytes) -> None:  # noqa: ARG002 - both go the same way
        """Writes `data` unchanged."""
        try:
            sys.stderr.buffer.write(data)
            sys.stderr.flush()
        except (OSError, ValueError):
            return


class RunDisplay(RunObserver):
    """Shows a run's steps: live on a terminal until the command starts, as plain lines in a pipe."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        quiet_on_broken_pipe(self._console)
        self._lock = threading.RLock()
        self._started: dict[str, float] = {}
        self._ended: dict[str, tuple[str, float, str]] = {}
        self._progress: dict[str, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_live()

    def __rich__(self) -> Table:
        """Draws the current state of the steps."""
        table = Table.grid(padding=(0, 1))
        with self._lock:
            for step in STEPS:
                if step in self._ended:
                    table.add_row(*self._row(step, *self._ended[step]))
                elif step in self._started:
                    elapsed = time.monotonic() - self._started[step]
                    table.add_row(*self._row(step, "started", elapsed, self._progress.get(step, "")))
                else:
                    table.add_row(Text(" "), Text(step, style="dim"), Text(""), Text(""))
        return table

    def _row(self, step: str, phase: str, seconds: float, detail: str) -> tuple[Text, Text, Text, Text]:
        first_line = detail.splitlines()[0] if detail else ""
        return (
            Text(_MARKS[phase], style=_STYLES[phase]),
            Text(step, style="bold"),
            Text(f"{seconds:.1f} s", style="dim"),
            Text(first_line, style="dim", overflow="ellipsis", no_wrap=True),
        )

    def announce(self, line: str) -> None:
        """Prints a line about a server that is being started."""
        self._print(Text(line, style="dim"))

    def flow_run(self, flow_run_id: str, url: str | None) -> None:
        """Prints the address of the flow run."""
        self._print(Text(f"Flow run: {url or flow_run_id}"))

    def cancelling(self) -> None:
        """Prints that the run was asked to stop."""
        self._print(Text("Cancelling ...", style="yellow"))

    def step(self, event: StepEvent) -> None:
        """Shows a step's progress."""
        output = tuple(shown(line) for line in event.output)
        event = dataclasses.replace(event, detail=shown(event.detail, lines=True), output=output)
        lines: list[Text] = []
        begins_output = event.phase == "started" and event.step == "execute"
        with self._lock:
            live = self._live is not None
            if event.phase == "started":
                self._started[event.step] = event.at
                self._ended.pop(event.step, None)
            elif event.phase == "progress":
                self._progress[event.step] = event.detail
                warning = event.detail.startswith("Warning:")
                if warning or (not live and event.step == "resolve-env" and not event.quiet):
                    lines = [Text(f"  {event.detail}", style="yellow" if warning else "dim")]
            else:
                seconds = event.at - self._started.get(event.step, event.at)
                self._ended[event.step] = (event.phase, seconds, event.detail)
                lines = [Text(f"  {line}", style="dim") for line in event.output]
                if not live:
                    lines.append(self._line(event.step))
        # Without our lock: rich draws the live region in a thread that holds the console and waits for the lock.
        if begins_output:
            # From here on the project writes to the terminal itself, which would break a live region.
            self._stop_live()
        for line in lines:
            self._print(line)

    def _line(self, step: str) -> Text:
        phase, seconds, detail = self._ended[step]
        mark, name, elapsed, text = self._row(
            step, phase, seconds, detail if phase == "finished" and step != "execute" else ""
        )
        return Text.assemble(mark, " ", name, " ", elapsed, "  ", text)

    def _stop_live(self) -> None:
        """Replaces the live region, if any, by the lines of the steps that have ended."""
        with self._lock:
            live, self._live = self._live, None
            lines = [self._line(step) for step in STEPS if step in self._ended]
        if live is not None:
            live.stop()
            for line in lines:
                self._print(line)

    def _print(self, text: Text) -> None:
        if not text.plain.isprintable():
            text = Text(shown(text.plain, lines=True), style=text.style)
        try:
            self._console.print(text)
        except OSError:
            return

    def summary(
        self, result: RunResult, tracked: TrackedRun | None, url: str | None, metrics: Mapping[str, float]
    ) -> None:
        """Prints the run's outcome, metrics and links."""
        style = {"FINISHED": "bold green", "KILLED": "bold yellow"}.get(result.status, "bold red")
        headline = {"FINISHED": "succeeded", "KILLED": "was cancelled"}.get(result.status, "failed")
        if result.status == "FINISHED" or not result.message:
            self._print(Text(f"=== Run (ID '{result.run_id}') {headline} ===", style=style))
        else:
            self._print(Text(result.message, style=style))
        rows: list[tuple[str, Any]] = [(name, f"{value:g}") for name, value in sorted(metrics.items())]
        rows.append(("flow run", url or result.flow_run_id))
        if tracked is not None:
            served_by = f"  (served by `{tracked.hint}`)" if tracked.hint else ""
            rows.append(("MLflow run", f"{tracked.url or tracked.run_id}{served_by}"))
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self._print(Text(f"  {name:<{width}}  {value}"))
