"""``/api/2.1/jobs/runs`` and ``/api/2.2/jobs/runs``: https://docs.databricks.com/api/workspace/jobs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from databricks.sdk.service import jobs
from tests.fakes.databricks_api.clusters import Clusters
from tests.fakes.databricks_api.errors import Refusal, check, invalid, no_endpoint, number, only
from tests.fakes.databricks_api.identity import Directory

ENDED = ("TERMINATED", "SKIPPED", "INTERNAL_ERROR")
_TASK_OFFSET = 500_000
_MAX_PARAMETERS = 10_000
_MAX_OUTPUT = 5 << 20
_COMPUTE = ("new_cluster", "existing_cluster_id", "environment_key")
_CAN_SEE = ("CAN_VIEW", "CAN_MANAGE_RUN", "CAN_MANAGE")


@dataclass
class SubmitRequest:
    """The body of ``runs/submit``, whose parts are the SDK's types."""

    tasks: list[jobs.SubmitTask]
    run_name: str | None = None
    idempotency_token: str | None = None
    git_source: jobs.GitSource | None = None
    environments: list[jobs.JobEnvironment] | None = None
    timeout_seconds: int | None = None
    access_control_list: list[jobs.JobAccessControlRequest] | None = None
    queue: jobs.QueueSettings | None = None


@dataclass
class FakeRun:
    """A run.

    Attributes:
        run_id: Its id.
        body: What was submitted.
        creator: Who did.
        life_cycle: The life-cycle state.
        result: The result state, once it has ended.
        code: The termination code.
        kind: The termination type.
        message: What Databricks says of it.
        logs: What its driver printed.
        error: Its error.
        trace: Its error's trace.
        cancelled_by: Who cancelled it.
        started: When, in milliseconds since the epoch.
        asked_to_end: Set when somebody has asked for its end.
        process: Its driver.
    """

    run_id: int
    body: dict[str, Any]
    creator: str
    life_cycle: str = "PENDING"
    result: str | None = None
    code: str | None = None
    kind: str | None = None
    message: str = ""
    logs: str = ""
    error: str | None = None
    trace: str | None = None
    cancelled_by: str | None = None
    started: int = field(default_factory=lambda: int(time.time() * 1000))
    asked_to_end: threading.Event = field(default_factory=threading.Event)
    process: Any = None

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.life_cycle in ENDED

    @property
    def task(self) -> dict[str, Any]:
        """Its one task."""
        task: dict[str, Any] = self.body["tasks"][0]
        return task

    def end(self, life_cycle: str, result: str | None, code: str, kind: str, message: str = "") -> None:
        """Notes how it ended."""
        self.result, self.code, self.kind, self.message = result, code, kind, message
        self.life_cycle = life_cycle


class Runs:
    """The runs of a workspace.

    Args:
        host: The workspace's address.
        people: Who there is.
        clusters: What there is to run on.
        start: Called with each new run.
    """

    def __init__(self, host: str, people: Directory, clusters: Clusters, start: Any) -> None:
        self._host, self._people, self._clusters, self._start = host, people, clusters, start
        self._lock = threading.RLock()
        self._by_token: dict[str, int] = {}
        self.all: dict[int, FakeRun] = {}

    def answer(self, method: str, name: str, values: Mapping[str, Any], user: str) -> Any:
        """Answers a request."""
        posts = ("submit", "cancel")
        if name not in (*posts, "get", "get-output", "list") or (method == "POST") != (name in posts):
            raise no_endpoint(method, f"/api/2.2/jobs/runs/{name}")
        if name == "submit":
            return self._submit(dict(values), user)
        if name == "list":
            return self._list(values, user)
        further = {"get": ("include_history", "include_resolved_values", "page_token"), "get-output": (), "cancel": ()}
        only(values, further[name], ("run_id",))
        number_ = number(values, "run_id", 0, 1 << 60)
        if name == "get-output":
            return self._output(number_, user)
        run = self._find(number_, user)
        if name == "get":
            return self.describe(run)
        if not run.ended:
            run.cancelled_by = run.cancelled_by or user
            run.asked_to_end.set()
        return {}

    def _find(self, run_id: int, user: str) -> FakeRun:
        run = self.all.get(run_id)
        if run is None:
            raise invalid(f"Run {run_id} does not exist.")
        if not self._sees(user, run):
            raise Refusal(
                403, "PERMISSION_DENIED", f"User {user} does not have View or Manage Run permissions on run {run_id}."
            )
        return run

    def _sees(self, user: str, run: FakeRun) -> bool:
        granted = run.body.get("access_control_list") or []
        return user == run.creator or any(
            self._people.is_one_of(user, each) and each["permission_level"] in _CAN_SEE for each in granted
        )

    def _submit(self, body: dict[str, Any], user: str) -> Any:
        check(body, SubmitRequest, "request")
        if len(body.get("tasks", [])) != 1:
            raise invalid("The double takes exactly one task.")
        self._check_task(body, body["tasks"][0])
        for entry in body.get("access_control_list") or []:
            names = {"user_name", "group_name", "service_principal_name"} & set(entry)
            if len(names) != 1 or not entry.get("permission_level"):
                raise invalid("An entry of the access control list needs one principal and a permission_level.")
            if not self._people.exists(entry):
                raise invalid(f"Principal: {next(iter(names))}({entry[next(iter(names))]}) does not exist")
        if not 0 <= body.get("timeout_seconds", 0) <= 7 * 86_400:
            raise invalid("timeout_seconds must be between 0 and 604800.")
        token = body.get("idempotency_token")
        if token is not None and not 0 < len(token) <= 64:
            raise invalid("idempotency_token must have at most 64 characters")
        with self._lock:
            if token in self._by_token:
                return {"run_id": self._by_token[token]}
            run = FakeRun(1000 + len(self.all), body, user)
            self.all[run.run_id] = run
            if token:
                self._by_token[token] = run.run_id
        self._start(run)
        return {"run_id": run.run_id}

    def _check_task(self, body: Mapping[str, Any], task: Mapping[str, Any]) -> None:
        if "spark_python_task" not in task:
            raise invalid("The double runs spark_python_task only.")
        if sum(key in task for key in _COMPUTE) != 1:
            raise invalid("Cluster validation error: exactly one kind of compute is needed for a task")
        if "environment_key" in task:
            _check_environment(body, task)
        else:
            self._clusters.check(task.get("new_cluster"), task.get("existing_cluster_id"))
        for library in task.get("libraries") or []:
            if len(library) != 1:
                raise invalid("Each library must have exactly one of jar, egg, whl, pypi, maven, cran, requirements.")
        _check_file(body, task["spark_python_task"])

    def _list(self, values: Mapping[str, Any], user: str) -> Any:
        known = ("active_only", "completed_only", "expand_tasks", "job_id", "limit", "offset", "page_token", "run_type")
        only(values, (*known, "start_time_from", "start_time_to"))
        active, completed = (values.get(name) == "true" for name in ("active_only", "completed_only"))
        if active and completed:
            raise invalid("active_only and completed_only exclude each other.")
        size = number(values, "limit", 20, 25) or 25
        start = number(values, "page_token", number(values, "offset", 0, 10_000), 1 << 40)
        found = [
            run
            for run in sorted(self.all.values(), key=lambda each: -each.run_id)
            if self._sees(user, run) and (not active or not run.ended) and (not completed or run.ended)
        ]
        if values.get("run_type") not in (None, "SUBMIT_RUN"):
            found = []
        page = [self.describe(run) for run in found[start : start + size]]
        if values.get("expand_tasks") != "true":
            for each in page:
                del each["tasks"]
        more = start + size < len(found)
        return {"runs": page, "has_more": more, **({"next_page_token": str(start + size)} if more else {})}

    def _output(self, task_run_id: int, user: str) -> Any:
        if task_run_id in self.all:
            raise invalid("Retrieving the output of runs with multiple tasks is not supported. Name a task's run.")
        run = self._find(task_run_id - _TASK_OFFSET, user)
        if not run.ended:
            return {"metadata": self.describe(run)}
        cut = len(run.logs) > _MAX_OUTPUT
        found = {"logs": run.logs[:_MAX_OUTPUT], "logs_truncated": cut, "metadata": self.describe(run)}
        return found | {
            name: text for name, text in (("error", run.error), ("error_trace", run.trace)) if text is not None
        }

    def describe(self, run: FakeRun) -> dict[str, Any]:
        """A run as ``runs/get`` shows it."""
        state: dict[str, Any] = {
            "life_cycle_state": run.life_cycle,
            "state_message": run.message,
            "user_cancelled_or_timedout": run.result in ("CANCELED", "TIMEDOUT"),
        }
        status: dict[str, Any] = {"state": "TERMINATED" if run.ended else run.life_cycle}
        if run.ended:
            if run.result:
                state["result_state"] = run.result
            status["termination_details"] = {"code": run.code, "type": run.kind, "message": run.message}
        task = {"run_id": run.run_id + _TASK_OFFSET, **run.task, "state": state, "status": status, "attempt_number": 0}
        return {
            "run_id": run.run_id,
            "job_id": 77,
            "number_in_job": run.run_id,
            "creator_user_name": run.creator,
            "run_name": run.body.get("run_name", "Untitled"),
            "run_type": "SUBMIT_RUN",
            "run_page_url": f"{self._host}/?o=1#job/77/run/{run.run_id}",
            "start_time": run.started,
            "state": state,
            "status": status,
            "tasks": [task],
            **({"git_source": run.body["git_source"]} if "git_source" in run.body else {}),
        }


def _check_environment(body: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    specs = {each["environment_key"]: each.get("spec") or {} for each in body.get("environments") or []}
    if task["environment_key"] not in specs:
        raise invalid(f"Environment key {task['environment_key']} is not defined in environments.")
    if task.get("libraries"):
        raise invalid("Libraries field is not supported for serverless task, use environment instead.")
    if not {"client", "environment_version"} & set(specs[task["environment_key"]]):
        raise invalid("Either client or environment_version is required in an environment's spec.")


def _check_file(body: Mapping[str, Any], python: Mapping[str, Any]) -> None:
    if len(json.dumps(python.get("parameters") or [])) > _MAX_PARAMETERS:
        raise invalid(f"The parameters exceed {_MAX_PARAMETERS} bytes.")
    if python.get("source") == "GIT":
        source = body.get("git_source")
        if source is None:
            raise invalid("A task with source GIT needs a git_source.")
        if sum(key in source for key in ("git_branch", "git_tag", "git_commit")) != 1:
            raise invalid("git_source needs exactly one of git_branch, git_tag and git_commit.")
        if python["python_file"].startswith("/"):
            raise invalid("The python_file of a git source must be a relative path.")
    elif not python["python_file"].startswith(("/Workspace/", "/Volumes/", "dbfs:/")):
        raise invalid(f"Invalid python file reference: {python['python_file']}")
