"""The tags and parameters of a project's MLflow run: pure functions of the request."""

from __future__ import annotations

import getpass
import json
import logging
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.tracking.base import TrackingRequest

FLOW_RUN_ID_TAG = "prefect.flow_run_id"
FLOW_RUN_URL_TAG = "prefect.flow_run_url"
FAILURE_CATEGORY_TAG = "mlprojects.failure.category"
FAILURE_CAUSE_TAG = "mlprojects.failure.cause"

# Limits of MLflow, from mlflow/utils/validation.py (3.7 to 3.17).
MAX_KEY_LENGTH = 250
MAX_PARAMETER_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_BATCH_ENTRIES = 100
# A request may have a million bytes; the other half is room for the frame around the entries.
MAX_BATCH_BYTES = 500_000

_BAD_KEY_CHARACTERS = re.compile(r"[^/\w.\- :]")

_logger = logging.getLogger(__name__)


def project_tags(request: TrackingRequest) -> dict[str, str]:
    """Returns the tags that ``mlflow run`` gives a project's run, and Prefect's.

    The names are MLflow's (mlflow/utils/mlflow_tags.py), set as mlflow/projects/utils.py and backend/local.py set them.
    """
    copy = request.working_copy
    tags: dict[str, str | None] = {
        "mlflow.user": user_name(),
        "mlflow.source.name": redact(copy.source_name),
        "mlflow.source.type": "PROJECT",
        "mlflow.source.git.commit": copy.commit,
        "mlflow.source.git.branch": copy.branch if copy.commit else None,
        "mlflow.source.git.dirty": "true" if copy.dirty else None,
        "mlflow.source.git.repoURL": copy.repository_url,
        "mlflow.project.entryPoint": request.entry_point,
        "mlflow.project.backend": request.backend,
        "mlflow.project.env": None if request.environment == "local" else request.environment,
        "mlflow.parentRunId": request.parent_run_id,
        "mlflow.docker.image.uri": request.docker_image,
        FLOW_RUN_ID_TAG: request.flow_run_id,
        FLOW_RUN_URL_TAG: request.flow_run_url,
    }
    tags.update(request.tags)
    return fitting_tags({name: value for name, value in tags.items() if value is not None})


def failure_tags(category: str, cause: str) -> dict[str, str]:
    """Returns the tags that say why a run did not finish: its `FailureCategory`, and the cause in words."""
    return fitting_tags({FAILURE_CATEGORY_TAG: str(category), FAILURE_CAUSE_TAG: redact(cause)})


def user_name() -> str:
    """Returns the user's name, as MLflow finds it; ``unknown`` for a user that the system has no name for."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        return "unknown"


def fitting_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Returns the tags with names and values that MLflow can store."""
    return _fitting("tag", tags, MAX_TAG_LENGTH)


def fitting_parameters(parameters: Mapping[str, str]) -> dict[str, str]:
    """Returns the parameters with names and values that MLflow can store; changes are logged as warnings."""
    return _fitting("parameter", parameters, MAX_PARAMETER_LENGTH)


def batches(entries: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Divides tags or parameters into parts that MLflow takes in one request."""
    part: dict[str, str] = {}
    size = 0
    for name, value in entries.items():
        cost = len(json.dumps(name)) + len(json.dumps(value))
        if part and (len(part) == MAX_BATCH_ENTRIES or size + cost > MAX_BATCH_BYTES):
            yield part
            part, size = {}, 0
        part[name] = value
        size += cost
    if part:
        yield part


def _fitting(what: str, entries: Mapping[str, str], max_length: int) -> dict[str, str]:
    fitting: dict[str, str] = {}
    for name, value in entries.items():
        key = _fitting_key(name, taken=fitting.keys() | (entries.keys() - {name}))
        if key is None:
            _logger.warning("MLflow has no room for a %s named %r; it is not recorded.", what, name)
            continue
        if key != name:
            _logger.warning("MLflow does not allow the %s name %r; it is recorded as %r.", what, name, key)
        text = _storable(value)
        if len(text) > max_length:
            _logger.warning(
                "The %s %r has %d characters; MLflow records its first %d.", what, key, len(text), max_length
            )
        fitting[key] = text[:max_length]
    return fitting


def _fitting_key(name: str, taken: Iterable[str]) -> str | None:
    """The name, changed where MLflow forbids it: characters, length, and paths like ``a//b``."""
    key = _BAD_KEY_CHARACTERS.sub("_", name)[:MAX_KEY_LENGTH]
    if _reads_as_other_path(key):
        key = re.sub(r"[/.]", "_", key)
    if not key or _reads_as_other_path(key):
        return None
    return key if key == name or key not in taken else None


def _reads_as_other_path(key: str) -> bool:
    normal = posixpath.normpath(key)
    return normal != key or normal == "." or normal.startswith(("..", "/"))


def _storable(value: str) -> str:
    # Bytes that are no UTF-8 reach us as lone surrogates, which no store takes; PostgreSQL refuses NUL.
    return value.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
