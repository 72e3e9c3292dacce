"""Publishes a run: its name, labels and artifact to Prefect, its uncommitted changes to MLflow.

This happens concurrently with the run's steps. Errors are logged and never fail the run.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from prefect_mlprojects._support.known_secrets import redact_known
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.flows.card import MetricHistory, RunFacts, render
from prefect_mlprojects.request import (
    BRANCH_LABEL,
    CATEGORY_LABEL,
    CAUSE_LABEL,
    COMMIT_LABEL,
    ENVIRONMENT_LABEL,
    EXIT_CODE_LABEL,
    EXPERIMENT_ID_LABEL,
    METRIC_LABEL,
    METRIC_VALUE_LABEL,
    REPOSITORY_LABEL,
    RUN_ID_LABEL,
    SECRETS_LABEL,
    SOURCE_LABEL,
    TRACKING_URI_LABEL,
)
from prefect_mlprojects.request.check import CheckedRun, RunSecrets
from prefect_mlprojects.request.tags import automatic_tags, mlflow_tags
from prefect_mlprojects.tasks.session import RunSession
from prefect_mlprojects.tracking import TrackedRun, display_uri, main_metric
from prefect_mlprojects.tracking.records import storable
from prefect_mlprojects.types import FailureCategory

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun


_logger = logging.getLogger(__name__)

PATCH_ARTIFACT = "source/uncommitted-changes.patch"
_HISTORY_SECONDS = 5.0

_T = TypeVar("_T")


class RunAnnouncement:
    """What is published about one run; `patch` is its uncommitted changes, None for none."""

    def __init__(
        self,
        flow_run: FlowRun,
        client: PrefectClient,
        session: RunSession,
        checked: CheckedRun,
        backend: str,
        tracked: TrackedRun,
        patch: str | None,
    ) -> None:
        self._flow_run = flow_run
        self._client = client
        self._session = session
        self._checked = checked
        self._backend = backend
        self._tracked = tracked
        self._artifact_id: UUID | None = None
        self._experiment = ""
        self._tasks = [asyncio.ensure_future(self._set_labels()), asyncio.ensure_future(self._create_artifact())]
        if checked.backend.tracks_runs:
            # Other runs get them when they are created.
            self._tasks.append(asyncio.ensure_future(asyncio.to_thread(self._tag_mlflow_run)))
        if patch is not None:
            self._tasks.append(asyncio.ensure_future(asyncio.to_thread(self._log_patch, patch)))

    async def end(self, facts: RunFacts, labels: Mapping[str, Any]) -> Mapping[str, float]:
        """Publishes how the run ended, once everything before is published, and returns its metrics.

        `facts` have no metrics yet; `labels` are those of its end.
        """
        metrics = asyncio.ensure_future(asyncio.to_thread(self._metrics)) if facts.status == "FINISHED" else None
        await asyncio.wait(self._tasks)
        values = await metrics if metrics is not None else {}
        main = main_metric(values)
        of_metric = {METRIC_LABEL: main[0], METRIC_VALUE_LABEL: f"{main[1]:.15g}"} if main is not None else {}
        known = {ENVIRONMENT_LABEL: facts.environment} if facts.environment else {}
        await asyncio.gather(
            set_labels(self._client, self._flow_run.id, {**labels, **known, **of_metric}),
            self._update_artifact(replace(facts, metrics=values), None if main is None else main[0]),
        )
        return values

    async def _update_artifact(self, facts: RunFacts, main: str | None) -> None:
        if self._artifact_id is None:
            return
        from prefect.client.schemas.actions import ArtifactUpdate

        try:
            history = None if main is None else await asyncio.wait_for(self._history(main), _HISTORY_SECONDS)
        except asyncio.TimeoutError:
            history = None
        known = replace(facts, environment=facts.environment or "none", experiment=self._experiment, history=history)
        try:
            text = render(self._checked, self._backend, self._tracked, known)
            await self._client.update_artifact(self._artifact_id, ArtifactUpdate(data=text))
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's artifact could not be updated: %s", error)

    async def _create_artifact(self) -> None:
        from prefect.client.schemas.actions import ArtifactCreate

        # Prefect's rule for keys: lower case letters, digits and dashes.
        key = re.sub(r"[^a-z0-9]+", "-", self._checked.name.lower()).strip("-")
        self._experiment = await asyncio.to_thread(self._read, "experiment", self._session.tracker.experiment_name, "")
        try:
            new = ArtifactCreate(
                type="markdown",
                key=key or "mlproject",
                description=f"Run of {self._checked.name}",
                data=render(self._checked, self._backend, self._tracked, RunFacts(experiment=self._experiment)),
                flow_run_id=self._flow_run.id,
            )
            self._artifact_id = (await self._client.create_artifact(new)).id
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's artifact could not be created: %s", error)

    async def _set_labels(self) -> None:
        try:
            await self._client.update_flow_run_labels(self._flow_run.id, _labels(self._checked, self._tracked))
            tags = list(dict.fromkeys([*self._flow_run.tags, *self._session.tags, *self._automatic_tags()]))
            if self._flow_run.name != self._checked.name or len(tags) > len(self._flow_run.tags):
                await self._client.update_flow_run(self._flow_run.id, name=self._checked.name, tags=tags)
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's name, labels and tags could not be set: %s", error)

    def _automatic_tags(self) -> tuple[str, ...]:
        return automatic_tags(self._checked.project.display_name, self._checked.entry_point.name, self._backend)

    def _tag_mlflow_run(self) -> None:
        try:
            tags = mlflow_tags([*self._flow_run.tags, *self._session.tags])
            self._session.tracker.set_tags(self._tracked, storable("tag", tags))
        except TrackingError as error:
            _logger.warning("The tags could not be stored with the MLflow run: %s", error)

    def _log_patch(self, patch: str) -> None:
        try:
            self._session.tracker.log_text(self._tracked, PATCH_ARTIFACT, redact_known(patch))
        except TrackingError as error:
            _logger.warning("The uncommitted changes could not be stored with the MLflow run: %s", error)

    def _metrics(self) -> Mapping[str, float]:
        return self._read("metrics", self._session.tracker.metrics, {})

    async def _history(self, name: str) -> MetricHistory | None:
        read = partial(self._session.tracker.metric_history, name=name)
        return MetricHistory.of(name, await asyncio.to_thread(self._read, "metrics' history", read, []))

    def _read(self, what: str, read: Callable[[TrackedRun], _T], default: _T) -> _T:
        try:
            return read(self._tracked)
        except TrackingError as error:
            _logger.warning("The run's %s could not be read: %s", what, error)
            return default


async def set_labels(client: PrefectClient, flow_run_id: UUID, labels: Mapping[str, Any]) -> None:
    """Adds labels to a flow run; an error is logged."""
    if not labels:
        return
    try:
        await client.update_flow_run_labels(flow_run_id, dict(labels))
    except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
        _logger.warning("The flow run's labels could not be set: %s", error)


def end_labels(
    category: FailureCategory | None, cause: str, exit_code: int | None, secrets: RunSecrets
) -> dict[str, Any]:
    """Returns the labels that say how a run ended, and what of its request was kept in memory; no category: it finished."""
    labels = {
        CATEGORY_LABEL: str(category) if category is not None else None,
        CAUSE_LABEL: redact_known(cause) if category is not None else None,
        EXIT_CODE_LABEL: exit_code,
        SECRETS_LABEL: ", ".join(name for name in ("uri", "docker_auth") if getattr(secrets, name)),
    }
    return {name: value for name, value in labels.items() if value not in (None, "")}


def _labels(checked: CheckedRun, tracked: TrackedRun) -> dict[str, Any]:
    copy = checked.backend_request.working_copy
    labels = {
        RUN_ID_LABEL: tracked.run_id,
        EXPERIMENT_ID_LABEL: tracked.experiment_id,
        TRACKING_URI_LABEL: display_uri(tracked.tracking_uri),
        COMMIT_LABEL: copy.commit,
        BRANCH_LABEL: copy.branch,
        REPOSITORY_LABEL: copy.repository_url,
        SOURCE_LABEL: copy.kind,
        ENVIRONMENT_LABEL: checked.environment_kind,
    }
    return {name: value for name, value in labels.items() if value}
