"""What a deployment needs and changes on the Prefect server: schedules, a work pool, and an automation for dead runs.

A run whose process dies sends no more of the heartbeat events that Prefect's flows send every
``PREFECT_FLOWS_HEARTBEAT_FREQUENCY`` seconds. The automation marks it as crashed; it follows
https://docs.prefect.io/v3/advanced/detect-zombie-flows, for this package's flow only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from prefect_mlprojects.deployments.form import default_form_options, form_options_of, narrow_form
from prefect_mlprojects.deployments.specification import DeploymentSpecification, Schedule, refused
from prefect_mlprojects.request import FLOW_NAME

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.events.schemas.automations import AutomationCore

AUTOMATION_NAME = "prefect-mlprojects: runs without a heartbeat have crashed"
HEARTBEAT_SECONDS = 60
"""Interval of the heartbeats of runs on our own workers."""
SILENCE_SECONDS = 600
"""How long a run may send no heartbeat: more than three of Prefect's default intervals of 180 seconds."""

_FINAL_EVENTS = ("Completed", "Failed", "Cancelled", "Crashed", "Cancelling")


def make_schedule(
    cron: str | None, interval: float | timedelta | None, rrule: str | None, timezone: str | None
) -> Schedule | None:
    """Returns the schedule; None if all arguments are None. Raises `ParameterError` if Prefect would not accept it."""
    given = [name for name, value in (("cron", cron), ("interval", interval), ("rrule", rrule)) if value is not None]
    if isinstance(interval, int | float):
        interval = timedelta(seconds=interval)
    schedule = Schedule(cron, interval, rrule, timezone)
    if len(given) > 1:
        raise refused(f"give only one of {' and '.join(given)}", given[0])
    if timezone is not None and not given:
        raise refused("a time zone needs a schedule", "timezone", "give cron, interval or rrule, too")
    if interval is not None and interval <= timedelta():
        raise refused(
            f"the interval must be a positive number of seconds, not {interval.total_seconds():g}", "interval"
        )
    if given and (reason := _why_invalid(schedule)):
        raise refused(f"the schedule {schedule} is not valid: {reason}", given[0])
    return schedule if given else None


def _why_invalid(schedule: Schedule) -> str | None:
    try:
        return None if next_times(schedule, 1) else "it never fires"
    except ValueError as error:
        details = getattr(error, "errors", None)
        return "; ".join(str(each["msg"]) for each in details()) if callable(details) else str(error)


def prefect_schedule(schedule: Schedule) -> Any:
    """Returns a schedule as Prefect's type; raises `ValueError` if Prefect does not accept it."""
    from prefect.client.schemas.schedules import construct_schedule

    return construct_schedule(
        cron=schedule.cron, interval=schedule.interval, rrule=schedule.rrule, timezone=schedule.timezone or "UTC"
    )


def next_times(schedule: Schedule, count: int = 3) -> list[datetime]:
    """Returns the next times of a schedule in its time zone; raises `ValueError` if Prefect does not accept it."""
    from prefect_mlprojects._support.event_loop import background_loop
    from prefect_mlprojects.server.compat import schedule_dates

    return background_loop().run(schedule_dates(prefect_schedule(schedule), count))


@dataclass(frozen=True)
class Update:
    """A deployment's settings after it is deployed, as arguments of Prefect's functions; unnamed ones stay as they are."""

    specification: DeploymentSpecification
    existing: Any
    settings: dict[str, Any]
    job_variables: dict[str, Any]
    schema: dict[str, Any]

    def schedule_text(self) -> str | None:
        """Returns the schedule, and whether it is paused."""
        schedules, paused = self.settings["schedules"], self.settings["paused"]
        states = ["" if each.active and not paused else " (paused)" for each in schedules]
        return ", ".join(map("".join, zip(schedule_texts(schedules), states, strict=True))) or None

    def changes(self) -> list[str]:
        """Returns a line for each setting that changed, or was kept without being named."""
        existing, specification, new = self.existing, self.specification, self.settings
        if existing is None:
            return []
        schedules = schedule_texts(existing.schedules), schedule_texts(new["schedules"])
        limits = _limit_of(existing), new["concurrency_limit"]
        forms = form_options_of(existing.parameter_openapi_schema), form_options_of(self.schema)
        pairs: list[tuple[str, tuple[Any, Any], Any]] = [
            ("schedule", schedules, specification.schedule),
            ("tags", (sorted(existing.tags), sorted(new["tags"])), specification.tags),
            ("concurrency limit", limits, specification.concurrency_limit),
            ("version", (existing.version, specification.version), True),
            ("run options in the form", (_form_text(forms[0]), _form_text(forms[1])), True),
        ]
        lines = []
        for name, (before, after), named in pairs:
            if before != after:
                lines.append(f"{name}: {_shown(before)} -> {_shown(after)}")
            elif before and not named:
                lines.append(f"{name} kept: {_shown(before)}")
        if new["paused"] or not all(each.active for each in new["schedules"]):
            lines.append(f"still paused; resume it with `mlprojects deployments resume {specification.name}`")
        return lines


def _form_text(options: tuple[str, ...] | None) -> str:
    return "all" if options is None else ", ".join(options) or "none"


def _limit_of(deployment: Any) -> int | None:
    limit = getattr(deployment, "global_concurrency_limit", None)
    return limit.limit if limit is not None else None


def schedule_texts(schedules: Sequence[Any]) -> list[str]:
    """Returns a text for each of Prefect's schedules."""
    own = []
    for values in (each.schedule for each in schedules):
        timing = {name: getattr(values, name, None) for name in ("cron", "interval", "rrule")}
        own.append(str(Schedule(**timing, timezone=None if values.timezone == "UTC" else values.timezone)))
    return own


def _shown(value: Any) -> str:
    return (", ".join(value) if isinstance(value, list) else str(value or "")) or "none"


def full_name(name: str) -> str:
    """Returns ``flow/deployment``, as Prefect names a deployment, for a name with or without the flow's."""
    return name if "/" in name else f"{FLOW_NAME}/{name}"


async def find_deployment(client: PrefectClient, name: str) -> Any:
    """Returns a deployment as the Prefect server has it; None if it does not exist."""
    from prefect.exceptions import ObjectNotFound

    try:
        return await client.read_deployment_by_name(full_name(name))
    except ObjectNotFound:
        return None


async def read_update(client: PrefectClient, specification: DeploymentSpecification) -> Update:
    """Returns how deploying changes the deployment of this name, if it exists."""
    existing = await find_deployment(client, specification.name)
    tags, variables, paused = (existing.tags, existing.job_variables, existing.paused) if existing else ((), {}, False)
    settings = {
        "version": specification.version,
        "schedules": _schedules(specification, list(existing.schedules) if existing else []),
        "paused": specification.paused or bool(paused),
        "concurrency_limit": specification.concurrency_limit or _limit_of(existing),
        "tags": list(specification.tags or tags),
        "parameters": specification.flow_parameters(),
        "description": specification.description,
        "enforce_parameter_schema": True,
    }
    chosen = specification.form_options
    if chosen is None and existing:
        chosen = form_options_of(existing.parameter_openapi_schema)
    shown = default_form_options() if chosen is None else chosen
    schema = narrow_form(specification.schema, shown, specification.options)
    return Update(specification, existing, settings, dict(specification.job_variables or variables or {}), schema)


def _schedules(specification: DeploymentSpecification, existing: list[Any]) -> list[Any]:
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    if specification.no_schedule:
        return []
    if specification.schedule is None:
        return [DeploymentScheduleCreate(schedule=each.schedule, active=each.active) for each in existing]
    # A schedule that an operator paused stays so.
    active = not specification.paused and (not existing or any(each.active for each in existing))
    return [DeploymentScheduleCreate(schedule=prefect_schedule(specification.schedule), active=active)]


async def ensure_zombie_automation(client: PrefectClient) -> None:
    """Creates the automation if it does not exist."""
    if not await client.read_automations_by_name(AUTOMATION_NAME):
        await client.create_automation(zombie_automation())


def zombie_automation(silence: float = SILENCE_SECONDS, flow_run: str = "*") -> AutomationCore:
    """Returns the automation for one flow run, or for all; `silence` is in seconds."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    return AutomationCore(
        name=AUTOMATION_NAME,
        description="Marks runs of run_project as crashed when they send no heartbeat any more.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in _FINAL_EVENTS)},
            match=ResourceSpecification({"prefect.resource.id": f"prefect.flow-run.{flow_run}"}),
            match_related=ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": FLOW_NAME}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message="The run's process sends no heartbeat any more: it was killed, or its machine failed.",
                force=False,
            )
        ],
    )
