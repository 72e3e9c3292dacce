"""Diagnoses Databricks runs by pure functions; watches and cancels them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.backends.databricks import unavailable
from prefect_mlprojects.backends.databricks.config import DatabricksConfig, insist
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import FailureCategory, StopSignal

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.jobs import Run

Status = Literal["running", "succeeded", "failed", "cancelled", "timed-out", "not-started"]

# https://docs.databricks.com/api/workspace/jobs/getrun: life_cycle_state -> whether the run has ended.
_ACTIVE = ("BLOCKED", "PENDING", "QUEUED", "RUNNING", "TERMINATING", "WAITING_FOR_RETRY", "WAITING")
LIFE_CYCLES = {**dict.fromkeys(_ACTIVE, False), "TERMINATED": True, "SKIPPED": True, "INTERNAL_ERROR": True}

RESULTS: Mapping[str, tuple[Status, str]] = {
    "SUCCESS": ("succeeded", "the run succeeded"),
    "SUCCESS_WITH_FAILURES": ("succeeded", "the run succeeded, with failures in it"),
    "FAILED": ("failed", "the task failed"),
    "TIMEDOUT": ("timed-out", "Databricks ended the run: it took longer than the configured timeout"),
    "CANCELED": ("cancelled", "the run was cancelled in Databricks"),
    "MAXIMUM_CONCURRENT_RUNS_REACHED": ("not-started", "too many runs at once"),
    "EXCLUDED": ("not-started", "the run was excluded by its conditions"),
    "DISABLED": ("not-started", "the task is disabled"),
    "UPSTREAM_FAILED": ("not-started", "a task before it failed"),
    "UPSTREAM_CANCELED": ("cancelled", "a task before it was cancelled"),
}

# Termination codes.
CODES: Mapping[str, tuple[Status, str]] = {
    "SUCCESS": RESULTS["SUCCESS"],
    "SUCCESS_WITH_FAILURES": RESULTS["SUCCESS_WITH_FAILURES"],
    "USER_CANCELED": ("cancelled", "a user cancelled the run in Databricks"),
    "CANCELED": ("cancelled", "Databricks cancelled the run"),
    "DRIVER_ERROR": ("failed", "the driver died"),
    "CLUSTER_TERMINATED_BY_USER": ("failed", "a user terminated the cluster"),
    "STORAGE_ACCESS_ERROR": ("failed", "the storage could not be accessed"),
    "RUN_EXECUTION_ERROR": ("failed", "the task failed"),
    "INTERNAL_ERROR": ("failed", "an internal error of Databricks"),
    "SKIPPED": ("not-started", "the run was skipped"),
    "CLUSTER_ERROR": ("not-started", "the cluster failed to start or broke"),
    "REPOSITORY_CHECKOUT_FAILED": ("not-started", "Databricks could not check the repository out"),
    "INVALID_CLUSTER_REQUEST": ("not-started", "the cluster's specification is invalid"),
    "WORKSPACE_RUN_LIMIT_EXCEEDED": ("not-started", "the workspace's limit of concurrent runs is reached"),
    "FEATURE_DISABLED": ("not-started", "a feature that the run needs is switched off in the workspace"),
    "CLUSTER_REQUEST_LIMIT_EXCEEDED": ("not-started", "too many clusters were requested at once"),
    "UNAUTHORIZED_ERROR": ("not-started", "a permission is missing"),
    "LIBRARY_INSTALLATION_ERROR": ("not-started", "a library could not be installed"),
    "MAX_CONCURRENT_RUNS_EXCEEDED": ("not-started", "too many runs at once"),
    "MAX_SPARK_CONTEXTS_EXCEEDED": ("not-started", "the cluster has too many Spark contexts"),
    "RESOURCE_NOT_FOUND": ("not-started", "a resource that the run needs does not exist"),
    "INVALID_RUN_CONFIGURATION": ("not-started", "the run's configuration is invalid"),
    "CLOUD_FAILURE": ("not-started", "the cloud provider failed"),
    "MAX_JOB_QUEUE_SIZE_EXCEEDED": ("not-started", "the queue is full"),
    "DISABLED": ("not-started", "the task is disabled"),
    "BREAKING_CHANGE": ("not-started", "the run uses a feature that Databricks has removed"),
    "BUDGET_POLICY_LIMIT_EXCEEDED": ("not-started", "the budget policy's limit is used up"),
}
_ADVICE = {
    "USER_CANCELED": "The run's page says who.",
    "CANCELED": "The run's page says why.",
    "DRIVER_ERROR": "Often its memory ran out: take a larger driver node type, or read the cluster's event log.",
    "CLUSTER_TERMINATED_BY_USER": "The cluster's event log says who.",
    "STORAGE_ACCESS_ERROR": "Check the permissions on the volume or the DBFS root, and on what code-path names.",
    "INTERNAL_ERROR": "Try again. If it happens again, give Databricks' support the run's id.",
    "SKIPPED": "Look at the run's conditions and limits.",
    "CLUSTER_ERROR": "Read the cluster's event log; check its node type, policy and network.",
    "REPOSITORY_CHECKOUT_FAILED": "Check the workspace's git credentials, or leave git-source out: the code is uploaded.",
    "INVALID_CLUSTER_REQUEST": "Correct new_cluster in the backend configuration.",
    "WORKSPACE_RUN_LIMIT_EXCEEDED": "Wait for other runs to end, or ask for a higher limit.",
    "FEATURE_DISABLED": "Ask the workspace's administrator to enable it.",
    "CLUSTER_REQUEST_LIMIT_EXCEEDED": "Try again later, or use an existing cluster or pool.",
    "UNAUTHORIZED_ERROR": "Give the user or service principal access to what the message names.",
    "LIBRARY_INSTALLATION_ERROR": "Correct 'libraries' (or 'python_libraries'): check names, versions and the cluster's way "
    "to the package index.",
    "MAX_CONCURRENT_RUNS_EXCEEDED": "Wait for other runs to end.",
    "MAX_SPARK_CONTEXTS_EXCEEDED": "Use another cluster, or a new one for each run.",
    "RESOURCE_NOT_FOUND": "Check cluster, policy and code-path in the backend configuration.",
    "INVALID_RUN_CONFIGURATION": "Correct the backend configuration.",
    "CLOUD_FAILURE": "Often it has no such machines left: try again, or take another node type or zone.",
    "MAX_JOB_QUEUE_SIZE_EXCEEDED": "Wait for other runs to end.",
    "BREAKING_CHANGE": "Follow its message; a newer runtime is often needed.",
    "BUDGET_POLICY_LIMIT_EXCEEDED": "Ask for a higher limit, or run under another budget policy.",
}

# Only where it is not the category of the run's ending.
_CODES_BY_CATEGORY = {
    FailureCategory.INFRASTRUCTURE: "CLUSTER_TERMINATED_BY_USER DRIVER_ERROR INTERNAL_ERROR STORAGE_ACCESS_ERROR",
    FailureCategory.IMAGE: "LIBRARY_INSTALLATION_ERROR",
    FailureCategory.SCHEDULING: "CLOUD_FAILURE INVALID_CLUSTER_REQUEST WORKSPACE_RUN_LIMIT_EXCEEDED "
    "CLUSTER_REQUEST_LIMIT_EXCEEDED MAX_CONCURRENT_RUNS_EXCEEDED MAX_JOB_QUEUE_SIZE_EXCEEDED BUDGET_POLICY_LIMIT_EXCEEDED",
}
CATEGORIES = {code: category for category, codes in _CODES_BY_CATEGORY.items() for code in codes.split()}
_MESSAGE_PATTERNS = {
    FailureCategory.PREEMPTED: re.compile(
        r"preempt|spot_instance_termination|spot (instance|termination|eviction)", re.IGNORECASE
    ),
    FailureCategory.OUT_OF_MEMORY: re.compile(r"\b(out of memory|outofmemory|oom)", re.IGNORECASE),
}

TYPES = {
    "SUCCESS": "",
    "CLIENT_ERROR": "caused by the request or the code",
    "CLOUD_FAILURE": "caused by the cloud provider",
    "INTERNAL_ERROR": "caused by Databricks itself",
}


@dataclass(frozen=True)
class Diagnosis:
    """A run's state in Databricks' own word (`phase`), and why it ended, with the messages of Databricks and the cloud.

    `category` is that of a failure, where it differs from the one of its ending.
    """

    status: Status
    phase: str
    cause: str = ""
    advice: str = ""
    category: FailureCategory | None = None

    @property
    def ended(self) -> bool:
        """True once the run has ended."""
        return self.status != "running"


def diagnose(run: Run) -> Diagnosis:
    """Explains the state of a run that ``runs/get`` returned."""
    state, status = run.state.as_dict() if run.state else {}, run.status.as_dict() if run.status else {}
    details = status.get("termination_details", {})
    life_cycle = state.get("life_cycle_state") or status.get("state") or ""
    message = details.get("message") or state.get("state_message") or ""
    return explain(life_cycle, state.get("result_state", ""), details.get("code", ""), details.get("type", ""), message)


def explain(life_cycle: str, result: str = "", code: str = "", kind: str = "", message: str = "") -> Diagnosis:
    """Explains a run's life-cycle state, result state, and termination code and type; unknown values never raise. Pure."""
    if not LIFE_CYCLES.get(life_cycle, bool(result or code)):
        return Diagnosis("running", life_cycle or "UNKNOWN")
    # SKIPPED and INTERNAL_ERROR are life-cycle states as well as codes.
    unknown: tuple[Status, str] = ("failed", f"it ended as {result or code or life_cycle}")
    (status, text), advice = RESULTS.get(result) or CODES.get(life_cycle, unknown), ""
    # A code of success beside a failure explains nothing.
    succeeded = result.startswith("SUCCESS") or (not result and life_cycle == "TERMINATED")
    explains = succeeded or not code.startswith("SUCCESS")
    if code in CODES and explains:
        (by_code, text), advice = CODES[code], _ADVICE.get(code, "")
        # The result state decides how the run ended, the code why.
        status = by_code if status in ("failed", "not-started") or result not in RESULTS else status
    cause = text + (f" ({TYPES[kind]})" if TYPES.get(kind) else "")
    message = message.strip().rstrip(".")
    if status == "succeeded":
        return Diagnosis(status, life_cycle, cause, advice)
    category = _category(status, code if explains else "", life_cycle, message)
    return Diagnosis(status, life_cycle, f"{cause}: {message}" if message else cause, advice, category)


def _category(status: Status, code: str, life_cycle: str, message: str) -> FailureCategory | None:
    if status not in ("failed", "not-started"):
        return None
    by_message = (category for category, pattern in _MESSAGE_PATTERNS.items() if pattern.search(message))
    return next(by_message, None) or CATEGORIES.get(code) or CATEGORIES.get(life_cycle)


def waiting_for(run: Run) -> str:
    """Returns Databricks' message about what an active run waits for; may be empty."""
    state, status = run.state.as_dict() if run.state else {}, run.status.as_dict() if run.status else {}
    queue = status.get("queue_details", {})
    reason = queue.get("code", "").replace("_", " ").lower()
    messages = (state.get("state_message"), queue.get("message"), state.get("queue_reason"), reason)
    return next((text.strip() for text in messages if text and text.strip()), "")


WatchEnd: TypeAlias = Literal["ended", "stopped", "timed-out"]
_SHORTEST_CANCEL_WAIT = 60.0


def watch(
    client: WorkspaceClient,
    run_id: int,
    config: DatabricksConfig,
    stop: StopSignal,
    deadline: float | None,
    on_look: Callable[[Run, Diagnosis], bool],
) -> tuple[Run | None, Diagnosis | None, WatchEnd]:
    """Polls a run until it terminates, a stop is requested or the `time.monotonic` deadline passes.

    `on_look` is called at every poll; if it returns True, the next one follows soon. Returns the run, its diagnosis, and why
    watching ended; the first two are None if a stop was requested before the first poll.
    """
    backoff, phase = Backoff(config.poll_interval, config.max_poll_interval), ""
    what = f"The Databricks run {run_id} can't be watched (it may still be running)"
    run, found = None, None
    while True:
        try:
            run, found = _look(client, run_id, config, stop, what)
        except BackendError:
            if stop.requested:
                # It was unreachable at the stop request; `cancel` retries.
                return run, found, "stopped"
            raise
        lively = on_look(run, found)
        if found.ended:
            return run, found, "ended"
        if lively or found.phase != phase:
            backoff.reset()
        pause, phase = backoff.next(), found.phase
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return run, found, "timed-out"
        if stop.wait(pause if left is None else min(pause, left)):
            return run, found, "stopped"


def _look(
    client: WorkspaceClient, run_id: int, config: DatabricksConfig, stop: StopSignal | None, what: str
) -> tuple[Run, Diagnosis]:
    run = insist(lambda: client.jobs.get_run(run_id), config, stop, what)
    found = diagnose(run)
    return run, replace(found, cause=config.redact(found.cause))


def cancel(client: WorkspaceClient, run_id: int, config: DatabricksConfig) -> tuple[Run, Diagnosis]:
    """Cancels a run and waits until it has ended. Idempotent."""
    from databricks.sdk.errors import BadRequest

    what = f"The Databricks run {run_id} could not be cancelled; cancel it in the workspace, it may cost money"

    def ask() -> None:
        # A run that has ended already is refused.
        with suppress(BadRequest):
            client.jobs.cancel_run(run_id)

    insist(ask, config, None, what)
    backoff, deadline = Backoff(0.2), time.monotonic() + max(config.network_timeout, _SHORTEST_CANCEL_WAIT)
    while True:
        run, found = _look(client, run_id, config, None, what)
        if found.ended:
            return run, found
        if time.monotonic() > deadline:
            raise unavailable(f"{what}: it is still {found.phase}.")
        time.sleep(backoff.next())
