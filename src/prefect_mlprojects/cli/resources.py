"""``mlprojects server|ui|env|docker|kubernetes|databricks|blocks``: what runs share, and what they may leave."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, TypeVar

import click

from prefect_mlprojects.cli.options import connect, json_option, parse_with

_Command = TypeVar("_Command", bound=Callable[..., Any])

_DRY_RUN = click.option("--dry-run", is_flag=True, help="Only list what would be removed.")

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
    click.echo(f"{started}: {login_link(address.ui_url)}  (API: {address.api_url})")


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
        click.echo("Runs are active on the embedded Prefect server:", err=True)
        for line in active:
            click.echo(f"  {line}", err=True)
        click.echo("Wait for them, cancel them (`mlprojects cancel RUN`), or stop the server with --force.", err=True)
        context.exit(1)
    click.echo("Stopped." if stop_server() else "It was not running.")


async def _active_runs(client: Any) -> list[str]:
    """Returns a line for each flow run that is executing: state, name, ID."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    types = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
    runs = await client.read_flow_runs(flow_run_filter=wanted, limit=200)
    return [f"{run.state_name:<10}  {run.name}  {run.id}" for run in runs]


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
        click.echo(f"Prefect: {login_link(prefect.ui_url)}")
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
        click.echo(json.dumps([asdict(environment) for environment in environments], default=str))
        return
    for environment in environments:
        state = "in use" if environment.in_use else ("" if environment.complete else "incomplete")
        click.echo(
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

    click.echo(find_environment(key).location)


@env_command.command("prune")
@click.option(
    "--older-than", callback=parse_with(_parse_span), metavar="SPAN", help="Built longer ago than this: 12h, 30d, 4w."
)
@click.option("--unused", callback=parse_with(_parse_span), metavar="SPAN", help="Not used for longer than this.")
@click.option(
    "--max-size", callback=parse_with(_parse_size), metavar="SIZE", help="Least recently used ones, down to this total."
)
@click.option("--all", "everything", is_flag=True, help="All environments.")
@_DRY_RUN
def env_prune(**selection: Any) -> None:
    """Remove environments from the cache, except those in use."""
    if not any(value for name, value in selection.items() if name != "dry_run" and value is not None):
        raise click.UsageError("Select what to remove: --older-than, --unused, --max-size or --all.")
    from prefect_mlprojects.environments.managers import prune_environments

    result = prune_environments(**selection)
    verb = "Would remove" if selection["dry_run"] else "Removed"
    for environment in result.removed:
        click.echo(f"{verb} {environment.key[:12]}  {environment.description}")
    for environment in result.kept:
        click.echo(f"Kept {environment.key[:12]}: it is in use")
    click.echo(f"{verb} {len(result.removed)} environments, {_size(result.freed)}.")


@click.group("docker")
def docker_command() -> None:
    """Manage the containers of runs on the Docker engine of DOCKER_HOST or the current Docker context."""


@docker_command.command("ps")
def docker_ps() -> None:
    """List the containers of runs: ID, state, project and entry point, flow run."""
    from prefect_mlprojects.backends.docker.containers import LABEL

    for container in _containers()[1]:
        labels = container["Labels"]
        project, entry_point, run = (
            labels.get(f"{LABEL}.{name}", "") for name in ("project", "entry-point", "flow-run-id")
        )
        click.echo(f"{container['Id'][:12]}  {container['State']:<8}  {project}/{entry_point}  {run}")


@docker_command.command("clean")
@click.option("--all", "everything", is_flag=True, help="Also stop and remove running containers, and young ones.")
@click.pass_context
def docker_clean(context: click.Context, everything: bool) -> None:
    """Remove the containers that interrupted runs left behind; exit code 1 if one can't be removed.

    Containers that were created or ended in the last five minutes are left: a run may be preparing them, or read their output.
    """
    from docker.errors import APIError, NotFound

    from prefect_mlprojects.backends.docker.containers import is_young

    engine, containers = _containers()
    failures = 0
    for container in containers:
        running = container["State"] == "running"
        if not everything and (running or is_young(engine, container["Id"])):
            continue
        try:
            if running:
                engine.stop(container["Id"])
            engine.remove_container(container["Id"], force=True, v=True)
        except NotFound:
            # Its run removed it in the meantime.
            continue
        except APIError as error:
            click.echo(f"{container['Id'][:12]} can't be removed: {error.explanation or error}", err=True)
            failures += 1
            continue
        click.echo(f"Removed {container['Id'][:12]}")
    context.exit(1 if failures else 0)


def _containers() -> tuple[Any, list[dict[str, Any]]]:
    """Returns the Docker engine and the containers of runs on it."""
    from prefect_mlprojects.backends.containers.engine import LocalConfig, connect
    from prefect_mlprojects.backends.docker.containers import FLOW_RUN_LABEL

    engine = connect(LocalConfig())
    return engine, engine.containers(all=True, filters={"label": FLOW_RUN_LABEL})


def _connection_options(command: _Command) -> _Command:
    for option in (
        click.option("--namespace", metavar="NAME", help="Namespace. Default: the context's."),
        click.option(
            "--context", "kube_context", metavar="NAME", help="Context of the kubeconfig. Default: the current one."
        ),
        click.option("--kubeconfig", metavar="PATH", help="Kubeconfig file. Default: KUBECONFIG or ~/.kube/config."),
    ):
        command = option(command)
    return command


def _jobs(namespace: str | None, kube_context: str | None, kubeconfig: str | None) -> Any:
    from prefect_mlprojects.backends.kubernetes.config import connect, parse_kubernetes_config
    from prefect_mlprojects.backends.kubernetes.submission import RunJobs

    given = {"namespace": namespace, "kube-context": kube_context, "kubeconfig": kubeconfig}
    config = parse_kubernetes_config({key: value for key, value in given.items() if value is not None})
    return RunJobs(connect(config))


@click.group("kubernetes")
def kubernetes_command() -> None:
    """Manage the Jobs of runs on a Kubernetes cluster."""


@kubernetes_command.command("list")
@_connection_options
@json_option
def kubernetes_list(as_json: bool, **connection: str | None) -> None:
    """List the Jobs of runs: watched, unwatched (the run's process is gone) or ended."""
    jobs = _jobs(**connection).list()
    if as_json:
        click.echo(json.dumps([asdict(job) for job in jobs]))
        return
    for job in jobs:
        state = f"{job.state}{', finished' if job.finished and job.state != 'ended' else ''}"
        click.echo(f"{job.namespace}/{job.name}  {job.created}  {state}  flow run {job.flow_run_id}")


@kubernetes_command.command("clean")
@_connection_options
@click.option("--ended", is_flag=True, help="Also Jobs whose run has ended; Kubernetes deletes them after a while.")
@_DRY_RUN
def kubernetes_clean(ended: bool, dry_run: bool, **connection: str | None) -> None:
    """Delete the Jobs that no process watches any more, with their pods and Secrets."""
    jobs = _jobs(**connection)
    chosen = [job for job in jobs.list() if job.state == "unwatched" or (ended and job.state == "ended")]
    verb = "Would delete" if dry_run else "Deleted"
    for job in chosen:
        if not dry_run:
            jobs.delete(job)
        click.echo(f"{verb} {job.namespace}/{job.name}  flow run {job.flow_run_id}")
    click.echo(f"{verb} {len(chosen)} Job{'' if len(chosen) == 1 else 's'}.")


@click.group("databricks")
def databricks_command() -> None:
    """Manage the files of runs in a Databricks workspace."""


@databricks_command.command("clean")
@click.option("--profile", help="Profile of ~/.databrickscfg. Default: the credentials in the environment.")
@click.option("--code-path", help="code-path of the backend configuration. Default: the user's folder.")
@click.option(
    "--older-than", type=click.FloatRange(min=0), default=30, show_default=True, metavar="DAYS", help="Minimum age."
)
@_DRY_RUN
def databricks_clean(profile: str | None, code_path: str | None, older_than: float, dry_run: bool) -> None:
    """Remove old uploaded code and output; an active run needs its code only when it starts."""
    from prefect_mlprojects.backends.databricks.config import parse_databricks_config
    from prefect_mlprojects.backends.databricks.storage import clean_workspace

    config = parse_databricks_config({"profile": profile, "code-path": code_path})
    removed = clean_workspace(config, days=older_than, dry_run=dry_run)
    for path in removed:
        click.echo(f"{'Would remove' if dry_run else 'Removed'} {path}")
    click.echo(f"{len(removed)} files and folders.")


@click.group("blocks")
def blocks_command() -> None:
    """Manage this package's blocks: credentials and configurations on the Prefect server."""


@blocks_command.command("register")
def blocks_register() -> None:
    """Register the block types of this package on the Prefect server, so that its UI can create blocks of them.

    A server in whose environment this package is installed, such as the embedded one, registers them when it starts.
    """
    for name in _call_server(_register):
        click.echo(f"Registered {name}")


@blocks_command.command("list")
def blocks_list() -> None:
    """List the blocks of this package's types, as type/name."""
    for line in _call_server(_list):
        click.echo(line)


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
