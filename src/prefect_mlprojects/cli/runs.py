"""``mlprojects status|wait|cancel|logs RUN``: runs that any process started."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from prefect_mlprojects.runs.handles import SubmittedRun
    from prefect_mlprojects.types import RunStatus

_RUN = click.argument("run", metavar="RUN")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _attach(run: str) -> SubmittedRun:
    from prefect_mlprojects.runs.start import configure_prefect
    from prefect_mlprojects.server.process import resolve_api

    configure_prefect(resolve_api(None).api_url)
    from prefect_mlprojects.runs.handles import SubmittedRun

    return SubmittedRun.attach(run)


def _exit_code(status: RunStatus) -> int:
    from prefect_mlprojects.cli.app import EXIT_CANCELLED, EXIT_FAILED

    return {"FINISHED": 0, "KILLED": EXIT_CANCELLED, "FAILED": EXIT_FAILED}.get(status, 0)


@click.command("status")
@_RUN
@_JSON
def status_command(run: str, as_json: bool) -> None:
    """Print the status of the flow run with the id RUN: RUNNING, FINISHED, FAILED or KILLED."""
    handle = _attach(run)
    status = handle.get_status()
    if as_json:
        click.echo(json.dumps({"flow_run_id": handle.flow_run_id, "flow_run_url": handle.url, "status": status}))
    else:
        click.echo(status)


@click.command("wait")
@_RUN
@_JSON
@click.pass_context
def wait_command(context: click.Context, run: str, as_json: bool) -> None:
    """Wait for the flow run with the id RUN to end.

    Exit codes: 0 finished, 1 failed, 130 cancelled.
    """
    handle = _attach(run)
    result = handle.result()
    if as_json:
        facts = {"flow_run_id": result.flow_run_id, "run_id": result.run_id, "status": result.status}
        click.echo(json.dumps({**facts, "message": result.message}))
    else:
        click.echo(result.status)
        if result.message and result.status != "FINISHED":
            click.echo(result.message, err=True)
    context.exit(_exit_code(result.status))


@click.command("cancel")
@_RUN
def cancel_command(run: str) -> None:
    """Cancel the flow run with the id RUN and wait until it has ended."""
    handle = _attach(run)
    handle.cancel()
    click.echo(handle.get_status())


@click.command("logs")
@_RUN
@click.option("-f", "--follow", is_flag=True, help="Go on printing until the run has ended.")
def logs_command(run: str, follow: bool) -> None:
    """Print the log of the flow run with the id RUN."""
    handle = _attach(run)
    from prefect_mlprojects.server.api import call_api
    from prefect_mlprojects.server.process import resolve_api

    call_api(resolve_api(None).api_url, _print_logs, handle.flow_run_id, follow)


async def _print_logs(client: PrefectClient, flow_run_id: str, follow: bool) -> None:
    from uuid import UUID

    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    identifier = UUID(flow_run_id)
    printed: set[Any] = set()

    async def print_stored() -> None:
        offset = 0
        while True:
            page = await client.read_logs(
                LogFilter(flow_run_id=LogFilterFlowRunId(any_=[identifier])),
                limit=200,
                offset=offset,
                sort=LogSort.TIMESTAMP_ASC,
            )
            for log in page:
                if log.id not in printed:
                    printed.add(log.id)
                    click.echo(log.message)
            offset += len(page)
            if len(page) < 200:
                return

    await print_stored()
    if follow and not _is_final(await client.read_flow_run(identifier)):
        from prefect.client.schemas.objects import Log

        from prefect_mlprojects.server.compat import subscribe_to_flow_run

        async with subscribe_to_flow_run(identifier) as subscriber:
            async for item in subscriber:
                if isinstance(item, Log) and item.id not in printed:
                    printed.add(item.id)
                    click.echo(item.message)
        await print_stored()


def _is_final(flow_run: Any) -> bool:
    return flow_run.state is not None and flow_run.state.is_final()
