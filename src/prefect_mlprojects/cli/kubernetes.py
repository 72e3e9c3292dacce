"""``mlprojects kubernetes list|clean``: the Jobs that runs left on a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _connection_options(command: _Command) -> _Command:
    for option in (
        click.option("--namespace", metavar="NAME", help="The namespace; by default the context's."),
        click.option("--context", "kube_context", metavar="NAME", help="The context of the kubeconfig."),
        click.option("--kubeconfig", metavar="PATH", help="The kubeconfig; by default KUBECONFIG or ~/.kube/config."),
    ):
        command = option(command)
    return command


def _config(namespace: str | None, kube_context: str | None, kubeconfig: str | None) -> dict[str, str]:
    given = {"namespace": namespace, "kube-context": kube_context, "kubeconfig": kubeconfig}
    return {key: value for key, value in given.items() if value is not None}


@click.group("kubernetes")
def kubernetes_command() -> None:
    """List and remove the Jobs of runs on a Kubernetes cluster."""


@kubernetes_command.command("list")
@_connection_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(namespace: str | None, kube_context: str | None, kubeconfig: str | None, as_json: bool) -> None:
    """List the Jobs of runs: watched, unwatched (their process has gone) or ended."""
    from prefect_mlprojects.backends.kubernetes.jobs import RunJobs

    jobs = RunJobs(_config(namespace, kube_context, kubeconfig)).list()
    if as_json:
        click.echo(json.dumps([asdict(job) for job in jobs]))
        return
    for job in jobs:
        state = f"{job.state}{', finished' if job.finished and job.state != 'ended' else ''}"
        click.echo(f"{job.namespace}/{job.name}  {job.created}  {state}  flow run {job.flow_run_id}")


@kubernetes_command.command("clean")
@_connection_options
@click.option("--ended", is_flag=True, help="Also Jobs whose end was seen; Kubernetes removes them itself in time.")
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
def clean(namespace: str | None, kube_context: str | None, kubeconfig: str | None, ended: bool, dry_run: bool) -> None:
    """Delete the Jobs that nobody watches any more, with their pods and Secrets."""
    from prefect_mlprojects.backends.kubernetes.jobs import RunJobs

    jobs = RunJobs(_config(namespace, kube_context, kubeconfig))
    chosen = [job for job in jobs.list() if job.state == "unwatched" or (ended and job.state == "ended")]
    verb = "Would delete" if dry_run else "Deleted"
    for job in chosen:
        if not dry_run:
            jobs.delete(job)
        click.echo(f"{verb} {job.namespace}/{job.name}  flow run {job.flow_run_id}")
    click.echo(f"{verb} {len(chosen)} Job{'' if len(chosen) == 1 else 's'}.")
