"""``mlprojects docker ps|clean``: the containers of runs on the Docker engine."""

from __future__ import annotations

from typing import Any

import click


@click.group("docker")
def docker_command() -> None:
    """Containers of runs on the Docker engine that DOCKER_HOST or the Docker context names."""


@docker_command.command("ps")
def ps() -> None:
    """List the containers of runs: id, state, project and entry point, flow run."""
    for container in _containers(_engine()):
        labels = container["Labels"]
        name = f"{labels.get(_label('project'), '')}/{labels.get(_label('entry-point'), '')}"
        click.echo(f"{container['Id'][:12]}  {container['State']:<8}  {name}  {labels.get(_label('flow-run-id'), '')}")


@docker_command.command("clean")
@click.option("--all", "everything", is_flag=True, help="End containers that run, too.")
def clean(everything: bool) -> None:
    """Remove the containers that runs left behind: those that have ended, or with --all every one."""
    from docker.errors import APIError, NotFound

    engine = _engine()
    for container in _containers(engine):
        if container["State"] == "running" and not everything:
            continue
        try:
            if container["State"] == "running":
                engine.stop(container["Id"])
            engine.remove_container(container["Id"], force=True, v=True)
        except NotFound:
            # Its run removed it a moment ago.
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
