"""MLflow runs as values: the request for one with its tags and parameters, and the tracked run with its child's variables."""

from __future__ import annotations

import getpass
import logging
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from prefect_mlprojects._support.redaction import redact, redact_url
from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.tracking import _mlflow_internals as internals
from prefect_mlprojects.tracking.uris import EXPERIMENT_ID_VARIABLE, RUN_ID_VARIABLE, TRACKING_URI_VARIABLE, display_uri

FinalStatus: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]
"""How an MLflow run can end; the names are MLflow's."""

FLOW_RUN_ID_TAG = "prefect.flow_run_id"

_BAD_KEY_CHARACTERS = re.compile(r"[^/\w.\- :]")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackingRequest:
    """The MLflow run that a project run asks for.

    Attributes:
        tracking_uri: Absolute.
        parameters: Declared (defaults included) and extra parameters as text, unquoted.
        late_parameters: Those that are logged when the run ends, unless the project's code has logged them: numbers that it may
            write otherwise (5 and 5.0), which MLflow takes for a change and refuses.
        experiment_name: Created if it does not exist. With neither name nor ID, MLflow's default is used:
            ``MLFLOW_EXPERIMENT_NAME``, then ``MLFLOW_EXPERIMENT_ID``, then `project_experiment`, then ``Default``.
        project_experiment: The experiment that the project chooses, by name.
        run_id: An existing run to continue; None creates a new one.
        tags: The user's tags.
        environment: An environment manager's name or ``docker``; ``local`` is not recorded, as in MLflow.
    """

    tracking_uri: Secret
    working_copy: WorkingCopy
    entry_point: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    late_parameters: Mapping[str, str] = field(default_factory=dict)
    experiment_name: str | None = None
    experiment_id: str | None = None
    project_experiment: str | None = None
    run_id: str | None = None
    run_name: str | None = None
    parent_run_id: str | None = None
    backend: str = "local"
    environment: str | None = None
    flow_run_id: str | None = None
    flow_run_url: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run.

    Attributes:
        url: The run's page in MLflow's UI; None when it is not known.
        hint: The command that serves the page ("mlprojects ui"); None when an MLflow server does.
        artifact_uri: Where its artifacts are stored; empty if unknown.
        late_parameters: Parameters to log at its end, unless its code has.
    """

    run_id: str
    experiment_id: str
    tracking_uri: Secret
    url: str | None = None
    hint: str | None = None
    run_name: str | None = None
    artifact_uri: str = field(default="", repr=False)
    late_parameters: Mapping[str, str] = field(default_factory=dict, repr=False)


def child_variables(run: TrackedRun) -> dict[str, Secret | str]:
    """Returns the variables by which MLflow in the child process finds the run, as ``mlflow run`` sets them.

    For a Databricks store they include the credentials of the profile in use; raises ``TrackingError`` without any.
    """
    variables: dict[str, Secret | str] = {
        RUN_ID_VARIABLE: run.run_id,
        TRACKING_URI_VARIABLE: run.tracking_uri,
        EXPERIMENT_ID_VARIABLE: run.experiment_id,
    }
    uri = reveal(run.tracking_uri)
    if uri.partition(":")[0] == "databricks":
        from mlflow.exceptions import MlflowException

        try:
            variables |= {name: Secret(value) for name, value in internals.databricks_variables(uri).items()}
        except MlflowException as error:
            raise TrackingError(str(error), tracking_uri=display_uri(run.tracking_uri)) from None
    return variables


def project_tags(request: TrackingRequest) -> dict[str, str]:
    """Returns the tags that ``mlflow run`` gives a project's run, Prefect's, and the user's.

    The names are MLflow's (mlflow/utils/mlflow_tags.py), set as mlflow/projects/utils.py and backend/local.py set them.
    """
    copy = request.working_copy
    tags: dict[str, str | None] = {
        "mlflow.user": user_name(),
        "mlflow.source.name": redact_url(copy.source_name),
        "mlflow.source.type": "PROJECT",
        "mlflow.source.git.commit": copy.commit,
        "mlflow.source.git.branch": copy.branch if copy.commit else None,
        "mlflow.source.git.dirty": "true" if copy.dirty else None,
        "mlflow.source.git.repoURL": copy.repository_url,
        "mlflow.project.entryPoint": request.entry_point,
        "mlflow.project.backend": request.backend,
        "mlflow.project.env": None if request.environment == "local" else request.environment,
        "mlflow.parentRunId": request.parent_run_id,
        FLOW_RUN_ID_TAG: request.flow_run_id,
        "prefect.flow_run_url": request.flow_run_url,
    }
    return storable("tag", {**request.tags, **{name: value for name, value in tags.items() if value is not None}})


def failure_tags(category: str, cause: str) -> dict[str, str]:
    """Returns the tags that say why a run did not finish: its `FailureCategory`, and the cause in words."""
    return storable("tag", {"mlprojects.failure.category": str(category), "mlprojects.failure.cause": redact(cause)})


_ADVICE = {
    "active experiment ID does not match environment run ID": (
        "The project's code sets another experiment than the run's, and MLflow can't move a run: name that experiment as "
        "'experiment:' in the MLproject file or as experiment_name, or remove set_experiment() from the code."
    ),
    "Changing param values is not allowed": (
        "The project's code logs a parameter of the run with another value: log it under another name. A number that the "
        "code logs in another spelling, such as 5.0 for 5, is no conflict if it is declared as float."
    ),
    "unsupported URI 'sqlite": (
        "The environment's mlflow-skinny can't write to a database: add sqlalchemy and alembic, or mlflow itself, to the "
        "environment, or set MLFLOW_TRACKING_URI to a tracking server."
    ),
}


def mlflow_advice(output_tail: Iterable[str]) -> str:
    """Returns advice on an error of MLflow in the project's code, if that is in the last output; else ""."""
    lines = list(output_tail)
    return next((advice for error, advice in _ADVICE.items() if any(error in line for line in lines)), "")


DESCRIPTION_TAG = "mlflow.note.content"
_OUR_DESCRIPTION = "<!-- by prefect-mlprojects -->"


def run_description(flow_run_id: str, flow_run_url: str | None, reason: str = "") -> str:
    """Returns a run's description in markdown: why it ended so, a link to its flow run, the command that repeats it."""
    link = f"[Flow run {flow_run_id}]({flow_run_url})" if flow_run_url else f"Flow run `{flow_run_id}`"
    fence = "`" * max(3, max((len(each) for each in re.findall("`+", reason)), default=0) + 1)
    sections = [f"{fence}text\n{redact(reason)}\n{fence}"] if reason else []
    return "\n\n".join([_OUR_DESCRIPTION, *sections, link, f"To run it again: `mlprojects rerun {flow_run_id}`"])


def is_our_description(text: str | None) -> bool:
    """Whether a description may be replaced: it is empty, or of an earlier attempt."""
    return not text or text.startswith(_OUR_DESCRIPTION)


def user_name() -> str:
    """Returns the user's name, as MLflow finds it; ``unknown`` if the system has no name for the user ID."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        return "unknown"


def storable(kind: Literal["tag", "parameter"], entries: Mapping[str, str]) -> dict[str, str]:
    """Returns tags or parameters with names and values that MLflow can store; changes are logged as warnings."""
    max_length = internals.MAX_TAG_LENGTH if kind == "tag" else internals.MAX_PARAMETER_LENGTH
    result: dict[str, str] = {}
    for name, value in entries.items():
        key = _storable_key(name, taken=result.keys() | (entries.keys() - {name}))
        if key is None:
            _logger.warning("MLflow can't store a %s named %r; it is not recorded.", kind, name)
            continue
        if key != name:
            _logger.warning("MLflow does not allow the %s name %r; it is recorded as %r.", kind, name, key)
        # Bytes that are not UTF-8 arrive as lone surrogates, which no store takes; PostgreSQL refuses NUL.
        text = value.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
        if len(text) > max_length:
            message = "The %s %r has %d characters; MLflow records its first %d."
            _logger.warning(message, kind, key, len(text), max_length)
        result[key] = text[:max_length]
    return result


def _storable_key(name: str, taken: Iterable[str]) -> str | None:
    """The name, changed where MLflow forbids it: characters, length, and paths like ``a//b``."""
    key = _BAD_KEY_CHARACTERS.sub("_", name)[: internals.MAX_KEY_LENGTH]
    if not _is_normal_path(key):
        key = re.sub(r"[/.]", "_", key)
    is_usable = key and _is_normal_path(key) and (key == name or key not in taken)
    return key if is_usable else None


def _is_normal_path(key: str) -> bool:
    return key == posixpath.normpath(key) != "." and not key.startswith(("..", "/"))
