"""The ``execute`` task: starts the command on the backend, streams its output, and tells why it ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import AsyncClientContext, TaskRunContext
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED
from prefect.states import Cancelled
from prefect.tasks import Task

from prefect_mlprojects.backends.contract import Backend, ExecutionOutcome, ExecutionRequest, Preparation, RunIdentity
from prefect_mlprojects.environments.base import PreparedEnvironment
from prefect_mlprojects.exceptions import RunCancelled, RunFailed, RunTimedOut, TrackingError
from prefect_mlprojects.runs.check import CheckedCall
from prefect_mlprojects.tasks.flow_log import FlowRunLog
from prefect_mlprojects.tasks.steps import Step, run_step
from prefect_mlprojects.tasks.validate_params import Invocation
from prefect_mlprojects.types import OutputSink, StopSignal, StreamName

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where and as whom a command runs.

    Attributes:
        identity: Who the run is.
        variables: What the run adds to the command's environment.
        timeout: Seconds that the command may take; None for no limit.
    """

    identity: RunIdentity
    variables: Mapping[str, str] = field(repr=False)
    timeout: float | None


class _Tee:
    """Writes to several sinks; the terminal comes first, so that it never waits for the log."""

    def __init__(self, *sinks: OutputSink) -> None:
        self._sinks = sinks

    def write(self, stream: StreamName, data: bytes) -> None:
        for sink in self._sinks:
            sink.write(stream, data)


class _Events:
    """Passes what a backend tells on to the flow run and the MLflow run; an ``ExecutionEvents``."""

    def __init__(self, step: Step, loop: asyncio.AbstractEventLoop) -> None:
        self._step = step
        self._loop = loop

    def report(self, line: str) -> None:
        self._step.report(line)

    def tag(self, tags: Mapping[str, str]) -> None:
        session = self._step.session
        if session.tracked_run is None:
            return
        try:
            session.tracker.set_tags(session.tracked_run, tags)
        except TrackingError as error:
            self._step.report(f"Warning: the MLflow run's tags could not be set: {error}")

    def link(self, title: str, url: str) -> None:
        self._step.report(f"{title}: {url}")
        # The thread that calls has the task run's context, and so has what it starts on the loop.
        asyncio.run_coroutine_threadsafe(self._keep_link(title, url), self._loop)

    async def _keep_link(self, title: str, url: str) -> None:
        from prefect.artifacts import acreate_link_artifact

        try:
            await acreate_link_artifact(link=url, link_text=title, description=title)
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The link of %s could not be kept with the flow run: %s", title, error)


async def _can_help(task: Task[..., object], task_run: TaskRun, state: State[object]) -> bool:  # noqa: ARG001 - Prefect's signature
    """Tells whether trying again can help: after a failed or timed-out command, not after a cancelled one."""
    return isinstance(state.data, RunFailed | RunTimedOut)


@task(name="execute", cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=_can_help)
async def execute(
    checked: CheckedCall, invocation: Invocation, environment: PreparedEnvironment | Preparation, target: Target
) -> ExecutionOutcome | State[ExecutionOutcome]:
    """Runs the command on its backend until it, and all it started, has ended.

    Args:
        checked: The call.
        invocation: What runs.
        environment: What it runs in.
        target: Where and as whom it runs.

    Raises:
        RunFailed: It failed, or could not be started.
        RunTimedOut: It took longer than its timeout.
        BackendError: The backend itself failed.
    """
    async with run_step("execute") as step:
        request = ExecutionRequest(
            command=invocation.command,
            working_directory=checked.backend_call.working_copy.directory,
            environment=environment if isinstance(environment, PreparedEnvironment) else None,
            variables=target.variables,
            identity=target.identity,
            config=checked.backend_call.config,
            timeout=target.timeout,
            call=checked.backend_call,
            preparation=environment if isinstance(environment, Preparation) else None,
            paths=invocation.paths,
            events=_Events(step, asyncio.get_running_loop()),
        )
        task_context = TaskRunContext.get()
        assert task_context is not None
        assert task_context.task_run.flow_run_id is not None
        async with AsyncClientContext.get_or_create() as client_context:
            log = FlowRunLog(
                client_context.client,
                task_context.task_run.flow_run_id,
                task_context.task_run.id,
                enabled=bool(PREFECT_LOGGING_TO_API_ENABLED.value()),
            )
            async with log:
                outcome = await _in_thread(checked.backend, request, _Tee(step.session.output, log), step.stop)
            step.detail = outcome.cause
            return _judge(outcome, target)


async def _in_thread(
    backend: Backend, request: ExecutionRequest, output: OutputSink, stop: StopSignal
) -> ExecutionOutcome:
    """Runs the blocking execution; when the flow is torn down around it, the execution ends before this returns."""
    future = asyncio.ensure_future(asyncio.to_thread(backend.execute, request, output, stop))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.request("the process that ran it was told to end")
        await asyncio.wait([future])
        raise


def _judge(outcome: ExecutionOutcome, target: Target) -> ExecutionOutcome | State[ExecutionOutcome]:
    if outcome.succeeded:
        return outcome
    run_id = target.identity.mlflow_run_id
    if outcome.ending == "stopped":
        error = RunCancelled(
            f"Run (ID '{run_id}') was cancelled: {outcome.cause}",
            run_id=run_id,
            flow_run_id=target.identity.flow_run_id,
            output_tail=outcome.output_tail,
        )
        return Cancelled(message=error.message, data=error)
    message = failure_message(f"Run (ID '{run_id}') failed", outcome)
    if outcome.ending == "timed-out":
        raise RunTimedOut(
            message,
            timeout=target.timeout or 0.0,
            run_id=run_id,
            flow_run_id=target.identity.flow_run_id,
            output_tail=outcome.output_tail,
        )
    raise RunFailed(
        message,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        run_id=run_id,
        flow_run_id=target.identity.flow_run_id,
        output_tail=outcome.output_tail,
    )


def failure_message(headline: str, outcome: ExecutionOutcome) -> str:
    """Builds the message of a failed run: what happened, why, what to do, and the last lines of output."""
    parts = [f"{headline}: {outcome.cause}."]
    if outcome.advice:
        parts.append(outcome.advice)
    if outcome.output_tail:
        parts.append("Last lines of output:")
        parts.extend(f"  {line}" for line in outcome.output_tail)
    return "\n".join(parts)
