"""Publishes a run: its name, labels and artifact to Prefect, its uncommitted changes to MLflow.

This happens concurrently with the run's steps. Errors are logged and never fail the run.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.known_secrets import redact_known
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.backends.contract import AnyPrepared
from prefect_mlprojects.exceptions import TrackingError
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
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tasks.session import RunSession
from prefect_mlprojects.tracking import TrackedRun, display_uri, main_metric
from prefect_mlprojects.types import FailureCategory

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun


_logger = logging.getLogger(__name__)

PATCH_ARTIFACT = "source/uncommitted-changes.patch"


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
        self._tasks = [asyncio.ensure_future(self._set_labels()), asyncio.ensure_future(self._create_artifact())]
        if patch is not None:
            self._tasks.append(asyncio.ensure_future(asyncio.to_thread(self._log_patch, patch)))

    async def end(
        self, status: str, message: str, prepared: AnyPrepared | None, labels: Mapping[str, Any]
    ) -> Mapping[str, float]:
        """Publishes how the run ended, once everything before is published, and returns its metrics.

        The message is empty for a finished run; `labels` are those of its end.
        """
        metrics = asyncio.ensure_future(asyncio.to_thread(self._metrics)) if status == "FINISHED" else None
        await asyncio.wait(self._tasks)
        values = await metrics if metrics is not None else {}
        environment = (prepared.description if prepared is not None else "") or "none"
        main = main_metric(values)
        of_metric = {METRIC_LABEL: main[0], METRIC_VALUE_LABEL: f"{main[1]:.15g}"} if main is not None else {}
        known = {ENVIRONMENT_LABEL: environment} if prepared is not None else {}
        await asyncio.gather(
            set_labels(self._client, self._flow_run.id, {**labels, **known, **of_metric}),
            self._update_artifact(status, message, environment, values),
        )
        return values

    async def _update_artifact(self, status: str, message: str, environment: str, values: Mapping[str, float]) -> None:
        if self._artifact_id is None:
            return
        from prefect.client.schemas.actions import ArtifactUpdate

        try:
            text = render(self._checked, self._backend, self._tracked, environment, status, message, values)
            await self._client.update_artifact(self._artifact_id, ArtifactUpdate(data=text))
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's artifact could not be updated: %s", error)

    async def _create_artifact(self) -> None:
        from prefect.client.schemas.actions import ArtifactCreate

        # Prefect's rule for keys: lower case letters, digits and dashes.
        key = re.sub(r"[^a-z0-9]+", "-", self._checked.name.lower()).strip("-")
        try:
            new = ArtifactCreate(
                type="markdown",
                key=key or "mlproject",
                description=f"Run of {self._checked.name}",
                data=render(self._checked, self._backend, self._tracked),
                flow_run_id=self._flow_run.id,
            )
            self._artifact_id = (await self._client.create_artifact(new)).id
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's artifact could not be created: %s", error)

    async def _set_labels(self) -> None:
        try:
            await self._client.update_flow_run_labels(self._flow_run.id, _labels(self._checked, self._tracked))
            if self._flow_run.name != self._checked.name:
                await self._client.set_flow_run_name(self._flow_run.id, self._checked.name)
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's name and labels could not be set: %s", error)

    def _log_patch(self, patch: str) -> None:
        try:
            self._session.tracker.log_text(self._tracked, PATCH_ARTIFACT, redact_known(patch))
        except TrackingError as error:
            _logger.warning("The uncommitted changes could not be stored with the MLflow run: %s", error)

    def _metrics(self) -> Mapping[str, float]:
        try:
            return self._session.tracker.metrics(self._tracked)
        except TrackingError as error:
            _logger.warning("The run's metrics could not be read: %s", error)
            return {}


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


_MAX_VALUE_CHARACTERS = 300
_MAX_METRICS = 100


def render(
    checked: CheckedRun,
    backend: str,
    tracked: TrackedRun,
    environment: str = "",
    status: str = "RUNNING",
    message: str = "",
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Returns the artifact's markdown; the environment is empty until it is prepared."""
    copy, project, entry_point = (
        checked.backend_request.working_copy,
        checked.project.display_name,
        checked.entry_point.name,
    )
    parameters = {**checked.parameters.declared, **checked.parameters.extra}
    rows = {
        "Status": f"**{status}**",
        "Project": code(copy.source_name),
        "Version": _version(copy),
        "Entry point": code(entry_point),
        "Environment": escape(environment) or "being prepared",
        "Backend": escape(backend),
        "MLflow run": _run_link(tracked),
        "MLflow experiment": code(tracked.experiment_id),
        "Tracking": code(display_uri(tracked.tracking_uri)),
    }
    sections = [f"# {escape(project)} / {escape(entry_point)}", _table(("", ""), rows)]
    if message:
        sections.append(_fenced("Why it ended", message))
    if values := {code(name): code(value) for name, value in parameters.items()}:
        sections.append("## Parameters\n\n" + _table(("Parameter", "Value"), values))
    if metrics:
        shown = {code(name): f"{value:g}" for name, value in list(metrics.items())[:_MAX_METRICS]}
        sections.append("## Metrics\n\n" + _table(("Metric", "Value"), shown))
    return redact("\n\n".join(sections) + "\n")


def _run_link(tracked: TrackedRun) -> str:
    link = f"[{tracked.run_id}]({tracked.url})" if tracked.url else code(tracked.run_id)
    return f"{link} (served by {code(tracked.hint)})" if tracked.hint else link


def code(text: str) -> str:
    """Returns a text as inline markdown code on one line, which a table may contain."""
    text = text if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "…"
    text = re.sub(r"\s", " ", text)
    fence = _fence(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    escaped = text.replace("|", "\\|")
    return f"{fence}{space}{escaped}{space}{fence}"


def escape(text: str) -> str:
    """Escapes markdown's special characters."""
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
    branch = f" of {code(copy.branch)}" if copy.branch else ""
    return (f"[{shown}]({link})" if link else shown) + branch + (" with uncommitted changes" if copy.dirty else "")


def commit_url(repository_url: str | None, commit: str) -> str | None:
    """Returns the web page of a commit on a known hosting service; None for other repositories."""
    text = repository_url or ""
    scp = re.match(r"^[^@/\s]+@([^:/\s]+):(.+)$", text)
    parts = split_url(text)
    host, path = (scp[1], scp[2]) if scp else (parts.hostname or "", parts.path)
    path = path.strip("/").removesuffix(".git")
    kinds = {"github.com": "commit", "codeberg.org": "commit", "gitlab.com": "-/commit", "bitbucket.org": "commits"}
    return f"https://{host}/{path}/{kinds[host]}/{commit}" if host in kinds and path else None


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
