"""``mlprojects run``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from prefect_mlprojects.cli.options import request_from_options, run_options

if TYPE_CHECKING:
    from prefect_mlprojects.runs.request import RunRequest
    from prefect_mlprojects.runs.start import RunSecrets


@click.command("run")
@run_options("cli", read_environment=True)
@click.option("--rebuild-env", is_flag=True, help="Rebuild the environment even if it is cached.")
@click.option("--detach", is_flag=True, help="Start the run, print its id and return; it goes on in the background.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout; the project's stdout goes to stderr."
)
@click.option("--detached-report", type=int, hidden=True)
@click.pass_context
def run_command(
    context: click.Context,
    /,
    rebuild_env: bool,
    detach: bool,
    as_json: bool,
    detached_report: int | None,
    **options: Any,
) -> None:
    """Run the project at URI (a folder, with an optional #sub/directory; default: the current folder).

    The project's stdout goes to stdout, all else to stderr. Exit codes: 0 finished, 1 failed, 2 usage or bad input,
    130 cancelled.
    """
    request, secrets = request_from_options(context, options)
    from prefect_mlprojects.runs.start import preflight

    name = preflight(request, secrets)
    if detach:
        from prefect_mlprojects.cli.detached import run_detached

        context.exit(run_detached(as_json=as_json))
    context.exit(_run(request, secrets, name, rebuild_env=rebuild_env, as_json=as_json, report=detached_report))


def _run(
    request: RunRequest,
    secrets: RunSecrets,
    name: str | None,
    *,
    rebuild_env: bool,
    as_json: bool,
    report: int | None,
) -> int:
    from prefect_mlprojects.cli.display import RunDisplay, StderrOutput
    from prefect_mlprojects.tracking import CompanionTracker, InProcessTracker, Tracker

    display = RunDisplay()
    # MLflow and Prefect take some two seconds each to import: the companion process imports the one while this
    # process imports the other.
    tracker: Tracker
    try:
        tracker = CompanionTracker.start_process()
    except OSError:
        # No more processes, or no memory: MLflow can be imported here as well.
        tracker = InProcessTracker()
    try:
        from prefect_mlprojects.runs.start import start
        from prefect_mlprojects.tasks.session import RunSession, TerminalOutput

        session = RunSession(
            tracker=tracker,
            output=StderrOutput() if as_json else TerminalOutput(),
            observer=display,
            rebuild_environment=rebuild_env,
        )
        with display:
            handle = start(request, secrets, session, name, announce=display.announce, own_process=True)
            display.flow_run(handle.flow_run_id, handle.url)
            if report is not None:
                from prefect_mlprojects.cli.detached import report_start

                report_start(report, handle)
            from prefect_mlprojects.runs.launch import wait_interruptibly

            result = wait_interruptibly(handle)
        tracked = session.tracked_run
        metrics = tracker.metrics(tracked) if tracked is not None and result.status == "FINISHED" else {}
        display.summary(result, tracked, handle.url, metrics)
        if as_json:
            click.echo(json.dumps(_as_json(result, handle.url, tracked, metrics)))
    finally:
        tracker.close()
    return _exit_code(result)


def _exit_code(result: Any) -> int:
    from prefect_mlprojects.cli.app import EXIT_CANCELLED, EXIT_FAILED, exit_code_of

    if result.status == "FINISHED":
        return 0
    if result.status == "KILLED":
        return EXIT_CANCELLED
    return exit_code_of(result.error) if result.error is not None else EXIT_FAILED


def _as_json(result: Any, url: str | None, tracked: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "status": result.status,
        "run_id": result.run_id,
        "experiment_id": result.experiment_id,
        "tracking_uri": result.tracking_uri,
        "run_url": tracked.url if tracked is not None else None,
        "flow_run_id": result.flow_run_id,
        "flow_run_url": url,
        "exit_code": result.exit_code,
        "category": result.category,
        "cause": result.cause,
        "message": result.message,
        "metrics": dict(metrics),
    }
