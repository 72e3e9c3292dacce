"""``mlprojects env list|path|prune``: the environments in the cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import click

_UNITS = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SPANS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _parse_span(context: click.Context, option: click.Parameter, text: str | None) -> timedelta | None:  # noqa: ARG001 - click's signature
    if text is None:
        return None
    try:
        return timedelta(**{_SPANS[text[-1:]]: float(text[:-1])})
    except (KeyError, ValueError, OverflowError):
        raise click.BadParameter(f"{text!r} is not a span of time: write 12h, 30d or 4w.") from None


def _parse_size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:  # noqa: ARG001 - click's signature
    if text is None:
        return None
    number, unit = text.upper().removesuffix("B"), "B"
    if number[-1:] in _UNITS:
        number, unit = number[:-1], number[-1]
    try:
        size = float(number) * _UNITS[unit]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a size: write 500M or 10G.") from None
    return int(size)


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@click.group("env")
def env_command() -> None:
    """Manage the environments that runs share."""


@env_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the environments in the cache."""
    from prefect_mlprojects.environments.prune import list_environments

    environments = list_environments()
    if as_json:
        click.echo(json.dumps([asdict(environment) for environment in environments], default=str))
        return
    for environment in environments:
        used = _when(environment.last_used)
        state = "in use" if environment.in_use else ("" if environment.complete else "incomplete")
        click.echo(
            f"{environment.key[:12]}  {_size(environment.size):>8}  {used}  {environment.description}"
            f"  {environment.project}  {state}".rstrip()
        )


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M") if seconds else "never           "


@env_command.command("path")
@click.argument("key")
def path(key: str) -> None:
    """Print the folder of the environment whose key begins with KEY."""
    from prefect_mlprojects.environments.prune import find_environment

    click.echo(find_environment(key).location)


@env_command.command("prune")
@click.option("--older-than", callback=_parse_span, metavar="SPAN", help="Made longer ago than this: 12h, 30d, 4w.")
@click.option("--unused", callback=_parse_span, metavar="SPAN", help="Not used for longer than this.")
@click.option("--max-size", callback=_parse_size, metavar="SIZE", help="The least used ones, until so much is left.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
def prune(**selection: Any) -> None:
    """Remove environments from the cache; those in use stay."""
    if not any(value for name, value in selection.items() if name != "dry_run" and value is not None):
        raise click.UsageError("Say what to remove: --older-than, --unused, --max-size or --all.")
    from prefect_mlprojects.environments.prune import prune_environments

    result = prune_environments(**selection)
    verb = "Would remove" if selection["dry_run"] else "Removed"
    for environment in result.removed:
        click.echo(f"{verb} {environment.key[:12]}  {environment.description}")
    for environment in result.kept:
        click.echo(f"Kept {environment.key[:12]}: it is in use")
    click.echo(f"{verb} {len(result.removed)} environments, {_size(result.freed)}.")
