"""``mlprojects run``, and ``wait|cancel|logs RUN`` for runs that any process started."""

from __future__ import annotations

import asyncio
import heapq
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from prefect_mlprojects.cli.options import (
    RUN,
    TAGS,
    connect,
    json_option,
    print_json,
    request_from_options,
    run_options,
)
from prefect_mlprojects.cli.tables import pass_on, say
from prefect_mlprojects.exceptions import shown
from prefect_mlprojects.server.api import read_all

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import Log

_PROGRAM_LOGS = ("prefect_mlprojects.stdout", "prefect_mlprojects.stderr")

if TYPE_CHECKING:
    from prefect_mlprojects.request import RunRequest
    from prefect_mlprojects.request.check import CheckedRun, RunSecrets
    from prefect_mlprojects.runs.handles import LocalSubmittedRun, SubmittedRun
    from prefect_mlprojects.tasks.session import RunResult


REBUILD = click.option("--rebuild-env", is_flag=True, help="Rebuild the environment even if it is cached.")
DETACH = click.option("--detach", is_flag=True, help="Start the run in the background, print its ID and return.")
JSON_RESULT = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout; the project's stdout goes to stderr."
)
REPORT = click.option("--detached-report", type=int, hidden=True)


@click.command("run")
@run_options("cli", read_environment=True)
@TAGS
@REBUILD
@DETACH
@JSON_RESULT
@REPORT
@click.pass_context
def run_command(
    context: click.Context,
    /,
    tags: tuple[str, ...],
    rebuild_env: bool,
    detach: bool,
    as_json: bool,
    detached_report: int | None,
    **options: Any,
) -> None:
    """Run the project at URI: a folder (default: the current one), a git repository or a zip archive.

    The project's stdout goes to stdout, everything else to stderr. Exit codes: 0 finished, 1 failed, 2 usage or bad
    input, 130 cancelled.
    """
    request, secrets = request_from_options(context, options)
    from prefect_mlprojects.request.tags import checked_tags
    from prefect_mlprojects.runs.start import preflight

    tags = checked_tags(tags)

    checked = preflight(request, secrets)
    if detach:
        context.exit(run_detached(as_json=as_json))
    context.exit(
        run_request(
            request, secrets, checked, tags=tags, rebuild_env=rebuild_env, as_json=as_json, report=detached_report
        )
    )


def run_request(
    request: RunRequest,
    secrets: RunSecrets,
    checked: CheckedRun | None,
    *,
    tags: tuple[str, ...],
    rebuild_env: bool,
    as_json: bool,
    report: int | None,
) -> int:
    """Runs a request in this process, shows its steps and its result, and returns the exit code."""
    from prefect_mlprojects.cli.display import RunDisplay, StderrOutput
    from prefect_mlprojects.tracking import ProcessTracker, Tracker

    display = RunDisplay()
    # MLflow and Prefect take some two seconds each to import: another process imports MLflow, this one Prefect.
    tracker: Tracker
    try:
        tracker = ProcessTracker()
    except OSError:
        # No more processes, or no memory: this process imports both.
        tracker = Tracker()
    try:
        from prefect_mlprojects.runs.start import start, wait_interruptibly
        from prefect_mlprojects.tasks.session import RunSession, TerminalOutput

        session = RunSession(
            tracker=tracker,
            output=StderrOutput() if as_json else TerminalOutput(),
            observer=display,
            rebuild_environment=rebuild_env,
            tags=tags,
        )
        with display:
            handle = start(request, secrets, session, checked, announce=display.announce, own_process=True)
            display.flow_run(handle.flow_run_id, handle.url)
            if report is not None:
                _report_start(report, handle)
            session.stop.on_request(display.cancelling)
            result = wait_interruptibly(handle, reraise=False)
        tracked = session.tracked_run
        metrics = tracker.metrics(tracked) if tracked is not None and result.status == "FINISHED" else {}
        display.summary(result, tracked, handle.url, metrics)
        if as_json:
            print_json(_as_json(result, handle.url, tracked, metrics))
    finally:
        tracker.close()
    return exit_code_of(result)


def exit_code_of(result: RunResult) -> int:
    """Returns the exit code of a command that waited for a run."""
    if result.status == "FAILED" and result.error is not None:
        return result.error.exit_status
    return {"FINISHED": 0, "FAILED": 1, "KILLED": 130}.get(result.status, 0)


def _as_json(result: RunResult, url: str | None, tracked: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
    names = ("status", "run_id", "experiment_id", "tracking_uri", "flow_run_id", "exit_code")
    return {
        **{name: getattr(result, name) for name in (*names, "category", "cause", "message")},
        "run_url": tracked.url if tracked is not None else None,
        "flow_run_url": url,
        "metrics": dict(metrics),
    }


def run_detached(*added: str, as_json: bool) -> int:
    """Runs the same command, with `added` options, in the background and prints the IDs of its flow run.

    Returns 0, or a failed start's exit code.
    """
    arguments = [argument for argument in sys.argv[1:] if argument not in {"--detach", "--json"}]
    reader, writer = os.pipe()
    errors = os.memfd_create("mlprojects-detached") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    # The arguments go through stdin: a password in a URL must not stay in the process list while the run continues.
    code = "import json, sys; from prefect_mlprojects.cli import main; main(json.load(sys.stdin))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=(writer,),
        start_new_session=True,
    )
    os.close(writer)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(json.dumps([arguments[0], f"--detached-report={writer}", *added, *arguments[1:]]).encode())
    with os.fdopen(reader, encoding="utf-8") as stream:
        text = stream.read()
    if not text:
        exit_code = process.wait()
        os.lseek(errors, 0, os.SEEK_SET)
        with os.fdopen(errors, encoding="utf-8", errors="replace") as stream:
            say(stream.read().rstrip(), err=True)
        return exit_code or 1
    started = json.loads(text)
    print_started(started, as_json=as_json)
    return 0


def print_started(started: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints the ID of a run that continues without this process, and how to follow it."""
    if as_json:
        print_json(started)
        return
    say(started["flow_run_id"])
    say(f"Flow run: {started['flow_run_url'] or started['flow_run_id']}", err=True)
    say(f"Follow it with: mlprojects status|logs|wait|cancel {started['flow_run_id']}", err=True)


def _report_start(descriptor: int, run: LocalSubmittedRun) -> None:
    """Sends the IDs of a started run to the waiting foreground process."""
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump({"flow_run_id": run.flow_run_id, "flow_run_url": run.url, "process_id": os.getpid()}, stream)


def _attach(run: str) -> SubmittedRun:
    connect()
    from prefect_mlprojects.runs.handles import SubmittedRun

    return SubmittedRun.attach(run)


@click.command("wait")
@RUN
@json_option
@click.pass_context
def wait_command(context: click.Context, run: str, as_json: bool) -> None:
    """Wait for RUN to end.

    Exit codes: 0 finished, 1 failed, 130 cancelled.
    """
    handle = _attach(run)
    result = handle.result()
    if as_json:
        shown = {"flow_run_id": result.flow_run_id, "run_id": result.run_id, "status": result.status}
        print_json({**shown, "message": result.message})
    else:
        say(result.status)
        if result.message and result.status != "FINISHED":
            say(result.message, err=True)
    context.exit(exit_code_of(result))


@click.command("cancel")
@RUN
@json_option
def cancel_command(run: str, as_json: bool) -> None:
    """Cancel RUN and wait until it has ended."""
    handle = _attach(run)
    handle.cancel()
    if as_json:
        print_json({"flow_run_id": handle.flow_run_id, "status": handle.get_status()})
    else:
        say(handle.get_status())


@click.command("logs")
@RUN
@click.option("-f", "--follow", is_flag=True, help="Keep printing until the run has ended.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Print only the last N lines first.")
@click.option("-t", "--timestamps", is_flag=True, help="Print the time (UTC) before each line.")
@click.option("--stdout-only", is_flag=True, help="Print only what the project wrote to stdout.")
def logs_command(run: str, follow: bool, tail: int | None, timestamps: bool, stdout_only: bool) -> None:
    """Print the log of RUN, in order."""
    api_url = connect()
    from prefect_mlprojects.runs.handles import SubmittedRun
    from prefect_mlprojects.server.api import call_api

    handle = SubmittedRun.attach(run)
    call_api(api_url, print_logs, handle.flow_run_id, follow, tail, timestamps, stdout_only)


_POLL_SECONDS = 0.5
_SETTLE_SECONDS = 2.0
"""How long a record is held back: Prefect's log handler sends a batch every two seconds, so older records may still come."""


async def print_logs(
    client: PrefectClient, flow_run_id: str, follow: bool, tail: int | None, timestamps: bool, stdout_only: bool
) -> None:
    """Prints the lines of a flow run's log by time; with `follow`, until the run has ended."""
    identifier = UUID(flow_run_id)
    flow_run = await client.read_flow_run(identifier)
    ended = flow_run.state is not None and flow_run.state.is_final()

    def show(log: Log) -> list[str]:
        if stdout_only and log.name != "prefect_mlprojects.stdout":
            return []
        time = f"{log.timestamp.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z " if timestamps else ""
        # What the program wrote is printed as it is, as a run prints it.
        text = log.message if log.name in _PROGRAM_LOGS else shown(log.message, lines=True)
        return [f"{time}{line}" for line in text.split("\n")]

    stored = await _read(client, identifier)
    lines: deque[str] = deque((line for log in stored for line in show(log)), maxlen=tail)
    for line in lines:
        pass_on(line)
    if follow and not ended:
        async for log in _follow(client, identifier, stored):
            for line in show(log):
                pass_on(line)


async def _read(client: PrefectClient, flow_run_id: UUID, since: datetime | None = None) -> list[Log]:
    """Returns the stored records from a time on, oldest first."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterTimestamp
    from prefect.client.schemas.sorting import LogSort

    wanted = LogFilter(
        flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]),
        timestamp=LogFilterTimestamp.model_validate({"after_": since}) if since is not None else None,
    )
    return await read_all(partial(client.read_logs, wanted), sort=LogSort.TIMESTAMP_ASC)


async def _follow(client: PrefectClient, flow_run_id: UUID, printed: list[Log]) -> AsyncIterator[Log]:
    """Yields new records in the order of their times, until the run has ended and its last record was read.

    Prefect can stream logs, but its servers do so only if ``PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED`` is set.
    """
    seen = {log.id for log in printed}
    waiting: list[tuple[datetime, int, Any]] = []
    newest = printed[-1].timestamp if printed else None
    final = False
    while True:
        # Records come in batches of several processes: one that is a little older may come later.
        since = newest - timedelta(seconds=3 * _SETTLE_SECONDS) if newest is not None else None
        for log in await _read(client, flow_run_id, since):
            if log.id not in seen:
                seen.add(log.id)
                heapq.heappush(waiting, (log.timestamp, len(seen), log))
                newest = max(newest or log.timestamp, log.timestamp)
        settled = datetime.now(timezone.utc) - timedelta(seconds=_SETTLE_SECONDS)
        while waiting and (final or waiting[0][0] <= settled):
            yield heapq.heappop(waiting)[2]
        if final:
            return
        flow_run = await client.read_flow_run(flow_run_id)
        final = flow_run.state is not None and flow_run.state.is_final()
        # The last batch is sent when the run's process ends.
        await asyncio.sleep(_SETTLE_SECONDS if final else _POLL_SECONDS)
