"""Deployments: projects that Prefect runs on a schedule or from a typed form in its UI."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import reveal
from prefect_mlprojects.deployments.form import form_options_of
from prefect_mlprojects.deployments.provisioning import (
    Update,
    ensure_zombie_automation,
    find_deployment,
    full_name,
    make_schedule,
    read_update,
    schedule_texts,
)
from prefect_mlprojects.deployments.specification import DeploymentSpecification, specify
from prefect_mlprojects.deployments.work_pools import default_job_variables, ensure_work_pool
from prefect_mlprojects.exceptions import ExecutionException, ParameterError, Problem
from prefect_mlprojects.request import FLOW_NAME, unknown_options
from prefect_mlprojects.request.secrets import refuse_secret_parameters, split_parameters, storable_options
from prefect_mlprojects.request.tags import checked_tags
from prefect_mlprojects.runs.attached import AttachedSubmittedRun
from prefect_mlprojects.runs.handles import SubmittedRun
from prefect_mlprojects.runs.records import RunRecord
from prefect_mlprojects.server.api import call_api, read_all, use_api
from prefect_mlprojects.spec.schema import value_for_schema
from prefect_mlprojects.spec.secrets import REFERENCE_PATTERN, is_reference
from prefect_mlprojects.tracking import resolve_tracking_uri

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

__all__ = ["Deployment", "deploy", "serve"]

ENTRYPOINT = "prefect_mlprojects.flows.run_project.run_project"
"""The flow as a module path: it is a part of the installed package, so a worker has nothing to pull."""


@dataclass(frozen=True)
class Deployment:
    """A deployment on a Prefect server.

    Attributes:
        work_pool: The name of its work pool.
        url: Its page in Prefect's UI; None if the UI's address is not known.
        specification: What was deployed.
        changes: What an update changed, and what it kept although it was not named; empty for a new deployment.
        schedule: Its schedule, as text.
    """

    id: str
    name: str
    work_pool: str
    url: str | None
    specification: DeploymentSpecification = field(repr=False)
    changes: tuple[str, ...] = ()
    schedule: str | None = None

    @property
    def full_name(self) -> str:
        """``flow/deployment``, as Prefect's commands name it."""
        return full_name(self.name)

    def run(
        self, parameters: Mapping[str, Any] | None = None, *, tags: Sequence[str] = (), **options: Any
    ) -> SubmittedRun:
        """Starts a run on the work pool and returns a handle at once.

        Args:
            parameters: Parameter values by name, in place of the deployment's.
            tags: Tags of the flow run, beside the deployment's.
            **options: Run options, in place of the deployment's.

        Raises:
            ParameterError: A run option is unknown, or the server refused the values.
            PrefectServerError: The server can't be reached.
        """
        return run_deployment(self.name, parameters=parameters, options=options, tags=tags)


def run_deployment(
    name: str,
    *,
    entry_point: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
) -> SubmittedRun:
    """Starts a run of an existing deployment, with or without ``run_project/`` in its name, and returns a handle at once.

    `parameters` and `options` replace the deployment's. Raises `ParameterError` if it does not exist, is not for `entry_point`,
    or the server refused the values.
    """
    from prefect_mlprojects.server.process import resolve_api

    tags = checked_tags(tags)
    api_url, headline = resolve_api().api_url, f"The deployment {full_name(name)} can't run"
    found = _existing(api_url, name, headline, "create it with `mlprojects deploy`")
    own_entry_point = found.parameters.get("entry_point", "main")
    if entry_point is not None and own_entry_point != entry_point:
        raise ParameterError(headline, [Problem(f"it is for the entry point {own_entry_point!r}, not {entry_point!r}")])
    schema = found.parameter_openapi_schema or {}
    _refuse_secrets(headline, schema, parameters or {}, {"backend": found.parameters.get("backend"), **(options or {})})
    values = _with_values(found.parameters, schema, parameters or {}, options or {})
    return AttachedSubmittedRun(call_api(api_url, _start, found.id, headline, values, tags))


def repeat_run(
    record: RunRecord,
    deployment: Mapping[str, Any],
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
    tags: Sequence[str] = (),
) -> SubmittedRun:
    """Starts a run of a deployment like an earlier one, and returns a handle at once.

    `arguments` are those of the new run, and `given` the run options that differ from the earlier run's. Raises
    `ParameterError` if the form does not have one of them, or the server refused the values.
    """
    from prefect_mlprojects.server.process import resolve_api

    api_url, headline = (
        resolve_api().api_url,
        f"The run {record.id} of the deployment {deployment['name']} can't be repeated",
    )
    options = {name: value for name, value in given.items() if name not in ("parameters", "docker_args")}
    if options.pop("entry_point", arguments["entry_point"]) != record.request.get("entry_point", "main"):
        raise ParameterError(headline, [Problem(f"it is for the entry point {record.request.get('entry_point')!r}")])
    chosen = {name: arguments[name] for name in ("version", "docker_args") if arguments.get(name)}
    stored = {name: value for name, value in record.request.items() if name != "run_id"}
    schema = deployment.get("parameter_openapi_schema") or {}
    _refuse_secrets(
        headline, schema, given.get("parameters") or {}, {"backend": stored.get("backend"), **chosen, **options}
    )
    values = _with_values(stored, schema, given.get("parameters") or {}, {**chosen, **options})
    return AttachedSubmittedRun(call_api(api_url, _start, UUID(str(deployment["id"])), headline, values, tags))


def _refuse_secrets(
    headline: str, schema: Mapping[str, Any], parameters: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raises `ExecutionException` for values with secrets, which the server would store, or refuse and quote."""
    fields = schema.get("properties", {}).get("parameters", {}).get("properties", {})
    literal = [
        name
        for name, value in parameters.items()
        if fields.get(name, {}).get("pattern") == REFERENCE_PATTERN and not is_reference(str(value))
    ]
    refuse_secret_parameters(headline, literal, declared=True)
    refuse_secret_parameters(headline, split_parameters(parameters)[1])
    storable_options(headline, options)


def _existing(api_url: str, name: str, headline: str, fix: str) -> Any:
    """Returns a deployment as the Prefect server has it; raises `ParameterError` if it does not exist."""
    found = call_api(api_url, find_deployment, name)
    if found is None:
        raise ParameterError(headline, [Problem("no deployment of that name exists", fix=fix)])
    return found


def _with_values(
    stored: Mapping[str, Any], schema: Mapping[str, Any], values: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a deployment's flow parameters with other values; texts get the types of its form."""
    if problems := unknown_options(options, "form"):
        raise ParameterError("The deployment can't run", problems)
    shown = form_options_of(schema)
    if hidden := [name for name in options if shown is not None and name not in shown]:
        fix = "deploy it again with it: form_options=[…], or --form-option on the command line"
        problems = [
            Problem("the deployment's form does not have this run option", parameter=name, fix=fix) for name in hidden
        ]
        raise ParameterError("The deployment can't run", problems)
    form = schema.get("properties", {}).get("parameters", {})
    declared = form.get("properties", {})
    # A deployment that was made from the flow's signature, by prefect.yaml for example, declares no parameters.
    open_form = form.get("additionalProperties") is not False
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in stored.items()}
    for name, value in values.items():
        field_name = "parameters" if name in declared or open_form else "extra_parameters"
        typed = value_for_schema(declared.get(name, {}), value)
        result[field_name] = {**(result.get(field_name) or {}), name: typed}
    return {**result, **options}


def deploy(  # noqa: D417 - the run options are listed with run()
    uri: str | Path,
    entry_point: str = "main",
    name: str | None = None,
    work_pool: str | None = None,
    *,
    cron: str | None = None,
    interval: float | timedelta | None = None,
    rrule: str | None = None,
    timezone: str | None = None,
    pin: bool = False,
    tags: Sequence[str] = (),
    concurrency_limit: int | None = None,
    paused: bool = False,
    no_schedule: bool = False,
    job_variables: Mapping[str, Any] | None = None,
    form_options: Sequence[str] | None = None,
    announce: Callable[[str], None] | None = None,
    version: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    docker_args: Mapping[str, Any] | None = None,
    experiment_name: str | None = None,
    experiment_id: str | int | None = None,
    backend: str = "local",
    backend_config: Mapping[str, Any] | str | None = None,
    storage_dir: str | Path | None = None,
    run_id: str | None = None,
    run_name: str | None = None,
    env_manager: str | None = None,
    build_image: bool = False,
    timeout: float | None = None,
    retries: int = 0,
    git_credentials: str | None = None,
    tracking: str | None = None,
) -> Deployment:
    """Deploys a project: its runs start from a typed form in Prefect's UI, by a schedule, or by ``Deployment.run``.

    The project is fetched and checked now. Deploying again under the same name updates the deployment and its form; schedule,
    tags, work pool, limit and job variables that are not named stay, and what was paused stays paused.

    The arguments from ``version`` to ``tracking`` are run options, with the meaning that they have for ``run()``: its runs
    use them unless one is started with others. Everything is stored on the Prefect server, so secrets are refused: keep them
    in blocks.

    Args:
        uri: Project folder or URI, which the workers must be able to reach; ``block://NAME`` for a project block, which the
            runs follow.
        entry_point: Entry point, or the name of a .py, .sh or .R file of the project.
        name: Name of the deployment. Default: the project's, followed by the entry point's unless that is ``main``.
        work_pool: Work pool of any type. Default: the process pool ``mlprojects``, which is created if it does not exist.
        cron: Schedule by a cron expression.
        interval: Schedule by an interval, in seconds or as a ``timedelta``.
        rrule: Schedule by a recurrence rule (RFC 5545).
        timezone: Time zone of the schedule. Default: UTC.
        pin: Stay at the commit that ``version`` resolves to now.
        tags: Tags of the deployment, its flow runs and their MLflow runs: ``NAME`` or ``NAME=VALUE``.
        concurrency_limit: Maximum number of concurrent runs. Default: no limit.
        paused: Create the schedule paused.
        no_schedule: Remove the schedule of an existing deployment.
        job_variables: Overrides for the work pool's base job template: ``{"image": …}`` on a ``docker`` or ``kubernetes``
            pool, ``{"pip_packages": ["prefect-mlprojects"]}`` on a managed one.
        form_options: Run options that the form has, and that whoever starts runs may set; ``["all"]`` for all. Default: what
            the deployment has; for a new one all but ``backend``, ``backend_config``, ``docker_args``, ``version``, ``tracking``.
        announce: Receives lines about a server that is being started. Default: they are printed to stderr.

    Raises:
        ExecutionException: The project can't be fetched, or the deployment does not fit it.
        PrefectServerError: The Prefect server can't be reached, or refused.
    """
    arguments = dict(locals())
    timing = [arguments.pop(each) for each in ("cron", "interval", "rrule", "timezone")]
    del arguments["work_pool"]
    try:
        return create_deployment(specify(**arguments, schedule=make_schedule(*timing)), work_pool, announce)
    except ExecutionException as error:
        # The frames of this package and of Prefect would only bury the message.
        raise error.with_traceback(None) from None


def create_deployment(
    specification: DeploymentSpecification, work_pool: str | None, announce: Callable[[str], None] | None = None
) -> Deployment:
    """Creates a deployment, or updates the one of its name."""
    from prefect_mlprojects.server.process import resolve_api

    address = resolve_api(announce)
    deployment_id, pool, update = call_api(address.api_url, _create, specification, work_pool)
    url = f"{address.ui_url.rstrip('/')}/deployments/deployment/{deployment_id}" if address.ui_url else None
    return Deployment(
        deployment_id, specification.name, pool, url, specification, tuple(update.changes()), update.schedule_text()
    )


async def _create(
    client: PrefectClient, specification: DeploymentSpecification, pool: str | None
) -> tuple[str, str, Update]:
    update = await read_update(client, specification)
    if pool is None and update.existing is not None:
        pool = update.existing.work_pool_name
    work_pool = await ensure_work_pool(client, pool)
    flow_id = await client.create_flow_from_name(FLOW_NAME)
    deployment_id = await client.create_deployment(
        flow_id,
        specification.name,
        **update.settings,
        work_pool_name=work_pool.name,
        entrypoint=ENTRYPOINT,
        parameter_openapi_schema=update.schema,
        pull_steps=[],
        job_variables={**default_job_variables(work_pool), **update.job_variables},
    )
    await ensure_zombie_automation(client)
    return str(deployment_id), work_pool.name, update


async def _start(
    client: PrefectClient, deployment_id: UUID, headline: str, parameters: dict[str, Any], tags: Sequence[str]
) -> str:
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        flow_run = await client.create_flow_run_from_deployment(deployment_id, parameters=parameters, tags=tags)
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 409:
            raise
        raise ParameterError(headline, [Problem(redact(str(error.response.json().get("detail", ""))))]) from None
    return str(flow_run.id)


def serve(specifications: Sequence[DeploymentSpecification], *, limit: int | None = None) -> None:
    """Creates deployments and executes their runs in this process until it is interrupted.

    `limit` is the maximum number of concurrent runs (None: Prefect's default).
    """
    from prefect_mlprojects.server.process import resolve_api

    address = resolve_api()
    from prefect import serve as serve_deployments

    call_api(address.api_url, ensure_zombie_automation)
    updates = [call_api(address.api_url, read_update, each) for each in specifications]
    # The runs' processes start in temporary folders, where MLflow's default store would be lost.
    os.environ.setdefault("MLFLOW_TRACKING_URI", reveal(resolve_tracking_uri()))
    with use_api(address.api_url):
        serve_deployments(*[_runner_deployment(each) for each in updates], limit=limit)


def _runner_deployment(update: Update) -> Any:
    from prefect.types.entrypoint import EntrypointType

    from prefect_mlprojects.flows.run_project import run_project
    from prefect_mlprojects.server.compat import set_parameter_schema

    settings = {**update.settings, "schedules": update.settings["schedules"] or None}
    deployment: Any = run_project.to_deployment(
        name=update.specification.name, **settings, entrypoint_type=EntrypointType.MODULE_PATH
    )
    set_parameter_schema(deployment, update.schema)
    return deployment


def list_deployments(api_url: str) -> list[dict[str, Any]]:
    """Returns name, ID, work pool, schedule and pause of each deployment of projects, by name."""

    async def read(client: PrefectClient) -> list[Any]:
        from prefect.client.schemas.filters import FlowFilter, FlowFilterName

        return await read_all(client.read_deployments, flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW_NAME])))

    return [
        {
            "name": each.name,
            "id": str(each.id),
            "work_pool": each.work_pool_name,
            "schedule": ", ".join(schedule_texts(each.schedules)) or None,
            "paused": each.paused or bool(each.schedules and not any(one.active for one in each.schedules)),
        }
        for each in sorted(call_api(api_url, read), key=lambda each: str(each.name))
    ]


def change_deployment(api_url: str, name: str, action: Literal["pause", "resume", "delete"]) -> None:
    """Pauses, resumes or deletes a deployment; resuming includes its paused schedules."""
    headline = f"The deployment {full_name(name)} can't be changed"
    found = _existing(api_url, name, headline, "`mlprojects deployments list` shows all")

    async def change(client: PrefectClient) -> None:
        await getattr(client, f"{action}_deployment")(found.id)
        for schedule in found.schedules if action == "resume" else ():
            if not schedule.active:
                await client.update_deployment_schedule(found.id, schedule.id, active=True)

    call_api(api_url, change)
