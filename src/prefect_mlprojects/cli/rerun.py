"""``mlprojects rerun``: the run of an earlier request."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from prefect_mlprojects.cli.options import RUN, TAGS, connect, given_options, print_json, run_options
from prefect_mlprojects.cli.runs import (
    DETACH,
    JSON_RESULT,
    REBUILD,
    REPORT,
    exit_code_of,
    print_started,
    run_detached,
    run_request,
)
from prefect_mlprojects.cli.tables import say

if TYPE_CHECKING:
    from prefect_mlprojects.runs.handles import SubmittedRun
    from prefect_mlprojects.runs.records import RunRecord


@click.command("rerun")
@RUN
@run_options("cli", without=("uri",))
@TAGS
@REBUILD
@DETACH
@JSON_RESULT
@REPORT
@click.option("--found", hidden=True)
@click.pass_context
def rerun_command(
    context: click.Context,
    /,
    run: str,
    tags: tuple[str, ...],
    rebuild_env: bool,
    detach: bool,
    as_json: bool,
    detached_report: int | None,
    found: str | None,
    **options: Any,
) -> None:
    """Run the project of RUN again: the same commit, entry point, parameters, backend and options, unless others are given.

    -P and -A replace single values; --tag adds one. A folder is used as it is now. The run of a deployment is repeated on its
    work pool. Values that were kept in memory, such as passwords, have to be given again. Exit codes: as of `mlprojects run`.
    """
    from prefect_mlprojects.request.tags import checked_tags, user_tags

    tags, given = checked_tags(tags), given_options(context, options)
    from prefect_mlprojects.runs.references import find_run
    from prefect_mlprojects.runs.repeat import repeated_arguments, unlike
    from prefect_mlprojects.server.process import resolve_api
    from prefect_mlprojects.server.rest import RestApi

    api = RestApi(resolve_api().api_url)
    record = find_run(found or run, api)
    deployment = api.get(f"/deployments/{record.deployment_id}") if record.deployment_id else None
    arguments = repeated_arguments(record, given)
    tags = tuple(dict.fromkeys([*user_tags(record.tags), *tags]))
    if deployment is not None:
        context.exit(_rerun_deployment(record, deployment, arguments, given, tags=tags, detach=detach, as_json=as_json))
    if record.deployment_id:
        say("Its deployment does not exist any more: the project runs in this process.", err=True)
    _use_its_store(record)
    from prefect_mlprojects.runs.start import make_request, preflight

    request, secrets = make_request(arguments)
    checked = preflight(request, secrets)
    if checked is not None and (difference := unlike(record, request, checked.backend_request.working_copy.commit)):
        say(f"Warning: {difference}", err=True)
    if detach:
        context.exit(run_detached(f"--found={record.id}", as_json=as_json))
    context.exit(
        run_request(
            request, secrets, checked, tags=tags, rebuild_env=rebuild_env, as_json=as_json, report=detached_report
        )
    )


def _use_its_store(record: RunRecord) -> None:
    """Tracks in the earlier run's store unless one is set: MLflow's default depends on the working directory."""
    from prefect_mlprojects._support.secrets import MASK
    from prefect_mlprojects.request import TRACKING_URI_LABEL
    from prefect_mlprojects.tracking.uris import TRACKING_URI_VARIABLE, scheme_of, sqlite_path

    uri = str(record.labels.get(TRACKING_URI_LABEL) or "")
    if os.environ.get(TRACKING_URI_VARIABLE) or not uri or MASK in uri:
        return
    path = sqlite_path(uri)
    if path.is_file() if path is not None else scheme_of(uri) in ("http", "https", "databricks"):
        os.environ[TRACKING_URI_VARIABLE] = uri


def _rerun_deployment(
    record: RunRecord,
    deployment: dict[str, Any],
    arguments: dict[str, Any],
    given: dict[str, Any],
    *,
    tags: tuple[str, ...],
    detach: bool,
    as_json: bool,
) -> int:
    """Starts the run on the deployment's work pool, and unless `detach` prints its log until it ends; returns an exit code."""
    connect()
    from prefect_mlprojects.deployments import repeat_run

    run = repeat_run(record, deployment, arguments, given, tags)
    print_started({"flow_run_id": run.flow_run_id, "flow_run_url": run.url}, as_json=as_json and detach)
    if detach:
        return 0
    pool = deployment.get("work_pool_name")
    say(
        f"Waiting for a worker of the work pool '{pool}' ..." if pool else "Waiting for `mlprojects serve` ...",
        err=True,
    )
    try:
        return _follow(run, as_json=as_json)
    except KeyboardInterrupt:
        say(f"The run goes on; end it with `mlprojects cancel {run.flow_run_id}`.", err=True)
        raise


def _follow(run: SubmittedRun, *, as_json: bool) -> int:
    from prefect_mlprojects.cli.runs import print_logs
    from prefect_mlprojects.server.api import call_api

    if not as_json:
        call_api(connect(), print_logs, run.flow_run_id, True, None, False, False)
    result = run.result()
    if as_json:
        fields = (
            "status",
            "run_id",
            "experiment_id",
            "tracking_uri",
            "flow_run_id",
            "exit_code",
            "category",
            "cause",
            "message",
        )
        print_json({**{name: getattr(result, name) for name in fields}, "flow_run_url": run.url})
    else:
        say(result.message or result.status, err=True)
    return exit_code_of(result)
