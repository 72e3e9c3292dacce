"""``mlprojects docker|kubernetes|databricks``: what runs have, or may leave, where backends execute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from prefect_mlprojects.cli.options import DRY_RUN, json_option, print_json
from prefect_mlprojects.cli.tables import say

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group("docker")
def docker_command() -> None:
    """Manage the containers of runs on the Docker engine of DOCKER_HOST or the current Docker context."""


@docker_command.command("ps")
@json_option
def docker_ps(as_json: bool) -> None:
    """List the containers of runs: ID, state, project and entry point, flow run."""
    from prefect_mlprojects.backends.docker.containers import LABEL

    names = {"project": "project", "entry_point": "entry-point", "flow_run_id": "flow-run-id"}
    rows = [
        {
            "id": each["Id"],
            "state": each["State"],
            **{name: each["Labels"].get(f"{LABEL}.{label}", "") for name, label in names.items()},
        }
        for each in _containers()[1]
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        name = f"{row['project']}/{row['entry_point']}"
        say(f"{row['id'][:12]}  {row['state']:<8}  {name}  {row['flow_run_id']}")


@docker_command.command("clean")
@click.option("--all", "everything", is_flag=True, help="Also stop and remove running containers, and young ones.")
@json_option
@click.pass_context
def docker_clean(context: click.Context, everything: bool, as_json: bool) -> None:
    """Remove the containers that interrupted runs left behind; exit code 1 if one can't be removed.

    Containers that were created or ended in the last five minutes are left: a run may be preparing them, or read their output.
    """
    from docker.errors import APIError, NotFound

    from prefect_mlprojects.backends.docker.containers import is_young

    engine, containers = _containers()
    failures, removed = 0, []
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
            say(f"{container['Id'][:12]} can't be removed: {error.explanation or error}", err=True)
            failures += 1
            continue
        removed.append(container["Id"])
        if not as_json:
            say(f"Removed {container['Id'][:12]}")
    if as_json:
        print_json({"removed": removed})
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
        print_json(jobs)
        return
    for job in jobs:
        state = f"{job.state}{', finished' if job.finished and job.state != 'ended' else ''}"
        say(f"{job.namespace}/{job.name}  {job.created}  {state}  flow run {job.flow_run_id}")


@kubernetes_command.command("clean")
@_connection_options
@click.option("--ended", is_flag=True, help="Also Jobs whose run has ended; Kubernetes deletes them after a while.")
@DRY_RUN
@json_option
def kubernetes_clean(ended: bool, dry_run: bool, as_json: bool, **connection: str | None) -> None:
    """Delete the Jobs that no process watches any more, with their pods and Secrets."""
    jobs = _jobs(**connection)
    chosen = [job for job in jobs.list() if job.state == "unwatched" or (ended and job.state == "ended")]
    verb = "Would delete" if dry_run else "Deleted"
    for job in chosen:
        if not dry_run:
            jobs.delete(job)
        if not as_json:
            say(f"{verb} {job.namespace}/{job.name}  flow run {job.flow_run_id}")
    if as_json:
        print_json({"removed": chosen})
        return
    say(f"{verb} {len(chosen)} Job{'' if len(chosen) == 1 else 's'}.")


@click.group("databricks")
def databricks_command() -> None:
    """Manage the files of runs in a Databricks workspace."""


@databricks_command.command("clean")
@click.option("--profile", help="Profile of ~/.databrickscfg. Default: the credentials in the environment.")
@click.option("--code-path", help="code-path of the backend configuration. Default: the user's folder.")
@click.option(
    "--older-than", type=click.FloatRange(min=0), default=30, show_default=True, metavar="DAYS", help="Minimum age."
)
@DRY_RUN
@json_option
def databricks_clean(
    profile: str | None, code_path: str | None, older_than: float, dry_run: bool, as_json: bool
) -> None:
    """Remove old uploaded code and output; an active run needs its code only when it starts."""
    from prefect_mlprojects.backends.databricks.config import parse_databricks_config
    from prefect_mlprojects.backends.databricks.storage import clean_workspace

    config = parse_databricks_config({"profile": profile, "code-path": code_path})
    removed = clean_workspace(config, days=older_than, dry_run=dry_run)
    if as_json:
        print_json({"removed": removed})
        return
    for path in removed:
        say(f"{'Would remove' if dry_run else 'Removed'} {path}")
    say(f"{len(removed)} files and folders.")
