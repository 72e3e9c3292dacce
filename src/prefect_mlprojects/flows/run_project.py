"""The flow ``run_project``: one run of a project is one run of this flow."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import anyio
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Failed

from prefect_mlprojects._support.event_loop import all_or_stop
from prefect_mlprojects._support.redaction import environment_secrets, redact_error
from prefect_mlprojects._support.secrets import Secret, reveal, secrets_in
from prefect_mlprojects.backends import get_backend
from prefect_mlprojects.backends.contract import AnyPrepared, RunIdentity
from prefect_mlprojects.blocks.resolution import read_project, resolve_backend_config, resolve_tracking
from prefect_mlprojects.exceptions import (
    ExecutionException,
    ParameterError,
    Problem,
    ProjectSpecError,
    RunCancelled,
    RunFailed,
    RunTimedOut,
    TrackingError,
)
from prefect_mlprojects.flows.announcement import RunAnnouncement, end_labels, set_labels
from prefect_mlprojects.flows.cancellation import watch_cancellation
from prefect_mlprojects.flows.card import RunFacts
from prefect_mlprojects.flows.deployment_check import apply_policies, check_form
from prefect_mlprojects.flows.secrets import (
    credentials_lookup,
    refuse_missing,
    secret_resolver,
    store_public_parameters,
)
from prefect_mlprojects.flows.tracked_run import finish_tracked_run, tracking_request
from prefect_mlprojects.request import FLOW_NAME, PROJECT_SCHEME, RunRequest, document_options
from prefect_mlprojects.request.check import CheckedRun, RunContext
from prefect_mlprojects.server.api import api_variables
from prefect_mlprojects.settings import PREFIX, log_uncommitted_changes
from prefect_mlprojects.sources import Source, WorkingCopy, detect_source
from prefect_mlprojects.sources.base import remove_run_folder
from prefect_mlprojects.sources.git import with_url_credentials
from prefect_mlprojects.sources.git.facts import read_uncommitted_changes
from prefect_mlprojects.spec import find_entry_point, load_project
from prefect_mlprojects.spec.schema import schema_changes
from prefect_mlprojects.tasks.execute import Target, execute
from prefect_mlprojects.tasks.prepare import Invocation, fetch, resolve_env, validate_params
from prefect_mlprojects.tasks.session import RunResult, RunSession, shared_session
from prefect_mlprojects.tasks.steps import configure_logging
from prefect_mlprojects.tracking import (
    TrackedRun,
    child_variables,
    display_uri,
    resolve_tracking_uri,
)
from prefect_mlprojects.tracking.uris import short_lived_default
from prefect_mlprojects.types import FailureCategory, StopSignal

_logger = logging.getLogger(__name__)

FLOW_RUN_ID_VARIABLE = "PREFECT_MLPROJECTS_FLOW_RUN_ID"

configure_logging()


@flow(name=FLOW_NAME, persist_result=False, validate_parameters=True)
@document_options(extra_parameters="Further parameter values by name: a deployment's form keeps undeclared ones apart.")
async def run_project(
    uri: str,
    entry_point: str = "main",
    version: str | None = None,
    parameters: dict[str, Any] | None = None,
    docker_args: dict[str, Any] | None = None,
    experiment_name: str | None = None,
    experiment_id: str | None = None,
    backend: str = "local",
    backend_config: dict[str, Any] | str | None = None,
    storage_dir: str | None = None,
    run_id: str | None = None,
    run_name: str | None = None,
    env_manager: str | None = None,
    build_image: bool = False,
    timeout: float | None = None,
    retries: int = 0,
    git_credentials: str | None = None,
    tracking: str | None = None,
    extra_parameters: dict[str, Any] | None = None,
) -> RunResult | State[Any]:
    """Runs an MLflow-Projects project; returns its result, or for a failed or cancelled run the state with its error."""
    request = RunRequest.from_arguments(locals())
    request = replace(request, parameters={**(parameters or {}), **(extra_parameters or {})} or None)
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    with shared_session() as session, session.known_secrets as known:
        known.add(*environment_secrets(), *session.secrets.known())
        session.set_flow_run_id(str(context.flow_run.id))
        async with watch_cancellation(context.flow_run.id, session.stop):
            return await _ProjectRun(request, session, context.flow_run, context.client).run()


class _ProjectRun:
    """One run: its four steps, and what is published when it ends."""

    def __init__(self, request: RunRequest, session: RunSession, flow_run: FlowRun, client: Any) -> None:
        self._request = request
        self._client = client
        self._session = session
        self._flow_run = flow_run
        self._source: Source | None = None
        self._working_copy: WorkingCopy | None = None
        self._checked: CheckedRun | None = None
        self._prepared: AnyPrepared | None = None
        self._announcement: RunAnnouncement | None = None
        self._result: RunResult | None = None
        self._command = ""
        self._started = time.monotonic()

    async def run(self) -> RunResult | State[Any]:
        """Executes the steps; in every case the MLflow run gets the flow run's final status."""
        try:
            return await self._run()
        except BaseException as error:
            # This process is being terminated, perhaps while the run was finishing.
            if self._result is None and not isinstance(error, Exception):
                # MLflow gets the status that Prefect is about to report.
                with anyio.CancelScope(shield=True):
                    if self._session.stop.requested:
                        cancelled = self._cancelled()
                        await self._finish("KILLED", cancelled.message, error=cancelled)
                    else:
                        await self._finish(await self._status_of_teardown(), "The run's process was terminated.")
            raise

    async def _run(self) -> RunResult | State[Any]:
        try:
            exit_code = await self._steps()
        except (ParameterError, ProjectSpecError) as error:
            return await self._fail(await self._with_changes(error))
        except ExecutionException as error:
            return await self._fail(error)
        except Exception as error:
            redact_error(error)
            await self._finish("FAILED", f"{type(error).__name__}: {error}")
            raise
        return await self._finish("FINISHED", "", exit_code=exit_code)

    async def _fail(self, error: ExecutionException) -> State[Any]:
        redact_error(error)
        stop = self._session.stop
        if stop.requested and not isinstance(error, RunTimedOut):
            cancelled = self._cancelled(getattr(error, "output_tail", ()))
            await self._finish("KILLED", cancelled.message, error=cancelled)
            return Cancelled(message=cancelled.message, data=cancelled)
        exit_code = error.exit_code if isinstance(error, RunFailed) else None
        await self._finish("FAILED", error.message, error=error, exit_code=exit_code)
        # Prefect's own name for it; its type is FAILED.
        name = "TimedOut" if isinstance(error, RunTimedOut) else "Failed"
        get_run_logger().error("%s", error.message)
        return Failed(message=error.summary, data=error, name=name)

    def _cancelled(self, output_tail: tuple[str, ...] = ()) -> RunCancelled:
        tracked = self._session.tracked_run
        return RunCancelled(
            f"Run {f'(ID {tracked.run_id!r}) ' if tracked else ''}was cancelled: {self._session.stop.reason}.",
            run_id=tracked.run_id if tracked else None,
            flow_run_id=str(self._flow_run.id),
            output_tail=output_tail,
        )

    async def _with_changes(self, error: ParameterError | ProjectSpecError) -> ExecutionException:
        """Adds the project's changes since it was deployed to the error of a deployment's run."""
        if self._flow_run.deployment_id is None or self._working_copy is None:
            return error
        try:
            deployment = await self._client.read_deployment(self._flow_run.deployment_id)
            project = await asyncio.to_thread(load_project, self._working_copy.directory, root=self._working_copy.root)
            changes = schema_changes(
                deployment.parameter_openapi_schema or {}, find_entry_point(project, self._request.entry_point)
            )
        except Exception:  # noqa: BLE001 - the error itself is what matters
            return error
        if not changes:
            return error
        problems = [Problem(change) for change in changes]
        headline = f"{error.message}\nSince it was deployed as '{deployment.name}', the project has changed"
        return ParameterError(headline, [*problems, Problem("deploy it again to update its form: mlprojects deploy")])

    async def _steps(self) -> int | None:
        await check_form(self._client, self._flow_run)
        self._session.known_secrets.add(*secrets_in(api_variables()))
        if self._request.uri.startswith(PROJECT_SCHEME):
            self._request = self._request.with_project(await read_project(self._client, self._request.uri))
        request, session = self._request, self._session
        policies = () if session.started_here else apply_policies(request)
        refuse_missing(request, session.secrets)
        resolved = await resolve_backend_config(self._client, request.backend_config, request.backend)
        config = get_backend(request.backend).parse_config({**resolved, **session.secrets.backend_config})
        named = await resolve_tracking(self._client, request.tracking) if request.tracking else None
        tracking_uri = named or session.tracking_uri or self._default_tracking_uri()
        session.known_secrets.add(tracking_uri, *secrets_in(config))
        credentials = credentials_lookup(self._client, request.git_credentials, session.known_secrets)
        uri = reveal(session.secrets.uri) if session.secrets.uri else request.uri
        context = RunContext(
            config,
            tracking_uri,
            session.secrets,
            with_url_credentials(credentials, uri),
            session.rebuild_environment,
            policies,
            secret_resolver(self._client, session.known_secrets),
        )
        self._source = detect_source(uri, request.version, git_credentials=credentials)
        self._working_copy = await fetch(self._source)
        checked, invocation = await self._prepare(self._working_copy, context)
        self._command = invocation.command
        prepared = self._prepared
        assert prepared is not None
        await asyncio.to_thread(session.set_tags, prepared.tags)
        run = execute.with_options(retries=request.retries) if request.retries else execute
        outcome = await run(checked, invocation, prepared, self._target(checked))
        if isinstance(outcome, State):
            raise RunCancelled(outcome.message or "The run was cancelled.")
        return outcome.exit_code

    def _target(self, checked: CheckedRun) -> Target:
        tracked, flow_run_id = self._session.tracked_run, str(self._flow_run.id)
        return Target(
            identity=RunIdentity(
                flow_run_id=flow_run_id,
                mlflow_run_id=tracked.run_id if tracked is not None else "",
                project=checked.project.display_name,
                entry_point=checked.entry_point.name,
            ),
            child_env={
                **(child_variables(tracked) if tracked is not None else {}),
                FLOW_RUN_ID_VARIABLE: flow_run_id,
                **({f"{PREFIX}ENV_MANAGER": manager} if (manager := self._request.env_manager) else {}),
                # So that a Prefect client in the child, or a nested run, uses the same server.
                **api_variables(),
            },
            timeout=self._request.timeout,
        )

    def _default_tracking_uri(self) -> Secret:
        """Returns the tracking URI of this process.

        Raises:
            TrackingError: This is a deployment's run, and the default store would be removed with its process.
        """
        uri = resolve_tracking_uri()
        if self._flow_run.deployment_id is not None and (why := short_lived_default()):
            raise TrackingError(
                f"The results would be lost: no tracking server is set, and the default store {display_uri(uri)} {why}. Set "
                "MLFLOW_TRACKING_URI for the worker or in the work pool's `env`, deploy with `--tracking BLOCK`, or start "
                "the worker with `mlprojects worker`.",
                tracking_uri=display_uri(uri),
            )
        return uri

    async def _prepare(self, working_copy: WorkingCopy, context: RunContext) -> tuple[CheckedRun, Invocation]:
        """Checks the request; then downloads, builds the environment and starts the MLflow run concurrently."""
        checked: asyncio.Future[CheckedRun] = asyncio.get_running_loop().create_future()
        stop = StopSignal()
        forget = self._session.stop.on_request(lambda: stop.request("the run was stopped"))

        def on_checked(result: CheckedRun) -> None:
            self._session.name = result.name
            if not checked.done():
                checked.set_result(result)

        try:
            validation = asyncio.ensure_future(validate_params(self._request, working_copy, context, on_checked, stop))
            first: list[asyncio.Future[Any]] = [validation, checked]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not checked.done():
                await validation
            result = self._checked = await checked
            await store_public_parameters(self._client, self._flow_run.id, self._request, self._session.secrets, result)
            resolution, tracking = self._resolve_environment(result, stop), self._start_tracking(result, working_copy)
            invocation, *_ = await all_or_stop(stop, validation, resolution, tracking)
        finally:
            forget()
        return result, invocation

    async def _resolve_environment(self, checked: CheckedRun, stop: StopSignal) -> None:
        self._prepared = await resolve_env(checked, stop)

    async def _start_tracking(self, checked: CheckedRun, working_copy: WorkingCopy) -> None:
        if checked.backend.tracks_runs:
            return
        session = self._session
        request = tracking_request(self._request, session, checked, self._flow_run)
        # Read before the command can change the files.
        patch = None
        if working_copy.dirty and log_uncommitted_changes():
            patch = await asyncio.to_thread(read_uncommitted_changes, working_copy.directory, session.stop)
        tracked = await asyncio.to_thread(session.tracker.start, request)
        session.set_tracked_run(tracked)
        self._announce(checked, tracked, patch)

    def _announce(self, checked: CheckedRun, tracked: TrackedRun, patch: str | None) -> None:
        self._announcement = RunAnnouncement(
            self._flow_run, self._client, self._session, checked, self._request.backend, tracked, patch
        )

    async def _finish(
        self,
        status: Literal["FINISHED", "FAILED", "KILLED"],
        message: str,
        *,
        exit_code: int | None = None,
        error: ExecutionException | None = None,
    ) -> RunResult:
        session, tracked = self._session, self._session.tracked_run
        category = None if status == "FINISHED" else error.category if error else FailureCategory.INFRASTRUCTURE
        cause = getattr(error, "cause", "")
        if self._announcement is None and self._checked is not None and tracked is not None:
            # The backend created the MLflow run during the execution.
            self._announce(self._checked, tracked, None)
        reason = "\n".join([message, *getattr(error, "output_tail", ())])
        summary = cause or (error.summary if error else message)
        labels = end_labels(category, summary, exit_code, session.secrets)
        environment = self._prepared.description if self._prepared is not None else ""
        shown, seconds = "" if status == "FINISHED" else reason, time.monotonic() - self._started
        facts = RunFacts(status, shown, exit_code, seconds, self._command, environment)
        announced = asyncio.ensure_future(self._publish_end(facts, labels))
        if tracked is not None:
            failure = None if category is None else (category, cause or message)
            ends_itself = self._checked is not None and self._checked.backend.tracks_runs
            await finish_tracked_run(
                session, tracked, self._flow_run, status, message, failure, ends_itself=ends_itself
            )
        metrics = {} if session.server_lost else await announced
        if self._checked is not None and self._prepared is not None:
            await asyncio.to_thread(self._checked.backend.release, self._prepared)
        if self._source is not None and self._working_copy is not None:
            await asyncio.to_thread(self._source.remove, self._working_copy)
        if session.downloads is not None:
            await asyncio.to_thread(remove_run_folder, session.downloads)
        self._result = RunResult(
            status=status,
            run_id=tracked.run_id if tracked else None,
            flow_run_id=str(self._flow_run.id),
            message=message,
            exit_code=exit_code,
            experiment_id=tracked.experiment_id if tracked else None,
            tracking_uri=display_uri(tracked.tracking_uri) if tracked else None,
            error=error,
            category=category,
            cause=cause,
            metrics=metrics,
        )
        session.set_result(self._result)
        return self._result

    async def _publish_end(self, facts: RunFacts, labels: dict[str, Any]) -> Mapping[str, float]:
        if self._announcement is not None:
            return await self._announcement.end(facts, labels)
        await set_labels(self._client, self._flow_run.id, labels)
        return {}

    async def _status_of_teardown(self) -> Literal["FAILED", "KILLED"]:
        """Returns KILLED if this process is being terminated because the flow run was cancelled, else FAILED."""
        try:
            async with get_client() as client:
                state = (await client.read_flow_run(self._flow_run.id)).state
        except Exception:  # noqa: BLE001 - whatever fails here, the teardown continues
            return "FAILED"
        return "KILLED" if state is not None and (state.is_cancelling() or state.is_cancelled()) else "FAILED"
