"""Makes a run known: to Prefect by name, labels and artifact, to MLflow by the changes that were not committed.

All of it happens beside the run's own work, and none of it can fail the run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.backends.contract import Preparation
from prefect_mlprojects.environments.base import PreparedEnvironment
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.runs.check import CheckedCall
from prefect_mlprojects.runs.handles import (
    BRANCH_LABEL,
    COMMIT_LABEL,
    EXPERIMENT_ID_LABEL,
    REPOSITORY_LABEL,
    RUN_ID_LABEL,
    TRACKING_URI_LABEL,
)
from prefect_mlprojects.tasks.run_artifact import RunArtifact, RunFacts
from prefect_mlprojects.tasks.session import RunSession
from prefect_mlprojects.tracking import TrackedRun

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

_logger = logging.getLogger(__name__)

PATCH_ARTIFACT = "source/uncommitted-changes.patch"


class RunAnnouncement:
    """What is told of one run.

    Args:
        flow_run: The flow run.
        client: Prefect's client, open as long as the flow runs.
        session: The run's companion.
        checked: The call.
        backend: The backend's name.
        tracked: The MLflow run.
        patch: The changes that were not committed; None for none.
    """

    def __init__(
        self,
        flow_run: FlowRun,
        client: Any,
        session: RunSession,
        checked: CheckedCall,
        backend: str,
        tracked: TrackedRun,
        patch: str | None,
    ) -> None:
        self._flow_run = flow_run
        self._client = client
        self._session = session
        self._tracked = tracked
        self._name = f"{checked.project.display_name}/{checked.entry_point.name}"
        self._labels = _labels(checked, tracked)
        self._artifact = RunArtifact(
            flow_run.id,
            RunFacts(
                project=checked.project.display_name,
                entry_point=checked.entry_point.name,
                working_copy=checked.backend_call.working_copy,
                parameters={**checked.parameters.declared, **checked.parameters.extra},
                backend=backend,
                tracked=tracked,
            ),
        )
        self._tasks = [
            asyncio.ensure_future(self._label()),
            asyncio.ensure_future(self._artifact.create(client)),
        ]
        if patch is not None:
            self._tasks.append(asyncio.ensure_future(asyncio.to_thread(self._keep_patch, patch)))

    async def end(self, status: str, message: str, environment: PreparedEnvironment | Preparation | None) -> None:
        """Tells how the run ended, once all that was begun is done.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            message: Why.
            environment: What the command ran in.
        """
        metrics = asyncio.ensure_future(asyncio.to_thread(self._metrics)) if status == "FINISHED" else None
        await asyncio.wait(self._tasks)
        await self._artifact.finish(
            self._client, _describe(environment), status, message, await metrics if metrics is not None else {}
        )

    async def _label(self) -> None:
        try:
            await self._client.update_flow_run_labels(self._flow_run.id, self._labels)
            if self._flow_run.name != self._name:
                await self._client.set_flow_run_name(self._flow_run.id, self._name)
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's name and labels could not be set: %s", error)

    def _keep_patch(self, patch: str) -> None:
        try:
            self._session.tracker.log_text(self._tracked, PATCH_ARTIFACT, patch)
        except TrackingError as error:
            _logger.warning("The uncommitted changes could not be kept with the run: %s", error)

    def _metrics(self) -> Mapping[str, float]:
        try:
            return self._session.tracker.metrics(self._tracked)
        except TrackingError as error:
            _logger.warning("The run's metrics could not be read: %s", error)
            return {}


def _labels(checked: CheckedCall, tracked: TrackedRun) -> dict[str, str]:
    copy = checked.backend_call.working_copy
    labels = {
        RUN_ID_LABEL: tracked.run_id,
        EXPERIMENT_ID_LABEL: tracked.experiment_id,
        TRACKING_URI_LABEL: redact(tracked.tracking_uri),
        COMMIT_LABEL: copy.commit,
        BRANCH_LABEL: copy.branch,
        REPOSITORY_LABEL: copy.repository_url,
    }
    return {name: value for name, value in labels.items() if value}


def _describe(environment: PreparedEnvironment | Preparation | None) -> str:
    if isinstance(environment, Preparation):
        return environment.description
    return environment.plan.description if environment is not None else ""
