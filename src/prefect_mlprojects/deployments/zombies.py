"""Flow runs whose process died without a word: an automation marks them as crashed.

Prefect's flows send a heartbeat event every ``PREFECT_FLOWS_HEARTBEAT_FREQUENCY`` seconds while they run. The automation follows
https://docs.prefect.io/v3/advanced/detect-zombie-flows, for this package's flow only.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from prefect_mlprojects.runs.request import FLOW_NAME

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

AUTOMATION_NAME = "prefect-mlprojects: runs without a heartbeat have crashed"
HEARTBEAT_SECONDS = 60
"""How often the runs on our own workers send a heartbeat."""
SILENCE_SECONDS = 600
"""How long a run may be silent: more than three of Prefect's default heartbeats of 180 seconds."""

_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Cancelling")


async def ensure_zombie_automation(client: PrefectClient, silence: float = SILENCE_SECONDS) -> None:
    """Makes the automation on the server, unless it is there.

    Args:
        client: Prefect's client.
        silence: Seconds without a heartbeat after which a run has crashed.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    if await client.read_automations_by_name(AUTOMATION_NAME):
        return
    await client.create_automation(
        AutomationCore(
            name=AUTOMATION_NAME,
            description="A run of run_project that sends no heartbeat any more lost its process: kill -9, or a dead machine.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in _ENDS)},
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
                    message="The run's process sends no heartbeat any more: it was killed, or its machine died.",
                    force=False,
                )
            ],
        )
    )
