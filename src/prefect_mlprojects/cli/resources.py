"""``mlprojects server|ui|env|blocks``: what runs share, and what they may leave."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any

import click

from prefect_mlprojects.cli.options import DRY_RUN, connect, json_option, parse_with, print_json
from prefect_mlprojects.cli.tables import pass_on, say

_UNITS = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SPANS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _parse_span(text: str) -> timedelta:
    try:
        return timedelta(**{_SPANS[text[-1:]]: float(text[:-1])})
    except (KeyError, ValueError, OverflowError):
        raise click.BadParameter(f"{text!r} is not a span of time: write 12h, 30d or 4w.") from None


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+|\d*\.\d+)([KMGT]?)B?", text.upper())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size: write 500M or 10G.")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@click.group("server")
def server_command() -> None:
    """Manage the embedded Prefect server, which runs use when no other is configured."""


@server_command.command("start")
def server_start() -> None:
    """Start the embedded Prefect server in the background (no-op if it is running)."""
    from prefect_mlprojects.server.access import login_link
    from prefect_mlprojects.server.process import ensure_server

    address = ensure_server()
    started = "Started" if address.started else "Already running"
    say(f"{started}: {login_link(address.ui_url)}  (API: {address.api_url})")


@server_command.command("stop")
@click.option("--force", is_flag=True, help="Stop it although runs are active: they lose their server.")
@click.pass_context
def server_stop(context: click.Context, force: bool) -> None:
    """Stop the server; its database is kept. Refused while runs are active, unless --force is given."""
    from prefect_mlprojects.server.api import call_api
    from prefect_mlprojects.server.process import server_status, stop_server

    found = server_status()
    active = call_api(found.address.api_url, _active_runs) if found.healthy and found.address and not force else []
    if active:
        say("Runs are active on the embedded Prefect server:", err=True)
        for line in active:
            say(f"  {line}", err=True)
        say("Wait for them, cancel them (`mlprojects cancel RUN`), or stop the server with --force.", err=True)
        context.exit(1)
    say("Stopped." if stop_server() else "It was not running.")


async def _active_runs(client: Any) -> list[str]:
    """Returns a line for each flow run that is executing: state, name, ID."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    types = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
    runs = await client.read_flow_runs(flow_run_filter=wanted, limit=200)
    return [f"{run.state_name:<10}  {run.name}  {run.id}" for run in runs]


@server_command.command("status")
@json_option
@click.pass_context
def show_server_status(context: click.Context, as_json: bool) -> None:
    """Print whether the server runs, and its address; exit code 1 if it does not."""
    from prefect_mlprojects.server.process import server_status

    found = server_status()
    if as_json:
        urls = {name: getattr(found.address, name, None) for name in ("api_url", "ui_url")}
        print_json(
            {"running": found.running, "healthy": found.healthy, **urls, "pid": found.pid, "directory": found.directory}
        )
    else:
        say(str(found))
    if not found.running:
        context.exit(1)


@click.command("ui")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of MLflow's UI. Default: 5000, or a free one.")
def ui_command(port: int | None) -> None:
    """Start MLflow's UI for the current tracking store until Ctrl-C, and print its address and that of Prefect's UI.

    If only mlflow-skinny is installed, which has no UI, uv downloads and caches MLflow of the same version.
    """
    from prefect_mlprojects._support.redaction import strip_user_info
    from prefect_mlprojects._support.secrets import reveal
    from prefect_mlprojects.server.access import login_link
    from prefect_mlprojects.server.address import choose_port
    from prefect_mlprojects.server.process import resolve_api
    from prefect_mlprojects.tracking import resolve_tracking_uri
    from prefect_mlprojects.tracking.uris import UI_HOST, UI_PORT, scheme_of, ui_command_line

    prefect = resolve_api()
    if prefect.ui_url:
        say(f"Prefect: {login_link(prefect.ui_url)}")
    uri = reveal(resolve_tracking_uri())
    if scheme_of(uri) in ("http", "https", "databricks"):
        say(f"MLflow:  {uri if scheme_of(uri) == 'databricks' else strip_user_info(uri)}")
        return
    port = port or choose_port(UI_HOST, UI_PORT)
    say(f"MLflow:  http://{UI_HOST}:{port}  (Ctrl-C stops it)")
    if port != UI_PORT:
        say(f"The links of runs lead to port {UI_PORT}: replace it by {port} in them.", err=True)
    sys.stdout.flush()
    command = [*ui_command_line(), "--host", UI_HOST, "--port", str(port)]
    # The store's URI is passed in the environment: a password in it must not show in the process list.
    os.execve(command[0], command, {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri})  # noqa: S606 - it replaces this process


@click.group("env")
def env_command() -> None:
    """Manage the cached environments, which runs share."""


@env_command.command("list")
@json_option
def env_list(as_json: bool) -> None:
    """List the cached environments."""
    from prefect_mlprojects.environments.managers import list_environments

    environments = list_environments()
    if as_json:
        print_json(environments)
        return
    for environment in environments:
        state = "in use" if environment.in_use else ("" if environment.complete else "incomplete")
        say(
            f"{environment.key[:12]}  {_size(environment.size):>8}  {_when(environment.last_used)}  "
            f"{environment.description}  {environment.project}  {state}".rstrip()
        )


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M") if seconds else f"{'never':<16}"


@env_command.command("path")
@click.argument("key")
def env_path(key: str) -> None:
    """Print the folder of the environment whose key starts with KEY."""
    from prefect_mlprojects.environments.managers import find_environment

    pass_on(str(find_environment(key).location))


@env_command.command("prune")
@click.option(
    "--older-than", callback=parse_with(_parse_span), metavar="SPAN", help="Built longer ago than this: 12h, 30d, 4w."
)
@click.option("--unused", callback=parse_with(_parse_span), metavar="SPAN", help="Not used for longer than this.")
@click.option(
    "--max-size", callback=parse_with(_parse_size), metavar="SIZE", help="Least recently used ones, down to this total."
)
@click.option("--all", "everything", is_flag=True, help="All environments.")
@DRY_RUN
@json_option
def env_prune(as_json: bool, **selection: Any) -> None:
    """Remove environments from the cache, except those in use."""
    if not any(value for name, value in selection.items() if name != "dry_run" and value is not None):
        raise click.UsageError("Select what to remove: --older-than, --unused, --max-size or --all.")
    from prefect_mlprojects.environments.managers import prune_environments

    result = prune_environments(**selection)
    if as_json:
        print_json({"removed": result.removed, "kept": result.kept, "freed": result.freed})
        return
    verb = "Would remove" if selection["dry_run"] else "Removed"
    for environment in result.removed:
        say(f"{verb} {environment.key[:12]}  {environment.description}")
    for environment in result.kept:
        say(f"Kept {environment.key[:12]}: it is in use")
    say(f"{verb} {len(result.removed)} environments, {_size(result.freed)}.")


@click.group("blocks")
def blocks_command() -> None:
    """Manage this package's blocks: credentials and configurations on the Prefect server."""


@blocks_command.command("register")
def blocks_register() -> None:
    """Register the block types of this package on the Prefect server, so that its UI can create blocks of them.

    A server in whose environment this package is installed, such as the embedded one, registers them when it starts.
    """
    for name in _call_server(_register):
        say(f"Registered {name}")


@blocks_command.command("list")
@json_option
def blocks_list(as_json: bool) -> None:
    """List the blocks of this package's types, as type/name."""
    names = _call_server(_list)
    if as_json:
        pairs = [name.partition("/") for name in names]
        print_json([{"type": kind, "name": name} for kind, _, name in pairs])
        return
    for name in names:
        say(name)


def _call_server(method: Callable[..., Coroutine[Any, Any, list[str]]]) -> list[str]:
    from prefect_mlprojects.server.api import call_api

    return call_api(connect(), method)


async def _register(client: Any) -> list[str]:
    names = []
    for block in _block_types():
        await block.aregister_type_and_schema(client=client)
        names.append(f"{block.get_block_type_name()} ({block.get_block_type_slug()})")
    return names


async def _list(client: Any) -> list[str]:
    from prefect.exceptions import PrefectHTTPStatusError

    lines = []
    for block in _block_types():
        slug = block.get_block_type_slug()
        try:
            documents = await client.read_block_documents_by_type(slug, include_secrets=False)
        except PrefectHTTPStatusError:
            # The type is not registered, so no blocks of it exist.
            continue
        lines += [f"{slug}/{document.name}" for document in documents if document.name]
    return sorted(lines)


def _block_types() -> list[Any]:
    from prefect_mlprojects import blocks

    return [getattr(blocks, name) for name in blocks.__all__]
