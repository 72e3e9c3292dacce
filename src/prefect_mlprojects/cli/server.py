"""``mlprojects server start|stop|status``: the embedded Prefect server."""

from __future__ import annotations

import click


@click.group("server")
def server_command() -> None:
    """Manage the Prefect server that runs use when no other is configured."""


@server_command.command("start")
def start() -> None:
    """Start the server in the background, unless it runs already."""
    from prefect_mlprojects.server.process import ensure_server

    address = ensure_server(lambda line: click.echo(line, err=True))
    click.echo(f"{'Started' if address.started else 'Already running'}: {address.ui_url}  (API: {address.api_url})")


@server_command.command("stop")
def stop() -> None:
    """Stop the server; its database stays."""
    from prefect_mlprojects.server.process import stop_server

    click.echo("Stopped." if stop_server() else "It was not running.")


@server_command.command("status")
@click.pass_context
def status(context: click.Context) -> None:
    """Tell whether the server runs, and where; exit code 1 when it does not."""
    from prefect_mlprojects.server.process import server_status

    found = server_status()
    click.echo(str(found))
    if not found.running:
        context.exit(1)
