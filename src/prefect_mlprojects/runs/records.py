"""Flow runs of projects as the Prefect server has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret
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
    RUN_ID_LABEL,
    TRACKING_URI_LABEL,
)
from prefect_mlprojects.tracking.uris import run_page
from prefect_mlprojects.types import RunStatus

STATUS_BY_STATE_TYPE: Mapping[str, RunStatus] = {
    "SCHEDULED": "RUNNING",
    "PENDING": "RUNNING",
    "RUNNING": "RUNNING",
    "PAUSED": "RUNNING",
    "CANCELLING": "RUNNING",
    "COMPLETED": "FINISHED",
    "FAILED": "FAILED",
    "CRASHED": "FAILED",
    "CANCELLED": "KILLED",
}

_PLAIN_STATES = ("Running", "Completed", "Failed", "Cancelled")
"""Prefect's states that say no more than the run's status."""


@dataclass(frozen=True)
class RunRecord:
    """A flow run.

    Attributes:
        name: ``project/entry_point``; another name if the run has not begun.
        state: The name of its Prefect state.
        message: The message of its state: why a run ended.
        request: The parameters of the flow: what was asked for.
        labels: The labels of the flow run.
        created: When it was created, or scheduled to start.
        started: When it began; None before.
        ended: When it ended; None before.
    """

    id: str
    name: str
    status: RunStatus
    state: str
    message: str
    request: Mapping[str, Any] = field(repr=False)
    labels: Mapping[str, Any] = field(repr=False)
    tags: tuple[str, ...]
    created: datetime
    started: datetime | None
    ended: datetime | None
    deployment_id: str | None
    work_pool: str | None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunRecord:
        """Returns the flow run in an answer of Prefect's API."""
        state = data.get("state") or {}
        return cls(
            id=str(data["id"]),
            name=str(data.get("name") or ""),
            status=STATUS_BY_STATE_TYPE.get(str(data.get("state_type")), "RUNNING"),
            state=str(data.get("state_name") or ""),
            message=str(state.get("message") or ""),
            request=data.get("parameters") or {},
            labels=data.get("labels") or {},
            tags=tuple(data.get("tags") or ()),
            created=_time(data.get("expected_start_time")) or _time(data["created"]) or datetime.now(timezone.utc),
            started=_time(data.get("start_time")),
            ended=_time(data.get("end_time")),
            deployment_id=data.get("deployment_id"),
            work_pool=data.get("work_pool_name"),
        )

    @property
    def state_detail(self) -> str:
        """The name of its Prefect state where that says more than the status; else empty."""
        return "" if self.state in _PLAIN_STATES else self.state

    @property
    def shown_status(self) -> str:
        """Its status, with Prefect's state in parentheses where that says more."""
        return f"{self.status} ({self.state_detail})" if self.state_detail else self.status

    def mlflow_page(self) -> tuple[str | None, str | None]:
        """Returns the link of the MLflow run's page, and the command that serves it if no MLflow server does."""
        uri, run_id = self.labels.get(TRACKING_URI_LABEL), self.labels.get(RUN_ID_LABEL)
        if not uri or not run_id:
            return None, None
        return run_page(Secret(str(uri)), str(self.labels.get(EXPERIMENT_ID_LABEL) or "0"), str(run_id))

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameter values that it was started with, without the project's defaults."""
        return {**(self.request.get("parameters") or {}), **(self.request.get("extra_parameters") or {})}

    @property
    def duration(self) -> float | None:
        """Seconds from its beginning to its end, or until now; None before it has begun."""
        if self.started is None:
            return None
        return max(0.0, ((self.ended or datetime.now(timezone.utc)) - self.started).total_seconds())

    @property
    def metric(self) -> tuple[str, float] | None:
        """Name and last value of its main metric; None if it has none, or has not finished."""
        name, value = self.labels.get(METRIC_LABEL), self.labels.get(METRIC_VALUE_LABEL)
        try:
            return None if name is None or value is None else (str(name), float(value))
        except ValueError:
            return None

    def as_json(self, url: str | None) -> dict[str, Any]:
        """Returns its facts as JSON data; `url` is its page in Prefect's UI."""
        labels = self.labels
        return {
            "flow_run_id": self.id,
            "name": self.name,
            "status": self.status,
            "state": self.state,
            "message": self.message,
            "category": labels.get(CATEGORY_LABEL),
            "cause": labels.get(CAUSE_LABEL),
            "exit_code": labels.get(EXIT_CODE_LABEL),
            "created": self.created.isoformat(),
            "started": self.started.isoformat() if self.started else None,
            "ended": self.ended.isoformat() if self.ended else None,
            "duration": self.duration,
            "uri": redact(str(self.request.get("uri") or "")) or None,
            "entry_point": self.request.get("entry_point"),
            "parameters": self.parameters,
            "version": self.request.get("version"),
            "commit": labels.get(COMMIT_LABEL),
            "branch": labels.get(BRANCH_LABEL),
            "backend": self.request.get("backend"),
            "environment": labels.get(ENVIRONMENT_LABEL),
            "metric": None if self.metric is None else {"name": self.metric[0], "value": self.metric[1]},
            "run_id": labels.get(RUN_ID_LABEL),
            "experiment_id": labels.get(EXPERIMENT_ID_LABEL),
            "tracking_uri": labels.get(TRACKING_URI_LABEL),
            "flow_run_url": url,
            "deployment_id": self.deployment_id,
            "work_pool": self.work_pool,
            "tags": list(self.tags),
        }


def _time(text: str | None) -> datetime | None:
    if not text:
        return None
    # Python 3.10 reads neither "Z" nor fractions of other than 3 or 6 digits.
    head, _, fraction = text.replace("Z", "+00:00").partition(".")
    if not fraction:
        return datetime.fromisoformat(head)
    digits, sign, zone = fraction.partition("+" if "+" in fraction else "-")
    return datetime.fromisoformat(f"{head}.{digits[:6]:0<6}{sign}{zone}")
