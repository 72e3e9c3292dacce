"""Retraining on an event, as docs/automations.md tells it."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from tests.services.waiting import wait_for

from prefect_mlprojects import deploy
from prefect_mlprojects.server.api import call_api

from .conftest import started

EMIT = """
import sys
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
emit_event("dataset.updated", resource={"prefect.resource.id": sys.argv[1], "word": sys.argv[2]})
EventsWorker.instance().drain()
"""


def test_event_starts_a_run_with_its_parameters(
    project: Path, pool: str, call: Callable[..., Any], prefect_server: Any, tmp_path: Path
) -> None:
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    made = deploy(project, work_pool=pool, parameters={"needed": 1}, env_manager="local")
    data_set = f"dataset.{uuid.uuid4().hex}"
    automation = AutomationCore(
        name=f"retrain {data_set}",
        trigger=EventTrigger(
            expect={"dataset.updated"},
            match=ResourceSpecification({"prefect.resource.id": data_set}),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            RunDeployment(
                source="selected",
                job_variables=None,
                deployment_id=UUID(made.id),
                parameters={
                    **made.specification.flow_parameters(),
                    "parameters": {
                        **made.specification.parameters,
                        "word": {"__prefect_kind": "jinja", "template": "{{ event.resource.word }}"},
                    },
                },
            )
        ],
    )

    async def create(client: Any) -> UUID:
        created: UUID = await client.create_automation(automation)
        return created

    automation_id = call_api(prefect_server.api_url, create)
    try:
        # The triggers service learns of a new automation by an event, a moment later.
        with started("worker", "--pool", pool, log=tmp_path / "worker.log"):

            def runs() -> Any:
                from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

                return call(
                    "read_flow_runs", deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[UUID(made.id)]))
                )

            subprocess.run([sys.executable, "-c", EMIT, data_set, "fresh"], check=True, timeout=120)
            (flow_run,) = wait_for(runs, "the run that the event starts")
            finished = wait_for(
                lambda: (state := call("read_flow_run", flow_run.id).state).is_final() and state, "its end"
            )
            assert finished.is_completed(), finished
        assert "got 0 fresh 1" in (tmp_path / "worker.log").read_text()
    finally:
        call("delete_automation", automation_id)
