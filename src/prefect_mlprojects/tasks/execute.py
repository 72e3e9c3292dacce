"""The ``execute`` task: runs the command on its backend, streams its output and maps the outcome to a result or error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED
from prefect.states import Cancelled
from prefect.tasks import Task

from prefect_mlprojects._support.known_secrets import OutputRedactor
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.contract import AnyBackend, AnyPrepared, Command, ExecutionEvents, RunIdentity
from prefect_mlprojects.backends.outcome import Outcome
from prefect_mlprojects.environments.managers import missing_module_advice
from prefect_mlprojects.exceptions import RunCancelled, RunFailed, RunTimedOut, TrackingError
from prefect_mlprojects.request.check import CheckedRun
from prefect_mlprojects.server.compat import client_context
from prefect_mlprojects.tasks.flow_log import FlowRunLog
from prefect_mlprojects.tasks.prepare import Invocation
from prefect_mlprojects.tasks.steps import Step, run_step
from prefect_mlprojects.tracking.records import FLOW_RUN_ID_TAG, mlflow_advice
from prefect_mlprojects.types import FailureCategory, OutputSink, StopSignal, StreamName

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """The ids, added variables and time limit (in seconds, or None) that a command runs with."""

    identity: RunIdentity
    child_env: Mapping[str, Secret | str] = field(repr=False)
    timeout: float | None


class _Events:
    """Forwards a backend's events to the terminal, the flow run and the MLflow run; an `ExecutionEvents`."""

    def __init__(
        self, step: Step, loop: asyncio.AbstractEventLoop, log: OutputSink, tags_of_adopted: Mapping[str, str]
    ) -> None:
        self._step = step
        self._tags_of_adopted = tags_of_adopted
        self._loop = loop
        # The terminal first: it never waits for the log.
        self._sinks: tuple[OutputSink, ...] = (step.session.output, step.session.output_copy, log)
        self._redactors = {stream: OutputRedactor() for stream in get_args(StreamName)}

    def write(self, stream: StreamName, data: bytes) -> None:
        self._write(stream, self._redactors[stream].feed(data))

    def close(self) -> None:
        """Writes what was held back, because it could have been the beginning of a secret."""
        for stream, redactor in self._redactors.items():
            self._write(stream, redactor.close())

    def _write(self, stream: StreamName, data: bytes) -> None:
        for sink in self._sinks if data else ():
            sink.write(stream, data)

    def report(self, line: str) -> None:
        self._step.report(line)

    def tag(self, tags: Mapping[str, str]) -> None:
        try:
            self._step.session.set_tags(tags)
        except TrackingError as error:
            self._step.report(f"Warning: the MLflow run's tags could not be set: {error}")

    def link(self, title: str, url: str) -> None:
        self._step.report(f"{title}: {url}")
        # The calling thread has the task run's context, which the coroutine inherits.
        asyncio.run_coroutine_threadsafe(self._keep_link(title, url), self._loop)

    def adopt_run(self, run_id: str, tracking_uri: Secret) -> None:
        session = self._step.session
        try:
            session.set_tracked_run(session.tracker.adopt(run_id, tracking_uri))
        except TrackingError as error:
            self._step.report(f"Warning: the MLflow run {run_id} could not be read: {error}")
            return
        self.tag(self._tags_of_adopted)

    async def _keep_link(self, title: str, url: str) -> None:
        from prefect.artifacts import acreate_link_artifact

        try:
            await acreate_link_artifact(link=redact(url), link_text=title, description=title)
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The link to %s could not be stored with the flow run: %s", title, error)


async def _may_succeed_again(task: Task[..., object], task_run: TaskRun, state: State[object]) -> bool:  # noqa: ARG001 - Prefect's signature
    """Returns whether a retry can help: after a failed or timed-out command, not after a cancelled one."""
    return isinstance(state.data, RunFailed | RunTimedOut)


@task(name="execute", cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=_may_succeed_again)
async def execute(
    checked: CheckedRun, invocation: Invocation, prepared: AnyPrepared, target: Target
) -> Outcome | State[Outcome]:
    """Runs the command on its backend and returns once it and everything it started has ended.

    Raises:
        RunFailed: It failed, or could not be started.
        RunTimedOut: It exceeded its time-out.
        BackendError: The backend itself failed.
    """
    async with run_step("execute") as step:
        tracked = step.session.tracked_run
        command = Command(
            line=invocation.command,
            child_env={**target.child_env, **invocation.parameters.child_variables},
            identity=target.identity,
            timeout=target.timeout,
            parameters=invocation.parameters.values,
            paths=invocation.paths,
            artifact_uri=tracked.artifact_uri if tracked is not None else "",
        )
        task_context = TaskRunContext.get()
        assert task_context is not None
        enabled = bool(PREFECT_LOGGING_TO_API_ENABLED.value())
        async with (
            client_context() as context,
            FlowRunLog(context.client, task_context.task_run, enabled=enabled) as log,
        ):
            tags = {**prepared.tags, FLOW_RUN_ID_TAG: target.identity.flow_run_id}
            events = _Events(step, asyncio.get_running_loop(), log, tags)
            try:
                outcome = await _in_thread(checked.backend, prepared, command, events, step.stop)
            finally:
                events.close()
        if not outcome.succeeded:
            tail = outcome.output_tail
            missing = missing_module_advice(checked.project, checked.environment_kind, tail) or mlflow_advice(tail)
            outcome = replace(outcome, advice=f"{outcome.advice} {missing}".strip())
        step.detail, step.cancelled = outcome.cause, outcome.ending == "stopped"
        tracked = step.session.tracked_run
        return _result_or_error(outcome, target, tracked.run_id if tracked is not None else None)


async def _in_thread(
    backend: AnyBackend, prepared: AnyPrepared, command: Command, events: ExecutionEvents, stop: StopSignal
) -> Outcome:
    """Runs the blocking execution in a thread; on cancellation, stops it and waits for its end."""
    future = asyncio.ensure_future(asyncio.to_thread(backend.execute, prepared, command, events, stop))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.request("the run's process was terminated")
        await asyncio.wait([future])
        raise


def _result_or_error(outcome: Outcome, target: Target, run_id: str | None) -> Outcome | State[Outcome]:
    if outcome.succeeded:
        return outcome
    outcome = replace(outcome, cause=redact(outcome.cause), output_tail=tuple(map(redact, outcome.output_tail)))
    attributes: dict[str, Any] = {
        "run_id": run_id,
        "flow_run_id": target.identity.flow_run_id,
        "output_tail": outcome.output_tail,
        "cause": outcome.cause,
    }
    name = f"Run (ID '{run_id}')" if run_id else "The run"
    if outcome.ending == "stopped":
        error = RunCancelled(f"{name} was cancelled: {outcome.cause}", **attributes)
        return Cancelled(message=error.message, data=error)
    message = f"{name} failed: {outcome.cause}." + (f" {outcome.advice}" if outcome.advice else "")
    if outcome.ending == "timed-out":
        raise RunTimedOut(message, timeout=target.timeout or 0.0, **attributes)
    raise RunFailed(
        message,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        category=outcome.category or FailureCategory.USER_CODE,
        **attributes,
    )
