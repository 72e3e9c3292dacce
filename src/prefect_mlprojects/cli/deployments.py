"""``mlprojects deploy|serve|worker``: projects on a schedule and from a form."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import click

from prefect_mlprojects.cli.completion import complete_deployments, complete_work_pools
from prefect_mlprojects.cli.options import (
    click_option,
    connect,
    given_options,
    json_option,
    parse_values,
    parse_with,
    print_json,
    run_options,
)
from prefect_mlprojects.cli.tables import say
from prefect_mlprojects.request import OPTIONS, options_of
from prefect_mlprojects.settings import OWN_VARIABLES, POLICY_VARIABLE
from prefect_mlprojects.types import WorkerStop

_F = TypeVar("_F", bound=Callable[..., Any])

_DEPLOYMENT_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("-n", "--name", metavar="NAME", help="Name of the deployment. Default: the project's."),
    click.option("--pin", is_flag=True, help="Stay at the commit that --version resolves to now."),
    click.option("--cron", metavar="EXPRESSION", help="Schedule by a cron expression, such as '0 3 * * *'."),
    click.option("--interval", type=float, metavar="SECONDS", help="Schedule every so many seconds."),
    click.option("--rrule", metavar="RULE", help="Schedule by a recurrence rule (RFC 5545)."),
    click.option("--timezone", metavar="NAME", help="Time zone of the schedule. Default: UTC."),
    click.option("--paused", is_flag=True, help="Create the schedule paused."),
    click.option("--no-schedule", is_flag=True, help="Remove the schedule of an existing deployment."),
    click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag of the deployment. May be repeated."),
    click.option(
        "--form-option",
        "form_options",
        multiple=True,
        callback=lambda _context, _option, value: value or None,
        shell_complete=lambda _context, _option, start: [
            name for name in ("all", "none", *(option.name for option in options_of("form"))) if name.startswith(start)
        ],
        metavar="NAME",
        help="Run option that the form has, and that whoever starts runs may set; 'all' or 'none'. May be repeated. Default: "
        "what it has, at first all but backend, backend_config, docker_args, version, tracking.",
    ),
    click.option(
        "--concurrency-limit", type=click.IntRange(min=1), metavar="N", help="Maximum number of concurrent runs."
    ),
)


def _deployment_options(function: _F) -> _F:
    for option in reversed(options_of("deploy")):
        if option.flags:
            function = click_option(option)(function)
    for decorate in reversed(_DEPLOYMENT_OPTIONS):
        function = decorate(function)
    return function


def _specify(uri: str, options: dict[str, Any], job_variables: dict[str, Any] | None = None) -> Any:
    from prefect_mlprojects.deployments.provisioning import make_schedule
    from prefect_mlprojects.deployments.specification import specify

    schedule = make_schedule(*(options.pop(name) for name in ("cron", "interval", "rrule", "timezone")))
    return specify(uri, schedule=schedule, job_variables=job_variables, **options)


def _job_variables(texts: tuple[str, ...]) -> dict[str, Any]:
    """Parses NAME=VALUE, where the value is JSON or else text."""
    variables: dict[str, Any] = {}
    for name, value in parse_values("--job-variable", "Job variable", texts).items():
        try:
            variables[name] = json.loads(value)
        except json.JSONDecodeError:
            variables[name] = value
    return variables


@click.command("deploy")
@click.argument("uri", default=".", type=click.Path())
@click.option(
    "-p",
    "--work-pool",
    metavar="NAME",
    shell_complete=complete_work_pools,
    help="Work pool of any type. Default: the process pool 'mlprojects'.",
)
@click.option(
    "--job-variable",
    "job_variables",
    multiple=True,
    callback=parse_with(_job_variables),
    metavar="NAME=VALUE",
    help="Override in the work pool's job template, such as image=…; the value may be JSON. May be repeated.",
)
@_deployment_options
@json_option
def deploy_command(
    uri: str, work_pool: str | None, job_variables: dict[str, Any], as_json: bool, **options: Any
) -> None:
    """Deploy the project at URI: Prefect runs it on a schedule, or from a typed form in its UI.

    Deploying again under the same name updates the deployment and its form. What is not named stays: schedule, tags, work
    pool, limit, job variables, and whether it is paused.
    """
    from prefect_mlprojects.deployments import create_deployment
    from prefect_mlprojects.deployments.provisioning import next_times
    from prefect_mlprojects.server.access import login_link

    deployment = create_deployment(_specify(uri, options, job_variables), work_pool)
    if as_json:
        fields = {name: getattr(deployment, name) for name in ("id", "work_pool", "url", "schedule", "changes")}
        print_json({"name": deployment.full_name, **fields})
        return
    say(f"Deployed {deployment.full_name} to the work pool '{deployment.work_pool}'")
    for change in deployment.changes:
        say(f"  {change}")
    if deployment.schedule is not None:
        say(f"  schedule:               {deployment.schedule}")
    if deployment.specification.schedule is not None:
        times = [f"{time:%Y-%m-%d %H:%M %Z}" for time in next_times(deployment.specification.schedule)]
        say(f"  next times:             {', '.join(times)}")
    if deployment.url:
        say(f"  start it from its form: {login_link(deployment.url)}")
    tracking = deployment.specification.options.get("tracking")
    if tracking:
        results = f"the tracking server of the block '{tracking}'"
    else:
        results = "the worker's MLFLOW_TRACKING_URI; if that is not set, mlflow.db in the folder of `mlprojects worker`"
    say(f"  MLflow results:         {results}")
    say(f"  start it from here:     mlprojects start {shlex.quote(deployment.name)}")
    say(f"  a worker for its runs:  mlprojects worker --pool {deployment.work_pool}", err=True)


@click.command("serve")
@click.argument("uris", nargs=-1, type=click.Path(), metavar="[URI]...")
@_deployment_options
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Maximum number of concurrent runs.")
def serve_command(uris: tuple[str, ...], limit: int | None, **options: Any) -> None:
    """Deploy the projects at the URIs and execute their runs in this process, without a work pool, until Ctrl-C."""
    from prefect_mlprojects.deployments import serve

    if options["name"] and len(uris) > 1:
        raise click.BadParameter("Several deployments can't have one name.", param_hint="--name")
    serve([_specify(uri, dict(options)) for uri in uris or (".",)], limit=limit)


@click.command("worker")
@click.option(
    "-p",
    "--pool",
    metavar="NAME",
    shell_complete=complete_work_pools,
    help="Work pool. Default: the process pool 'mlprojects'.",
)
@click.option("-n", "--name", metavar="NAME", help="Name of the worker.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum number of concurrent runs. Default: by cores and memory.",
)
@click.option("--once", is_flag=True, help="Execute the runs that are due now, then exit.")
@click.option(
    "--on-stop",
    type=click.Choice(get_args(WorkerStop)),
    help="What becomes of its runs when it is stopped.  [default: cancel, or PREFECT_MLPROJECTS_WORKER_STOP]",
)
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Policy file: what its runs may use of this machine.",
)
@click.option(
    "--restrict-pool", is_flag=True, help="Give the pool a job template by which runs can't set commands and variables."
)
@click.pass_context
def worker_command(
    context: click.Context,
    pool: str | None,
    name: str | None,
    limit: int | None,
    once: bool,
    on_stop: WorkerStop | None,
    policy: Path | None,
    restrict_pool: bool,
) -> None:
    """Start a process worker: it executes the runs of deployments on this machine until Ctrl-C.

    Ctrl-C and SIGTERM stop it: it takes no more runs, and cancels those that it executes, or waits for them (--on-stop wait; the
    next signal cancels them).
    """
    if policy is not None:
        from prefect_mlprojects.request.policy import read_policy

        os.environ[POLICY_VARIABLE] = str(read_policy(policy.absolute()).file)
    api_url = connect()
    from prefect_mlprojects._support.secrets import reveal
    from prefect_mlprojects.deployments.provisioning import (
        HEARTBEAT_SECONDS,
        ensure_zombie_automation,
    )
    from prefect_mlprojects.deployments.work_pools import ensure_work_pool, open_template_note, restrict_work_pool
    from prefect_mlprojects.deployments.worker import WorkerOptions, default_limit, run_worker
    from prefect_mlprojects.server.api import call_api
    from prefect_mlprojects.settings import worker_stop
    from prefect_mlprojects.tracking import display_uri, resolve_tracking_uri

    found = call_api(api_url, ensure_work_pool, pool)
    if restrict_pool:
        found = call_api(api_url, restrict_work_pool, found)
    if note := open_template_note(found):
        say(note, err=True)
    work_pool = found.name
    call_api(api_url, ensure_zombie_automation)
    environment = {**os.environ, "PREFECT_API_URL": api_url}
    environment.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    # Each flow run starts in a temporary folder, where MLflow's default store would be lost.
    tracking_uri = resolve_tracking_uri()
    environment["MLFLOW_TRACKING_URI"] = reveal(tracking_uri)
    say(f"MLflow results: {display_uri(tracking_uri)}", err=True)
    # The worker's terminal shows its own log.
    for variable in environment.pop(OWN_VARIABLES, "").split():
        environment.pop(variable, None)
    limit = limit or default_limit()
    say(f"At most {limit} runs at a time (--limit).", err=True)
    options = WorkerOptions(work_pool, name, limit, once, on_stop or worker_stop())
    context.exit(run_worker(options, environment))


@click.command("start")
@click.argument("deployment", shell_complete=complete_deployments)
@click_option(OPTIONS["parameters"])
@run_options("form")
@click.option("--wait", is_flag=True, help="Wait for the run to end; exit codes as those of `mlprojects wait`.")
@json_option
@click.pass_context
def start_command(
    context: click.Context,
    /,
    deployment: str,
    parameters: dict[str, str] | None,
    wait: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Start a run of DEPLOYMENT and print its ID: a worker of its work pool executes it.

    What is given replaces the deployment's own parameters and options for this run.
    """
    connect()
    from prefect_mlprojects.cli.runs import exit_code_of, print_started
    from prefect_mlprojects.deployments import run_deployment

    run = run_deployment(deployment, parameters=parameters, options=given_options(context, options))
    print_started({"flow_run_id": run.flow_run_id, "flow_run_url": run.url}, as_json=as_json)
    if wait:
        result = run.result()
        say(result.message or result.status, err=True)
        context.exit(exit_code_of(result))


@click.group("deployments")
def deployments_command() -> None:
    """List, pause, resume and delete deployments of projects."""


@deployments_command.command("list")
@json_option
def list_deployments_command(as_json: bool) -> None:
    """List the deployments of projects on the Prefect server."""
    from prefect_mlprojects.deployments import list_deployments

    rows = list_deployments(connect())
    if as_json:
        print_json(rows)
    for row in [] if as_json else rows:
        state = " (paused)" if row["paused"] else ""
        say(f"{row['name']}{state}  pool: {row['work_pool'] or 'served'}  schedule: {row['schedule'] or 'none'}")


def _change_command(name: Literal["pause", "resume", "delete"], done: str, text: str) -> None:
    @deployments_command.command(name, help=text)
    @click.argument("deployment", shell_complete=complete_deployments)
    def change(deployment: str) -> None:
        from prefect_mlprojects.deployments import change_deployment

        change_deployment(connect(), deployment, name)
        say(f"{done} {deployment}.")


_change_command("pause", "Paused", "Pause DEPLOYMENT: its schedule starts no runs until it is resumed.")
_change_command("resume", "Resumed", "Resume DEPLOYMENT and its schedules.")
_change_command("delete", "Deleted", "Delete DEPLOYMENT; its runs stay.")
