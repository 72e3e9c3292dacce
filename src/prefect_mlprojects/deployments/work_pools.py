"""What deployments need on the Prefect server: a work pool, and an automation that marks dead runs as crashed.

A run whose process dies sends no more of the heartbeat events that Prefect's flows send every
``PREFECT_FLOWS_HEARTBEAT_FREQUENCY`` seconds. The automation follows
https://docs.prefect.io/v3/advanced/detect-zombie-flows, for this package's flow only.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from prefect_mlprojects.exceptions import InvalidInputError
from prefect_mlprojects.runs.request import FLOW_NAME

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import WorkPool

DEFAULT_WORK_POOL = "mlprojects"
AUTOMATION_NAME = "prefect-mlprojects: runs without a heartbeat have crashed"
HEARTBEAT_SECONDS = 60
"""Interval of the heartbeats of runs on our own workers."""
SILENCE_SECONDS = 600
"""How long a run may send no heartbeat: more than three of Prefect's default intervals of 180 seconds."""

_FINAL_EVENTS = ("Completed", "Failed", "Cancelled", "Crashed", "Cancelling")


def default_job_variables(pool: WorkPool) -> dict[str, Any]:
    """Returns overrides that our flow needs in a work pool's job template.

    Prefect copies the working directory before each run of a deployment without pull steps. A process worker starts runs in
    an empty one, but a container starts in its image's, which may be ``/``.
    """
    known = ((pool.base_job_template or {}).get("variables") or {}).get("properties") or {}
    if pool.type not in ("docker", "kubernetes") or "command" not in known:
        return {}
    return {"command": "sh -c 'cd \"$(mktemp -d)\" && exec prefect flow-run execute'"}


async def ensure_work_pool(client: PrefectClient, name: str | None, kind: str = "process") -> WorkPool:
    """Returns a work pool; creates the default one, of type `kind`, if it does not exist.

    Raises:
        InvalidInputError: No pool has that name.
    """
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.filters import WorkPoolFilter
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    wanted = name or DEFAULT_WORK_POOL
    try:
        return await client.read_work_pool(wanted)
    except ObjectNotFound:
        if name is not None and name != DEFAULT_WORK_POOL:
            known = [pool.name for pool in await client.read_work_pools(work_pool_filter=WorkPoolFilter())]
            raise InvalidInputError(
                f"No work pool {name!r} exists"
                + (f"; known: {', '.join(known)}" if known else "")
                + f". Create it with `prefect work-pool create {name} --type {kind}`."
            ) from None
        try:
            return await client.create_work_pool(
                WorkPoolCreate(name=wanted, type=kind, description="Runs of MLflow projects (prefect-mlprojects).")
            )
        except ObjectAlreadyExists:
            # Another process created it in the meantime.
            return await client.read_work_pool(wanted)


async def ensure_zombie_automation(client: PrefectClient, silence: float = SILENCE_SECONDS) -> None:
    """Creates the automation if it does not exist; `silence` is in seconds."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    if await client.read_automations_by_name(AUTOMATION_NAME):
        return
    await client.create_automation(
        AutomationCore(
            name=AUTOMATION_NAME,
            description="Marks runs of run_project as crashed when they send no heartbeat any more.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in _FINAL_EVENTS)},
                match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
                match_related=ResourceSpecification(
                    {"prefect.resource.role": "flow", "prefect.resource.name": FLOW_NAME}
                ),
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
    )
