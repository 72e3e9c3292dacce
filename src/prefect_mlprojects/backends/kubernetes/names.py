"""Names and labels that Kubernetes accepts, from names that it would not; pure.

The rules: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and .../labels/
"""

from __future__ import annotations

import hashlib
import re

from prefect_mlprojects.backends.contract import RunIdentity

PREFIX = "prefect-mlprojects"

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
FLOW_RUN_LABEL = f"{PREFIX}/flow-run-id"
MLFLOW_RUN_LABEL = f"{PREFIX}/mlflow-run-id"
PROJECT_LABEL = f"{PREFIX}/project"
ENTRY_POINT_LABEL = f"{PREFIX}/entry-point"
ATTEMPT_LABEL = f"{PREFIX}/attempt"
ENDED_LABEL = f"{PREFIX}/ended"
"""Set once somebody has seen the Job's end; a Job with it is never attached to again."""

PREPARING_ANNOTATION = f"{PREFIX}/preparing"
"""Set while the Job is suspended because its Secret and ConfigMap are still being made."""
WATCHED_ANNOTATION = f"{PREFIX}/watched-at"
"""When somebody last watched the Job, RFC 3339."""
PROJECT_ANNOTATION = f"{PREFIX}/project-name"
ENTRY_POINT_ANNOTATION = f"{PREFIX}/entry-point-name"
SOURCE_ANNOTATION = f"{PREFIX}/source"
DELIVERY_ANNOTATION = f"{PREFIX}/code-delivery"
FLOW_RUN_URL_ANNOTATION = f"{PREFIX}/flow-run-url"
MLFLOW_RUN_URL_ANNOTATION = f"{PREFIX}/mlflow-run-url"

_MAX_NAME = 52
# A Job's name becomes a label of its pods (63), and their names add "-xxxxx"; the rest is room for our Secrets' endings.


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def job_name(identity: RunIdentity, attempt: int = 1) -> str:
    """Returns the name of a run's Job: a DNS-1123 label, the same for the same flow run and attempt.

    Args:
        identity: Who the run is.
        attempt: Which of the flow run's Jobs it is, counted from 1.
    """
    digest = hashlib.sha256(f"{identity.flow_run_id}/{attempt}".encode()).hexdigest()[:10]
    words = "-".join(filter(None, (_plain(identity.project), _plain(identity.entry_point)))) or "project"
    if not words[0].isalpha():
        words = f"p-{words}"
    return f"{words[: _MAX_NAME - len(digest) - 1].rstrip('-')}-{digest}"


def label_value(text: str) -> str:
    """Returns a text as a label's value: at most 63 letters, digits, ``-``, ``_`` and ``.``, which may not begin or end it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("-_.")


def run_labels(identity: RunIdentity, attempt: int) -> dict[str, str]:
    """Returns the labels by which a run's objects are found.

    Args:
        identity: Who the run is.
        attempt: Which of the flow run's Jobs it is, counted from 1.
    """
    return {
        MANAGED_BY_LABEL: PREFIX,
        FLOW_RUN_LABEL: label_value(identity.flow_run_id),
        MLFLOW_RUN_LABEL: label_value(identity.mlflow_run_id),
        PROJECT_LABEL: label_value(identity.project),
        ENTRY_POINT_LABEL: label_value(identity.entry_point),
        ATTEMPT_LABEL: str(attempt),
    }


def flow_run_selector(flow_run_id: str) -> str:
    """Returns the label selector that finds a flow run's Jobs."""
    return f"{MANAGED_BY_LABEL}={PREFIX},{FLOW_RUN_LABEL}={label_value(flow_run_id)}"


def pod_selector(flow_run_id: str, attempt: str) -> str:
    """Returns the label selector that finds the pods of one of a flow run's Jobs."""
    return f"{FLOW_RUN_LABEL}={label_value(flow_run_id)},{ATTEMPT_LABEL}={attempt}"
