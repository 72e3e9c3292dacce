"""One execution: submits the run or attaches to it, watches it to its end, and returns its outcome."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.secrets import reveal_all, reveal_values
from prefect_mlprojects.backends.contract import Command, ExecutionEvents
from prefect_mlprojects.backends.databricks import storage, unavailable
from prefect_mlprojects.backends.databricks.config import insist
from prefect_mlprojects.backends.databricks.states import Diagnosis, Status, WatchEnd, cancel, waiting_for, watch
from prefect_mlprojects.backends.databricks.storage import DatabricksPrepared, RunRecord, Storage, Upload
from prefect_mlprojects.backends.databricks.task import driver_environment, submission
from prefect_mlprojects.backends.outcome import Ending, Outcome, explain_exit, stopped_outcome
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import OutputSink, StopSignal, StreamName

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.jobs import Run

_logger = logging.getLogger(__name__)
_ENDINGS: Mapping[Status, Ending] = {"cancelled": "stopped", "timed-out": "timed-out", "not-started": "not-started"}
_MAX_ATTEMPTS = 100
_MAX_TOKEN = 64  # The Jobs API's limit.


class Execution:
    """One execution of a command in a client's workspace, and its state."""

    def __init__(
        self,
        client: WorkspaceClient,
        prepared: DatabricksPrepared,
        command: Command,
        events: ExecutionEvents,
        stop: StopSignal,
    ) -> None:
        self._client, self._request, self._config = client, prepared.request, prepared.request.config
        self._upload, self._command, self._events = prepared.value, command, events
        self._output, self._stop = TailedOutput(events), stop
        self._storage = storage.storage_for(client, prepared.value.root)
        self._live = self._config.live_output and not self._config.git_source
        self._reported: tuple[str, str] | None = None
        self._token = ""

    def run(self) -> Outcome:
        """Submits and watches the run until it ends; see ``Backend.execute``."""
        started = time.monotonic()
        run_id = self._submit()
        if run_id is None:
            return stopped_outcome(self._stop)
        live = LiveOutput(self._storage, self._upload.output(self._token), self._output) if self._live else None
        deadline = None if self._command.timeout is None else started + self._command.timeout

        def look(run: Run, found: Diagnosis) -> bool:
            if not self._reported:
                self._tag(run_id, run)
            self._report_phase(run_id, run, found)
            return live.read() if live is not None else False

        run, found, why = watch(self._client, run_id, self._config, self._stop, deadline, look)
        if why != "ended" or run is None or found is None:
            self._events.report(f"Cancelling the Databricks run {run_id}")
            run, found = cancel(self._client, run_id, self._config)
        if live is not None:
            live.finish()
        known = found.status == "succeeded" and live is not None and live.complete
        error = "" if known else self._config.redact(driver_output(self._client, run, self._output, live))
        tail = self._output.close()
        self._clear(found)
        return outcome(found, why, self._stop, live, error, tail)

    def _submit(self) -> int | None:
        """Submits the run, unless an earlier attempt did and its failure was not reported; None if stopped before."""
        child_env = reveal_values(self._command.child_env)
        for attempt in range(_MAX_ATTEMPTS):
            token = f"mlp-{self._command.identity.flow_run_id}-{attempt}"[:_MAX_TOKEN]
            path = self._upload.record(token)
            record = self._ask(partial(storage.read_record, self._storage, path), "The run's record can't be read")
            if record is not None and record.reported:
                continue
            self._token = token
            self._ensure_code(path)
            body = submission(self._request, self._command.line, self._upload, child_env, token)
            if self._stop.requested:
                self._remove(path)
                return None
            # The SDK's submit() takes dataclasses and drops unknown keys.
            post = partial(self._client.api_client.do, "POST", "/api/2.2/jobs/runs/submit", body=reveal_all(body))
            try:
                # A stop request must not end these retries: a lost response may be that of a run, which costs money.
                answer: Any = insist(post, self._config, None, "The run can't be submitted to Databricks")
            except BackendError:
                self._remove(path)
                raise
            return int(answer["run_id"])
        raise unavailable(f"The run was submitted {_MAX_ATTEMPTS} times without success.")

    def _ensure_code(self, record: str) -> None:
        """Writes the run's record, then uploads the code again if a clean-up removed it meanwhile."""
        code, what = self._upload, "The project can't be uploaded to Databricks"
        sizes = {} if self._config.git_source else {code.archive: code.size, code.bootstrap: len(storage.bootstrap())}
        write = partial(self._write_record, record, files=tuple(path.rpartition("/")[2] for path in sizes))
        self._ask(write, "The run's record can't be written to the workspace")
        if all(self._ask(partial(self._storage.holds, path, size), what) for path, size in sizes.items()):
            return
        archive, _ = storage.pack(self._request, driver_environment(self._request).files)
        if Upload.of(code.root, code.user, archive) != code:
            removed = "The project's uploaded code was removed from the workspace"
            raise unavailable(f"{removed}, and its local files have changed since. Run it again.")
        storage.upload(self._storage, code, archive, partial(self._ask, what=what), self._events.report)

    def _write_record(self, path: str, **fields: Any) -> None:
        self._storage.write(path, RunRecord(user=self._upload.user, **fields).model_dump_json().encode())

    def _ask(self, call: Callable[[], Any], what: str) -> Any:
        return insist(call, self._config, self._stop, what)

    def _tag(self, run_id: int, run: Run) -> None:
        # The tags that `mlflow run` sets: mlflow/projects/databricks.py, _print_description_and_log_tags.
        tags = {"mlflow.databricks.shellJobRunID": str(run_id), "mlflow.databricks.webappURL": self._client.config.host}
        if run.job_id is not None:
            tags["mlflow.databricks.shellJobID"] = str(run.job_id)
        if run.run_page_url:
            tags["mlflow.databricks.runURL"] = run.run_page_url
            self._events.link("Databricks run", run.run_page_url)
        self._events.tag(tags)

    def _report_phase(self, run_id: int, run: Run, found: Diagnosis) -> None:
        reason = "" if found.ended else self._config.redact(waiting_for(run))
        if (found.phase, reason) != self._reported:
            self._reported = (found.phase, reason)
            self._events.report(f"Databricks run {run_id}: {found.phase}{f' ({reason})' if reason else ''}")

    def _clear(self, found: Diagnosis) -> None:
        """Removes the run's output and record; marks a failure as reported."""
        path = self._upload.record(self._token)
        if self._live:
            self._remove(self._upload.output(self._token))
        if found.status == "succeeded":
            self._remove(path)
            return
        try:
            self._write_record(path, reported=True)
        except Exception as error:  # noqa: BLE001 - must not hide the run's own failure
            self._events.report(f"The run's record was not written, so a retry will attach to the same run: {error}")

    def _remove(self, path: str) -> None:
        try:
            self._storage.remove(path)
        except Exception as error:  # noqa: BLE001 - `mlprojects databricks clean` removes it later
            self._events.report(f"{path} could not be removed: {error}")


def outcome(
    found: Diagnosis, why: WatchEnd, stop: StopSignal, live: LiveOutput | None, error: str, tail: tuple[str, ...]
) -> Outcome:
    """Returns the outcome of a run from its diagnosis, its live output and the error that Databricks shows."""
    if found.status == "succeeded":
        return Outcome("exited", exit_code=0, cause="exit code 0", output_tail=tail)
    if why == "stopped":
        return stopped_outcome(stop, tail)
    if why == "timed-out":
        return Outcome("timed-out", cause="it took longer than its timeout and was cancelled", output_tail=tail)
    failed = found.status == "failed"
    if failed and live is not None and live.problem:
        return Outcome("not-started", cause=live.problem.rstrip("."), output_tail=tail)
    code = (live.exit_code if live is not None else None) or _parse_exit_code(error)
    if failed and code:
        ended = explain_exit(code, tail)
        return replace(ended, advice=ended.advice or found.advice, reason=found.category)
    text = f"{found.cause}: {error}" if error and error not in found.cause else found.cause
    ending = _ENDINGS.get(found.status, "exited")
    code = 1 if ending == "exited" else None
    return Outcome(ending, code, cause=text, advice=found.advice, output_tail=tail, reason=found.category)


def _parse_exit_code(error: str) -> int | None:
    """Parses the bootstrap's exit code from a driver's error."""
    match = re.match(r"SystemExit: (\d+)\b", error.strip())
    return int(match[1]) if match is not None else None


_KEPT = 400  # Trailing bytes that are searched for in the driver's own output.
_STREAMS: dict[bytes, StreamName] = {b"out": "stdout", b"err": "stderr"}


class LiveOutput:
    """Reads the numbered files of a run's output folder, each once; a poll costs one request, and one for each new file."""

    def __init__(self, files: Storage, folder: str, output: OutputSink) -> None:
        self._storage, self._folder, self._output = files, folder, output
        self.next, self.last, self.problem = 1, b"", ""
        self.exit_code: int | None = None

    @property
    def complete(self) -> bool:
        """True once any output was read, and the exit code, which the bootstrap writes after the last output."""
        return self.next > 1 and self.exit_code is not None

    def read(self) -> bool:
        """Passes new output on; returns whether there was any. Errors only delay it."""
        before = self.next
        try:
            while (data := self._storage.read(f"{self._folder}/{self.next:08d}")) is not None:
                pieces = list(parse_chunk(data))
                self.next += 1
                for stream, piece in pieces:
                    self._output.write(stream, piece)
                    self.last = (self.last + piece)[-_KEPT:]
        except Exception as error:  # noqa: BLE001 - the run does not depend on it
            _logger.debug("The output of the run can't be read now: %s", error)
        return self.next != before

    def finish(self) -> None:
        """Reads the remaining output and the exit code of an ended run."""
        self.read()
        try:
            if (data := self._storage.read(f"{self._folder}/exit.json")) is not None:
                ended = json.loads(data)
                self.exit_code, self.problem = int(ended["exit_code"]), str(ended["problem"])
        except Exception as error:  # noqa: BLE001 - as above
            _logger.debug("The exit code can't be read: %s", error)


def parse_chunk(data: bytes) -> Iterator[tuple[StreamName, bytes]]:
    """Parses an output file of the bootstrap into pieces of both streams; raises ValueError while it is being written."""
    while data:
        head, newline, rest = data.partition(b"\n")
        name, _, size = head.partition(b" ")
        length = int(size)
        if not newline or len(rest) < length:
            raise ValueError("the file is incomplete")
        yield _STREAMS[name], rest[:length]
        data = rest[length:]


def driver_output(client: WorkspaceClient, run: Run, output: OutputSink, live: LiveOutput | None) -> str:
    """Passes on the driver's output that was not read live; returns the run's error."""
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
    if live is not None and live.next > 1:
        # The driver ended before it wrote the rest: it was killed, or its cluster was preempted.
        last = live.last.decode("utf-8", "replace").strip()
        logs = logs.rpartition(last)[2].lstrip("\n") if last and last in logs else ""
    if logs:
        output.write("stdout", logs.encode() + (b"" if logs.endswith("\n") else b"\n"))
    if kept.logs_truncated:
        output.write("stderr", b"(Databricks keeps no more of the driver's output than this.)\n")
    if kept.error_trace and kept.error_trace not in (kept.logs or ""):
        output.write("stderr", kept.error_trace.encode() + b"\n")
    return kept.error or ""
