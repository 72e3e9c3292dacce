"""The MLflow run of a project run: what it is asked to be, and how it is left."""

from __future__ import annotations

import asyncio
import logging

from prefect.client.schemas.objects import FlowRun
from prefect.logging import get_run_logger
from prefect.utilities.urls import url_for

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.request import RUN_ID_LABEL, RunRequest
from prefect_mlprojects.request.check import CheckedRun
from prefect_mlprojects.request.tags import mlflow_tags
from prefect_mlprojects.spec.experiment import script_experiment
from prefect_mlprojects.spec.values import may_be_written_otherwise
from prefect_mlprojects.tasks.session import RunSession
from prefect_mlprojects.tracking import TrackedRun, TrackingRequest, failure_tags
from prefect_mlprojects.tracking.records import FinalStatus, run_description
from prefect_mlprojects.types import FailureCategory

_logger = logging.getLogger(__name__)

OUTPUT_ARTIFACT = "logs/stdout.txt"


def tracking_request(
    options: RunRequest, session: RunSession, checked: CheckedRun, flow_run: FlowRun
) -> TrackingRequest:
    """Returns the request for the MLflow run of a checked run; a retried flow run continues its earlier one."""
    declared, recorded = checked.entry_point.parameters, checked.parameters.recorded
    late = {name: text for name, text in recorded.items() if may_be_written_otherwise(declared.get(name), text)}
    earlier = (flow_run.labels or {}).get(RUN_ID_LABEL)
    return TrackingRequest(
        tracking_uri=checked.backend_request.tracking_uri,
        experiment_name=options.experiment_name,
        experiment_id=options.experiment_id,
        project_experiment=checked.project.experiment or script_experiment(checked.project, checked.entry_point),
        run_id=options.run_id or (earlier if isinstance(earlier, str) else None),
        run_name=options.run_name and redact(options.run_name),
        parent_run_id=session.parent_run_id,
        entry_point=checked.entry_point.name,
        working_copy=checked.backend_request.working_copy,
        environment=checked.environment_kind,
        backend=options.backend,
        parameters={name: text for name, text in recorded.items() if name not in late},
        late_parameters=late,
        flow_run_id=str(flow_run.id),
        flow_run_url=url_for("flow-run", obj_id=flow_run.id),
        tags=mlflow_tags([*flow_run.tags, *session.tags]),
    )


async def finish_tracked_run(
    session: RunSession,
    tracked: TrackedRun,
    flow_run: FlowRun,
    status: FinalStatus,
    message: str,
    failure: tuple[FailureCategory, str] | None,
    *,
    ends_itself: bool,
) -> None:
    """Stores the run's output, and ends the run unless its backend does (`ends_itself`); errors are logged."""
    output = await asyncio.to_thread(session.output_copy.text)
    stored = asyncio.ensure_future(asyncio.to_thread(_log_output, session, tracked, output))
    if not ends_itself:
        tags = failure_tags(*failure) if failure is not None else {}
        page = url_for("flow-run", obj_id=flow_run.id)
        description = run_description(str(flow_run.id), page, message)
        try:
            # One thread for all: it continues if this task is cancelled meanwhile.
            await asyncio.to_thread(session.tracker.finish, tracked, status, tags, description)
        except TrackingError as problem:
            get_run_logger().warning("The MLflow run could not be updated (status %s): %s", status, problem)
    await stored


def _log_output(session: RunSession, tracked: TrackedRun, output: str) -> None:
    try:
        if output:
            session.tracker.log_text(tracked, OUTPUT_ARTIFACT, output)
    except TrackingError as error:
        _logger.warning("The output could not be stored with the MLflow run: %s", error)
