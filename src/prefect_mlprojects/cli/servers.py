"""``mlprojects server|ui``: the embedded Prefect server and MLflow's UI; and how other commands reach the Prefect server."""

from __future__ import annotations

import os
import sys
from typing import Any

import click


def announce(line: str) -> None:
    """Prints a line about a server that is being started."""
    click.echo(line, err=True)


def connect() -> str:
    """Returns the Prefect API's address, made that of this process; call it before Prefect is imported."""
    from prefect_mlprojects.runs.start import configure_prefect
    from prefect_mlprojects.server.process import resolve_api

    api_url = resolve_api(announce).api_url
    configure_prefect(api_url)
    return api_url


@click.group("server")
def server_command() -> None:
    """Manage the embedded Prefect server, which runs use when no other is configured."""


@server_command.command("start")
def server_start() -> None:
    """Start the embedded Prefect server in the background (no-op if it is running)."""
    from prefect_mlprojects.server.process import ensure_server

    address = ensure_server(announce)
    click.echo(f"{'Started' if address.started else 'Already running'}: {address.ui_url}  (API: {address.api_url})")


@server_command.command("stop")
@click.option("--force", is_flag=True, help="Stop it although runs are active: they lose their server.")
@click.pass_context
def server_stop(context: click.Context, force: bool) -> None:
    """Stop the server; its database is kept. Refused while runs are active, unless --force is given."""
    from prefect_mlprojects.server.process import server_status, stop_server

    found = server_status()
    active = _active_runs(found.address.api_url) if found.healthy and found.address and not force else []
    if active:
        click.echo("Runs are active on the embedded Prefect server:", err=True)
        for line in active:
            click.echo(f"  {line}", err=True)
        click.echo("Wait for them, cancel them (`mlprojects cancel RUN`), or stop the server with --force.", err=True)
        context.exit(1)
    click.echo("Stopped." if stop_server() else "It was not running.")


def _active_runs(api_url: str) -> list[str]:
    """Returns a line for each flow run that is executing: state, name, ID."""
    from prefect_mlprojects.server.api import call_api

    async def read(client: Any) -> list[str]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
        from prefect.client.schemas.objects import StateType

        types = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
        wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
        runs = await client.read_flow_runs(flow_run_filter=wanted, limit=200)
        return [f"{run.state_name:<10}  {run.name}  {run.id}" for run in runs]

    return call_api(api_url, read)


@server_command.command("status")
@click.pass_context
def show_server_status(context: click.Context) -> None:
    """Print whether the server runs, and its address; exit code 1 if it does not."""
    from prefect_mlprojects.server.process import server_status

    found = server_status()
    click.echo(str(found))
    if not found.running:
        context.exit(1)


@click.command("ui")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of MLflow's UI. Default: 5000, or a free one.")
def ui_command(port: int | None) -> None:
    """Start MLflow's UI for the current tracking store, and print its address and that of Prefect's UI.

    It runs until Ctrl-C. Where only mlflow-skinny is installed, which has no UI, uv fetches and caches MLflow of the same version.
    """
    from prefect_mlprojects._support.redaction import strip_user_info
    from prefect_mlprojects._support.secrets import reveal
    from prefect_mlprojects.server.address import choose_port
    from prefect_mlprojects.server.process import resolve_api
    from prefect_mlprojects.tracking import resolve_tracking_uri
    from prefect_mlprojects.tracking.uris import UI_HOST, UI_PORT, scheme_of, ui_command_line

    prefect = resolve_api(announce)
    if prefect.ui_url:
        click.echo(f"Prefect: {prefect.ui_url}")
    uri = reveal(resolve_tracking_uri())
    if scheme_of(uri) in ("http", "https", "databricks"):
        click.echo(f"MLflow:  {uri if scheme_of(uri) == 'databricks' else strip_user_info(uri)}")
        return
    port = port or choose_port(UI_HOST, UI_PORT)
    click.echo(f"MLflow:  http://{UI_HOST}:{port}  (Ctrl-C stops it)")
    if port != UI_PORT:
        click.echo(f"The links of runs lead to port {UI_PORT}: replace it by {port} in them.", err=True)
    sys.stdout.flush()
    command = [*ui_command_line(), "--host", UI_HOST, "--port", str(port)]
    # The store goes by the environment: a password is not to show in the process list.
    os.execve(command[0], command, {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri})  # noqa: S606 - it replaces this process
