"""``mlprojects validate|plan|describe``: inspect a project without running it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from prefect_mlprojects.cli.options import click_option, json_option, print_json, request_from_options, run_options
from prefect_mlprojects.cli.tables import say
from prefect_mlprojects.exceptions import shown
from prefect_mlprojects.request import OPTIONS

if TYPE_CHECKING:
    from prefect_mlprojects.sources import WorkingCopy


@click.command("validate")
@click.argument("uri", default=".", type=click.Path())
@click_option(
    OPTIONS["entry_point"], default=None, show_default=False, help="Check the values for this entry point, too."
)
@click_option(OPTIONS["parameters"])
@json_option
@click.pass_context
def validate_command(
    context: click.Context, uri: str, entry_point: str | None, parameters: dict[str, str], as_json: bool
) -> None:
    """Check the project at URI and, with -e or -P, parameter values for it; nothing is built or run.

    Prints a line for each problem: file:line: severity: message. Exit code 1 if there is an error.
    """
    from prefect_mlprojects.environments.managers import check_environment
    from prefect_mlprojects.spec import Finding, load_project
    from prefect_mlprojects.spec.entry_points import lint

    with _working_copy(uri, None) as copy:
        checked = entry_point or ("main" if parameters else None)
        findings = lint(copy.directory, checked, parameters or None, root=copy.root)
        errors = [finding for finding in findings if finding.severity == "error"]
        if not errors:
            project = load_project(copy.directory, root=copy.root)
            errors = [Finding("error", problem) for problem in check_environment(project)]
            findings += errors
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            say(str(finding))
        if not errors:
            say("OK", err=True)
    context.exit(1 if errors else 0)


@click.command("describe")
@click.argument("uri", default=".", type=click.Path())
@click_option(OPTIONS["version"])
@json_option
def describe_command(uri: str, version: str | None, as_json: bool) -> None:
    """List the entry points of the project at URI and their parameters."""
    from prefect_mlprojects._support.secrets import MASK
    from prefect_mlprojects.spec import load_project

    with _working_copy(uri, version) as copy:
        project = load_project(copy.directory, root=copy.root)
    fields = (
        "name",
        "type",
        "required",
        "default",
        "description",
        "choices",
        "minimum",
        "maximum",
        "optional",
        "option",
        "secret",
    )
    entry_points: dict[str, dict[str, Any]] = {
        name: {
            "command": entry_point.command,
            "parameters": [
                {field: getattr(parameter, field) for field in fields}
                | ({"default": MASK} if parameter.secret and parameter.default else {})
                for parameter in entry_point.parameters.values()
            ],
        }
        for name, entry_point in project.entry_points.items()
    }
    if as_json:
        print_json({"name": project.display_name, "entry_points": entry_points})
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from prefect_mlprojects.spec.schema import describe_parameter

    entry_points_by_name = project.entry_points
    console = Console(highlight=False, soft_wrap=False)
    console.print(f"Project {shown(project.display_name)}", markup=False)
    if not entry_points:
        console.print("It declares no entry points; its .py, .sh and .R files can be run by name.")
    for name, described in entry_points.items():
        console.print(
            f"\n{shown(name)}: {shown(described['command'], lines=True)}", markup=False, style="bold", soft_wrap=True
        )
        if not described["parameters"]:
            continue
        table = Table()
        for column in ("parameter", "type", "default", "description"):
            table.add_column(column)
        for parameter in entry_points_by_name[name].parameters.values():
            table.add_row(*(escape(shown(text)) for text in (parameter.name, *describe_parameter(parameter))))
        console.print(table)


@click.command("plan")
@run_options("cli", read_environment=True)
@json_option
@click.pass_context
def plan_command(context: click.Context, /, as_json: bool, **options: Any) -> None:
    """Show what `mlprojects run` would do with the same options; nothing is built or run."""
    from prefect_mlprojects._support.redaction import redact_url
    from prefect_mlprojects._support.secrets import reveal
    from prefect_mlprojects.backends.contract import BackendPlan
    from prefect_mlprojects.request.check import check_request, context_before_run, map_paths
    from prefect_mlprojects.sources import describe_working_copy
    from prefect_mlprojects.spec import build_command
    from prefect_mlprojects.tracking import resolve_tracking_uri

    request, secrets = request_from_options(context, options)
    with _working_copy(reveal(secrets.uri) if secrets.uri else request.uri, request.version) as copy:
        known = context_before_run(request, resolve_tracking_uri(), secrets)
        checked = check_request(request, copy, known)
        downloads = {name: redact_url(uri) for name, uri in checked.parameters.downloads.items()}
        parameters = checked.parameters.with_downloads(downloads)
        if known.config is not None:
            parameters, _ = map_paths(checked, parameters)
        command = build_command(checked.entry_point, parameters)
        if known.config is not None:
            planned = checked.backend.plan(checked.backend_request, command)
        else:
            where = f"in the block {request.backend_config}, which is read when the run starts"
            planned = BackendPlan(checked.environment_kind, sections={"backend configuration": where})
        plan, remote = planned.environment_plan, planned.sections
    plain: dict[str, Any] = {
        "project": checked.project.display_name,
        "entry_point": checked.entry_point.name,
        "source": copy.source_name,
        "directory": None if copy.temporary else str(copy.directory),
        "commit": copy.commit,
        "environment": planned.environment,
        "environment_location": str(plan.location) if plan and plan.location else None,
        "environment_ready": plan.ready if plan else None,
        "downloads": downloads,
        "command": command,
        "backend": request.backend,
        "backend_config": request.backend_config,
        "backend_plan": dict(remote),
        "timeout": request.timeout,
        "retries": request.retries,
    }
    for warning in (*checked.project.warnings, *checked.parameters.warnings, *(plan.warnings if plan else ())):
        say(f"Warning: {warning}", err=True)
    if as_json:
        print_json(plain)
        return
    ready = f" ({'in the cache' if plan.ready else 'to be built'})" if plan and plan.location else ""
    rows = {
        "source": describe_working_copy(copy),
        "entry point": checked.name,
        "environment": f"{plain['environment']}{ready}",
        **{f"download {name}": uri for name, uri in downloads.items()},
        "command": command,
        "backend": request.backend,
        **{title: text for title, text in remote.items() if "\n" not in text},
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{name:<{width}}  {value}")
    for title, text in remote.items():
        if "\n" in text:
            say(f"\n{title}:\n{text.rstrip()}")


@contextmanager
def _working_copy(uri: str, version: str | None) -> Iterator[WorkingCopy]:
    from prefect_mlprojects.sources import detect_source
    from prefect_mlprojects.types import StopSignal

    source = detect_source(uri, version)
    copy = source.fetch(StopSignal(), lambda line: say(line, err=True))
    try:
        yield copy
    finally:
        source.remove(copy)
