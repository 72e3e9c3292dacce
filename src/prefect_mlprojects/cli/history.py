"""``mlprojects runs|status``: what ran, and how it ended. Neither imports Prefect."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from prefect_mlprojects._support.text import span
from prefect_mlprojects.cli.options import RUN, json_option, print_json
from prefect_mlprojects.cli.tables import print_table, say, styled_status, write_line
from prefect_mlprojects.exceptions import shown

if TYPE_CHECKING:
    from prefect_mlprojects.runs.records import RunRecord
    from prefect_mlprojects.server.process import ServerAddress

_STATES = ("Scheduled", "Late", "Pending", "Running", "Paused", "Cancelling", "Crashed", "TimedOut")
_STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")


def _filter_of(statuses: tuple[str, ...]) -> dict[str, Any]:
    from prefect_mlprojects.runs.records import STATUS_BY_STATE_TYPE

    if not statuses:
        return {}
    types = [kind for kind, status in STATUS_BY_STATE_TYPE.items() if status in statuses]
    names = [status for status in statuses if status in _STATES and status != "Running"]
    # RUNNING and Running are the same word in any case; Prefect's is the narrower one and needs no name of its own.
    parts = {"type": {"any_": types}} if types else {}
    return {"state": {**parts, **({"name": {"any_": names}} if names else {}), "operator": "or_"}}


@click.command("runs")
@click.option(
    "-s",
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice([*_STATUSES, *(each for each in _STATES if each != "Running")], case_sensitive=False),
    help="Only runs with this status, or in this state of Prefect's. May be repeated.",
)
@click.option("--project", metavar="NAME", help="Only runs of this project.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Only runs with this tag. May be repeated.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Maximum number of runs.",
)
@json_option
def runs_command(
    statuses: tuple[str, ...], project: str | None, tags: tuple[str, ...], limit: int, as_json: bool
) -> None:
    """List the runs that were started last: ID, name, status, age, duration, main metric and parameters.

    The status has Prefect's state in parentheses where that says more. Every command with an argument RUN takes these IDs, or
    `last` for the first line.
    """
    from prefect_mlprojects.runs.references import newest_runs, short_ids
    from prefect_mlprojects.server.api import flow_run_url
    from prefect_mlprojects.server.process import resolve_api
    from prefect_mlprojects.server.rest import RestApi

    address = resolve_api()
    matching: dict[str, Any] = _filter_of(statuses)
    if tags:
        matching["tags"] = {"all_": list(tags)}
    if project:
        matching["name"] = {"like_": f"{project}/"}
    records = newest_runs(
        RestApi(address.api_url),
        limit=limit,
        matching=matching,
        accept=lambda record: not project or record.name.rpartition("/")[0] == project,
        scheduled="Scheduled" in statuses,
    )
    if as_json:
        print_json([record.as_json(flow_run_url(address.ui_url, record.id)) for record in records])
        return
    if not records:
        say("No runs found.", err=True)
        return
    ids = short_ids(records)
    heads = ("RUN", "NAME", "STATUS", "AGE", "DURATION", "METRIC", "PARAMETERS")
    print_table(heads, [_row(record, ids[record.id]) for record in records], flexible=(6, 1))


def _row(record: RunRecord, short_id: str) -> tuple[str, ...]:
    metric = f"{record.metric[0]}={record.metric[1]:.4g}" if record.metric else ""
    duration = "" if record.duration is None else span(record.duration)
    return (
        short_id,
        record.name,
        record.shown_status,
        _age(record.started or record.created),
        duration,
        metric,
        _values(record),
    )


def _values(record: RunRecord) -> str:
    from prefect_mlprojects._support.redaction import redact

    texts = {name: redact(str(value)) for name, value in record.parameters.items()}
    return " ".join(f"{name}={text if len(text.split()) == 1 else shlex.quote(text)}" for name, text in texts.items())


def _age(time: datetime) -> str:
    seconds = (datetime.now(timezone.utc) - time).total_seconds()
    # Of a run that a schedule will start.
    return span(seconds, whole=True) if seconds >= 0 else f"in {span(-seconds, whole=True)}"


@click.command("status")
@RUN
@json_option
def status_command(run: str, as_json: bool) -> None:
    """Print the status of RUN (RUNNING, FINISHED, FAILED or KILLED), why, since when, with what, and where to look.

    The first line is the status alone.
    """
    from prefect_mlprojects.runs.references import find_run
    from prefect_mlprojects.server.api import flow_run_url
    from prefect_mlprojects.server.process import resolve_api
    from prefect_mlprojects.server.rest import RestApi

    address = resolve_api()
    record = find_run(run, RestApi(address.api_url))
    if as_json:
        page = dict(zip(("run_url", "run_url_served_by"), record.mlflow_page(), strict=True))
        print_json({**record.as_json(flow_run_url(address.ui_url, record.id)), **page})
        return
    write_line(styled_status(record.status))
    rows = dict(_facts(record, address))
    width = max(map(len, rows))
    for name, value in rows.items():
        first, *others = shown(value, lines=True).splitlines() or [""]
        write_line("\n".join([f"  {name:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in others)]))
    write_line("")
    for command, what in _next_commands(record):
        write_line(f"  {command:<{max(len(each) for each, _ in _next_commands(record))}}  {what}")


def _facts(record: RunRecord, address: ServerAddress) -> Iterator[tuple[str, str]]:
    from prefect_mlprojects._support.redaction import redact
    from prefect_mlprojects.request import BRANCH_LABEL, CATEGORY_LABEL, COMMIT_LABEL, ENVIRONMENT_LABEL, RUN_ID_LABEL
    from prefect_mlprojects.server.api import flow_run_url

    labels, request = record.labels, record.request
    yield "run", f"{record.name}  ({record.id})"
    if record.state_detail:
        yield "Prefect state", record.state_detail
    if why := _why(record):
        yield "why", why
    if category := labels.get(CATEGORY_LABEL):
        yield "category", str(category)
    yield from _times(record)
    yield "project", redact(str(request.get("uri") or ""))
    yield "entry point", str(request.get("entry_point") or "main")
    yield "parameters", _values(record) or "none given"
    commit, branch = labels.get(COMMIT_LABEL), labels.get(BRANCH_LABEL)
    if commit or request.get("version"):
        of = f" of {branch or request.get('version')}" if commit and (branch or request.get("version")) else ""
        yield "version", f"{str(commit)[:12] if commit else request.get('version')}{of}"
    yield "backend", str(request.get("backend") or "local")
    if environment := labels.get(ENVIRONMENT_LABEL):
        yield "environment", str(environment)
    if record.deployment_id:
        yield "deployment", record.deployment_id + (f"  (work pool {record.work_pool})" if record.work_pool else "")
    if record.tags:
        yield "tags", ", ".join(record.tags)
    if record.metric:
        yield "metric", f"{record.metric[0]} = {record.metric[1]:.6g}"
    yield "Prefect page", flow_run_url(address.ui_url, record.id) or "unknown"
    url, hint = record.mlflow_page()
    if url:
        yield "MLflow page", f"{url}  (served by `{hint}`)" if hint else url
    elif run_id := labels.get(RUN_ID_LABEL):
        yield "MLflow run", str(run_id)


def _why(record: RunRecord) -> str:
    if record.state in ("Scheduled", "Late", "Pending") and record.deployment_id and record.started is None:
        return f"It waits for a worker of the work pool '{record.work_pool}'." if record.work_pool else record.message
    return record.message if record.status != "FINISHED" else ""


def _times(record: RunRecord) -> Iterator[tuple[str, str]]:
    for name, time in (("due", record.created if record.started is None else None), ("since", record.started)):
        if time is not None:
            ago = _age(time)
            yield name, f"{time:%Y-%m-%d %H:%M:%S} UTC ({ago if ago.startswith('in ') else f'{ago} ago'})"
    if record.ended is not None and record.duration is not None:
        yield "ended", f"{record.ended:%Y-%m-%d %H:%M:%S} UTC, after {span(record.duration)}"


def _next_commands(record: RunRecord) -> list[tuple[str, str]]:
    from prefect_mlprojects.runs.references import short_id

    run = short_id(record.id)
    if record.status == "RUNNING":
        waits = record.started is None and record.work_pool
        worker = [(f"mlprojects worker --pool {shlex.quote(str(record.work_pool))}", "execute it on this machine")]
        return [
            *(worker if waits else [(f"mlprojects logs -f {run}", "follow its output")]),
            (f"mlprojects wait {run}", "wait for its end"),
            (f"mlprojects cancel {run}", "end it"),
        ]
    again = (f"mlprojects rerun {run}", "run it again; -P name=value replaces a parameter")
    tail = " --tail 50" if record.status == "FAILED" else ""
    return [(f"mlprojects logs{tail} {run}", "its output"), again]
