"""Publishes a run: to Prefect by name, labels and artifact, to MLflow by the uncommitted changes.

It runs beside the run's own work, and never fails the run.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prefect_mlprojects.backends.contract import AnyPrepared
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.runs.check import CheckedRun
from prefect_mlprojects.runs.handles import (
    BRANCH_LABEL,
    COMMIT_LABEL,
    EXPERIMENT_ID_LABEL,
    REPOSITORY_LABEL,
    RUN_ID_LABEL,
    TRACKING_URI_LABEL,
)
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tasks.session import RunSession
from prefect_mlprojects.tracking import TrackedRun, display_uri

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun


_logger = logging.getLogger(__name__)

PATCH_ARTIFACT = "source/uncommitted-changes.patch"


class RunAnnouncement:
    """Fields of a run that are published.

    Args:
        flow_run: The flow run.
        client: Prefect's client, open as long as the flow runs.
        session: The run's session.
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
        checked: CheckedRun,
        backend: str,
        tracked: TrackedRun,
        patch: str | None,
    ) -> None:
        self._flow_run = flow_run
        self._client = client
        self._session = session
        self._tracked = tracked
        self._name = checked.name
        self._labels = _labels(checked, tracked)
        self._artifact = RunArtifact(
            flow_run.id,
            RunFacts(
                project=checked.project.display_name,
                entry_point=checked.entry_point.name,
                working_copy=checked.backend_request.working_copy,
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

    async def end(self, status: str, message: str, prepared: AnyPrepared | None) -> None:
        """Publishes how the run ended, after everything begun before.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            message: Why.
            prepared: What the command ran in.
        """
        metrics = asyncio.ensure_future(asyncio.to_thread(self._metrics)) if status == "FINISHED" else None
        await asyncio.wait(self._tasks)
        description = prepared.description if prepared is not None else ""
        values = await metrics if metrics is not None else {}
        await self._artifact.finish(self._client, description, status, message, values)

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


def _labels(checked: CheckedRun, tracked: TrackedRun) -> dict[str, str]:
    copy = checked.backend_request.working_copy
    labels = {
        RUN_ID_LABEL: tracked.run_id,
        EXPERIMENT_ID_LABEL: tracked.experiment_id,
        TRACKING_URI_LABEL: display_uri(tracked.tracking_uri),
        COMMIT_LABEL: copy.commit,
        BRANCH_LABEL: copy.branch,
        REPOSITORY_LABEL: copy.repository_url,
    }
    return {name: value for name, value in labels.items() if value}


_MAX_VALUE_CHARACTERS = 300
_MAX_METRICS = 100


@dataclass(frozen=True)
class RunFacts:
    """Fields of the artifact.

    Attributes:
        project: The project's name.
        entry_point: The entry point's name.
        working_copy: The project's files.
        parameters: Values by parameter name.
        backend: The backend's name.
        tracked: The MLflow run.
        environment: What the command runs in, for people to read; empty while that is not known.
        status: ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``.
        message: Why it ended as it did; empty when it finished.
        metrics: The MLflow run's metrics, once it has finished.
    """

    project: str
    entry_point: str
    working_copy: WorkingCopy
    parameters: Mapping[str, str]
    backend: str
    tracked: TrackedRun
    environment: str = ""
    status: str = "RUNNING"
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


def render(facts: RunFacts) -> str:
    """Returns the artifact's markdown."""
    copy, tracked = facts.working_copy, facts.tracked
    rows = {
        "Status": f"**{facts.status}**",
        "Project": code(copy.source_name),
        "Version": _version(copy),
        "Entry point": code(facts.entry_point),
        "Environment": escape(facts.environment) or "being prepared",
        "Backend": escape(facts.backend),
        "MLflow run": f"[{tracked.run_id}]({tracked.url})" if tracked.url else code(tracked.run_id),
        "MLflow experiment": code(tracked.experiment_id),
        "Tracking": code(display_uri(tracked.tracking_uri)),
    }
    parts = [f"# {escape(facts.project)} / {escape(facts.entry_point)}", _table(("", ""), rows)]
    if facts.message:
        parts.append(_fenced("Why it ended", facts.message))
    if facts.parameters:
        values = {code(name): code(value) for name, value in facts.parameters.items()}
        parts.append("## Parameters\n\n" + _table(("Parameter", "Value"), values))
    if facts.metrics:
        shown = {code(name): f"{value:g}" for name, value in list(facts.metrics.items())[:_MAX_METRICS]}
        parts.append("## Metrics\n\n" + _table(("Metric", "Value"), shown))
    return "\n\n".join(parts) + "\n"


def code(text: str) -> str:
    """Returns a text as markdown code of one line that shows it as it is, also in a table."""
    text = text if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "…"
    text = re.sub(r"\s", " ", text)
    fence = _fence(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    escaped = text.replace("|", "\\|")
    return f"{fence}{space}{escaped}{space}{fence}"


def escape(text: str) -> str:
    """Returns a text that markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", text)


def _fenced(title: str, text: str) -> str:
    fence = _fence(text, 3)
    return f"## {title}\n\n{fence}text\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def _version(copy: WorkingCopy) -> str:
    if copy.commit is None:
        return "not under git"
    shown = f"`{copy.commit[:12]}`"
    link = commit_url(copy.repository_url, copy.commit)
    parts = [f"[{shown}]({link})" if link else shown]
    if copy.branch:
        parts.append(f"of {code(copy.branch)}")
    if copy.dirty:
        parts.append("with uncommitted changes")
    return " ".join(parts)


def commit_url(repository_url: str | None, commit: str) -> str | None:
    """Returns the page of a commit at the hosting services that have one; None for any other repository."""
    text = repository_url or ""
    scp = re.match(r"^[^@/\s]+@([^:/\s]+):(.+)$", text)
    parts = urlsplit(text)
    host, path = (scp[1], scp[2]) if scp else (parts.hostname or "", parts.path)
    path = path.strip("/").removesuffix(".git")
    kinds = {"github.com": "commit", "codeberg.org": "commit", "gitlab.com": "-/commit", "bitbucket.org": "commits"}
    return f"https://{host}/{path}/{kinds[host]}/{commit}" if host in kinds and path else None


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])


class RunArtifact:
    """The artifact on the server; failed writes are only logged."""

    def __init__(self, flow_run_id: UUID, facts: RunFacts) -> None:
        self._flow_run_id = flow_run_id
        self._facts = facts
        self._id: UUID | None = None

    async def create(self, client: PrefectClient) -> None:
        """Creates it."""
        from prefect.client.schemas.actions import ArtifactCreate

        # Prefect's rule for keys: lower case letters, digits and dashes.
        key = re.sub(r"[^a-z0-9]+", "-", f"{self._facts.project}-{self._facts.entry_point}".lower()).strip("-")
        try:
            artifact = await client.create_artifact(
                ArtifactCreate(
                    type="markdown",
                    key=key or "mlproject",
                    description=f"Run of {self._facts.project}/{self._facts.entry_point}",
                    data=render(self._facts),
                    flow_run_id=self._flow_run_id,
                )
            )
            self._id = artifact.id
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's artifact could not be made: %s", error)

    async def finish(
        self, client: PrefectClient, environment: str, status: str, message: str, metrics: Mapping[str, float]
    ) -> None:
        """Publishes how the run ended.

        Args:
            client: Prefect's client.
            environment: What the command ran in.
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            message: Why.
            metrics: The MLflow run's metrics.
        """
        from prefect.client.schemas.actions import ArtifactUpdate

        if self._id is None:
            return
        facts = replace(self._facts, environment=environment or "none", status=status, message=message, metrics=metrics)
        try:
            await client.update_artifact(self._id, ArtifactUpdate(data=render(facts)))
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's artifact could not be updated: %s", error)
