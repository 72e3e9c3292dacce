"""``mlprojects env|docker|kubernetes|databricks|blocks|completion``: what runs share, and what they may leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, TypeVar

import click

from prefect_mlprojects.cli.options import json_option, parse_with
from prefect_mlprojects.cli.servers import announce

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
    number, unit = text.upper().removesuffix("B"), "B"
    if number[-1:] in _UNITS:
        number, unit = number[:-1], number[-1]
    try:
        return int(float(number) * _UNITS[unit])
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a size: write 500M or 10G.") from None


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@click.group("env")
def env_command() -> None:
    """Manage the cached environments, which runs share."""


@env_command.command("list")
@json_option
def env_list(as_json: bool) -> None:
    """List the cached environments."""
    from prefect_mlprojects.environments.prune import list_environments

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
    from prefect_mlprojects.environments.prune import find_environment

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
    from prefect_mlprojects.environments.prune import prune_environments

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
    for container in _containers(_engine()):
        labels = container["Labels"]
        name = f"{labels.get(_label('project'), '')}/{labels.get(_label('entry-point'), '')}"
        click.echo(f"{container['Id'][:12]}  {container['State']:<8}  {name}  {labels.get(_label('flow-run-id'), '')}")


@docker_command.command("clean")
@click.option("--all", "everything", is_flag=True, help="Also stop and remove running containers.")
def docker_clean(everything: bool) -> None:
    """Remove the containers that interrupted runs left behind."""
    from docker.errors import APIError, NotFound

    engine = _engine()
    for container in _containers(engine):
        running = container["State"] == "running"
        if running and not everything:
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
            continue
        click.echo(f"Removed {container['Id'][:12]}")


def _label(name: str) -> str:
    from prefect_mlprojects.backends.docker.containers import LABEL

    return f"{LABEL}.{name}"


def _engine() -> Any:
    from prefect_mlprojects.backends.containers.config import LocalConfig
    from prefect_mlprojects.backends.containers.engine import connect

    return connect(LocalConfig())


def _containers(engine: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = engine.containers(all=True, filters={"label": _label("flow-run-id")})
    return found


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


def _call_server(method: Any) -> list[str]:
    from prefect_mlprojects.server.api import call_api
    from prefect_mlprojects.server.process import resolve_api

    address = resolve_api(announce)
    found: list[str] = call_api(address.api_url, method)
    return found


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


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: add `eval "$(mlprojects completion bash)"` to ~/.bashrc.
    """
    from click.shell_completion import get_completion_class

    from prefect_mlprojects.cli import group

    completion = get_completion_class(shell)
    if completion is None:
        raise click.ClickException(f"No completion for {shell} is available.")
    click.echo(completion(group, {}, "mlprojects", "_MLPROJECTS_COMPLETE").source())
