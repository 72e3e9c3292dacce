"""``mlprojects run --detach``: the same command once more, in the background, which reports its flow run and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from prefect_mlprojects.runs.handles import LocalSubmittedRun


def run_detached(*, as_json: bool) -> int:
    """Starts the background process, waits for its flow run to exist, and prints the ids.

    Args:
        as_json: Print them as JSON.

    Returns:
        The exit code: 0 once the flow run exists, else that of the failed start.
    """
    arguments = [argument for argument in sys.argv[1:] if argument not in {"--detach", "--json"}]
    reader, writer = os.pipe()
    errors = os.memfd_create("mlprojects-detached") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "prefect_mlprojects",
            arguments[0],
            f"--detached-report={writer}",
            *arguments[1:],
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=(writer,),
        start_new_session=True,
    )
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        text = stream.read()
    if not text:
        code = process.wait()
        os.lseek(errors, 0, os.SEEK_SET)
        with os.fdopen(errors, encoding="utf-8", errors="replace") as stream:
            click.echo(stream.read().rstrip(), err=True)
        return code or 1
    started = json.loads(text)
    if as_json:
        click.echo(json.dumps(started))
        return 0
    click.echo(started["flow_run_id"])
    click.echo(f"Flow run: {started['flow_run_url'] or started['flow_run_id']}", err=True)
    click.echo(f"Look at it with: mlprojects status|logs|wait|cancel {started['flow_run_id']}", err=True)
    return 0


def report_start(descriptor: int, run: LocalSubmittedRun) -> None:
    """Tells the waiting foreground process which flow run was started, and lets it go.

    Args:
        descriptor: The pipe's write end.
        run: The run.
    """
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump({"flow_run_id": run.flow_run_id, "flow_run_url": run.url, "process_id": os.getpid()}, stream)
