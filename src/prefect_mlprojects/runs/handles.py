"""Handles on flow runs: status, result, waiting and cancellation.

Prefect is imported when a handle first calls its API, so that importing this module is cheap.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.exceptions import ExecutionException, InvalidInputError, PrefectServerError
from prefect_mlprojects.request import (
    CATEGORY_LABEL,
    CAUSE_LABEL,
    EXIT_CODE_LABEL,
    EXPERIMENT_ID_LABEL,
    RUN_ID_LABEL,
    TRACKING_URI_LABEL,
)
from prefect_mlprojects.runs.records import STATUS_BY_STATE_TYPE
from prefect_mlprojects.server.api import call_api, flow_run_url
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.types import FailureCategory, RunStatus

if TYPE_CHECKING:
    import concurrent.futures

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, State

    from prefect_mlprojects.tasks.session import RunResult, RunSession

_logger = logging.getLogger(__name__)

_SERVER_CHECK_SECONDS = 3.0
"""How long a stopped run may take before its server is checked, and between two checks."""


def run_status(state: State[Any] | None) -> RunStatus:
    """Maps a Prefect state to MLflow's run status by its type, whatever its name (Late, AwaitingRetry, TimedOut …).

    A flow run without a state, or with one of an unknown type, is RUNNING.
    """
    if state is None:
        return "RUNNING"
    return STATUS_BY_STATE_TYPE.get(str(getattr(state.type, "value", state.type)), "RUNNING")


class SubmittedRun(ABC):
    """A handle on a submitted run; thread-safe.

    It has what ``mlflow.projects.SubmittedRun`` has, and the flow run's ID, URL and result.
    """

    def __init__(self, flow_run_id: str, url: str | None) -> None:
        self._flow_run_id = flow_run_id
        self._url = url

    @classmethod
    def attach(cls, run: str | UUID) -> SubmittedRun:
        """Returns a handle on a run that any process started.

        Args:
            run: The flow run's ID or the beginning of it, the address of its page in Prefect's UI, its name, the MLflow
                run's ID, or ``last`` for the run that was started last.

        Raises:
            InvalidInputError: No run, or more than one, is named so.
            PrefectServerError: The Prefect server can't be reached.
        """
        return AttachedSubmittedRun(run)

    @property
    @abstractmethod
    def run_id(self) -> str:
        """The MLflow run's ID; waits until the MLflow run exists.

        Raises:
            ExecutionException: The run ended before its MLflow run was created.
        """

    @property
    def flow_run_id(self) -> str:
        """The Prefect flow run's ID."""
        return self._flow_run_id

    @property
    def url(self) -> str | None:
        """The flow run's page in the Prefect UI; None if the UI's address is not known."""
        return self._url

    def wait(self) -> bool:
        """Waits until the run has ended and returns whether it finished successfully."""
        return self.result().status == "FINISHED"

    @abstractmethod
    def get_status(self) -> RunStatus:
        """Returns ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED`` without waiting for the run."""

    @abstractmethod
    def cancel(self) -> None:
        """Cancels the run and waits until it has ended; a no-op for a run that has ended."""

    @abstractmethod
    def result(self) -> RunResult:
        """Waits until the run has ended and returns its result; does not raise for a failed run."""

    def _no_mlflow_run(self, message: str) -> ExecutionException:
        return ExecutionException(f"Flow run {self._flow_run_id} ended before it had an MLflow run: {message}")


class LocalSubmittedRun(SubmittedRun):
    """A handle on a run whose flow runs in this process.

    Attributes:
        session: The run's session in this process.
    """

    def __init__(
        self, session: RunSession, future: concurrent.futures.Future[None], api_url: str, ui_url: str | None
    ) -> None:
        assert session.flow_run_id is not None, "handles are created once the flow run exists"
        super().__init__(session.flow_run_id, flow_run_url(ui_url, session.flow_run_id))
        self.session = session
        self._future = future
        self._api_url = api_url
        session.stop.on_request(session.wake)

    @property
    def run_id(self) -> str:
        """The MLflow run's ID; waits until the MLflow run exists."""
        session = self.session
        session.wait_until(lambda: session.tracked_run is not None or self._future.done())
        if session.tracked_run is None:
            raise self._no_mlflow_run(self.result().message)
        return session.tracked_run.run_id

    def get_status(self) -> RunStatus:
        """Returns ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``, without a request to the server."""
        result = self.session.result
        return result.status if self._future.done() and result is not None else "RUNNING"

    def cancel(self) -> None:
        """Cancels the run and waits until it has ended."""
        self.session.stop.request("cancel() was called")
        self.result()

    def result(self) -> RunResult:
        """Waits until the run has ended and returns its result; a stopped run does not wait for a server that is gone."""
        session, done = self.session, self._future.done
        session.wait_until(lambda: done() or session.stop.requested)
        while not session.wait_until(done, _SERVER_CHECK_SECONDS):
            if not session.server_lost and not self._server_answers():
                self._leave_server()
        if not self._future.cancelled():
            self._future.result()
        # Another thread may be leaving the server.
        session.wait_until(lambda: session.result is not None or not session.server_lost)
        assert session.result is not None, "_run_flow and _leave_server set a result in every case"
        return session.result

    def _server_answers(self) -> bool:
        from prefect_mlprojects.server.address import check_reachable

        try:
            check_reachable(self._api_url, timeout=5)
        except PrefectServerError:
            return False
        return True

    def _leave_server(self) -> None:
        """Ends a stopped run without its Prefect server; its work and its MLflow run end first."""
        from prefect_mlprojects.server.compat import abandon_services
        from prefect_mlprojects.tasks.session import RunResult

        session = self.session
        session.server_lost = True
        # The engine's requests to the server are given up; its error messages about them are of no use.
        for name in ("prefect", "prefect._internal", "prefect._internal.concurrency"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        limit = grace_period() + 30
        self._future.cancel()
        session.wait_until(lambda: session.result is not None, limit)
        run_id = session.tracked_run.run_id if session.tracked_run else None
        result = session.result or RunResult(
            "FAILED",
            run_id,
            self.flow_run_id,
            f"The cancelled run did not end within {limit:g} s; its command may go on.",
        )
        advice = (
            f"The Prefect server at {redact(self._api_url)} does not answer and may show the flow run as running: once it "
            f"is back, use `mlprojects cancel {self.flow_run_id}`."
        )
        abandon_services()
        session.set_result(replace(result, message=f"{result.message}\n{advice}"))


class AttachedSubmittedRun(SubmittedRun):
    """A handle on a flow run of any process; it uses Prefect's API only.

    Args:
        run: A reference, as `SubmittedRun.attach` takes it.

    Raises:
        InvalidInputError: No run, or more than one, is named so.
        PrefectServerError: The Prefect server can't be reached.
    """

    def __init__(self, run: str | UUID) -> None:
        from prefect_mlprojects.runs.references import find_run
        from prefect_mlprojects.server.process import resolve_api
        from prefect_mlprojects.server.rest import RestApi

        self._api = resolve_api()
        self._id = UUID(find_run(str(run), RestApi(self._api.api_url)).id)
        super().__init__(str(self._id), flow_run_url(self._api.ui_url, str(self._id)))

    def _call(self, method: Any, *arguments: Any) -> Any:
        return call_api(self._api.api_url, method, *arguments)

    async def _read(self, client: PrefectClient) -> FlowRun:
        from prefect.exceptions import ObjectNotFound

        try:
            return await client.read_flow_run(self._id)
        except ObjectNotFound:
            raise InvalidInputError(
                f"No flow run {self._id} found on the Prefect server at {self._api.api_url}."
            ) from None

    @property
    def run_id(self) -> str:
        """The MLflow run's ID; waits until the MLflow run exists."""
        backoff = Backoff(longest=2.0)
        while True:
            flow_run: FlowRun = self._call(self._read)
            if run_id := flow_run.labels.get(RUN_ID_LABEL):
                return str(run_id)
            if run_status(flow_run.state) != "RUNNING":
                raise self._no_mlflow_run((flow_run.state.message if flow_run.state else None) or "")
            time.sleep(backoff.next())

    def get_status(self) -> RunStatus:
        """Returns ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED`` according to Prefect's server."""
        flow_run: FlowRun = self._call(self._read)
        return run_status(flow_run.state)

    def result(self) -> RunResult:
        """Waits until the run has ended and returns its result, without what only its own process knows."""
        from prefect_mlprojects.tasks.session import RunResult

        flow_run: FlowRun = self._call(self._wait, None)
        labels = flow_run.labels
        category, exit_code = labels.get(CATEGORY_LABEL), labels.get(EXIT_CODE_LABEL)
        return RunResult(
            status=run_status(flow_run.state),
            run_id=_text(labels.get(RUN_ID_LABEL)),
            flow_run_id=self.flow_run_id,
            message=(flow_run.state.message if flow_run.state else None) or "",
            experiment_id=_text(labels.get(EXPERIMENT_ID_LABEL)),
            tracking_uri=_text(labels.get(TRACKING_URI_LABEL)),
            exit_code=exit_code if isinstance(exit_code, int) else None,
            category=FailureCategory(category) if category else None,
            cause=str(labels.get(CAUSE_LABEL, "")),
        )

    async def _wait(self, client: PrefectClient, timeout: float | None) -> FlowRun:
        from prefect.exceptions import FlowRunWaitTimeout
        from prefect.flow_runs import wait_for_flow_run

        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            flow_run = await self._read(client)
            remaining = deadline - time.monotonic()
            if run_status(flow_run.state) != "RUNNING" or remaining <= 0:
                return flow_run
            try:
                # At most half a minute at a time, so that a lost event does not block for ever.
                await wait_for_flow_run(self._id, timeout=max(1, math.ceil(min(remaining, 30))), client=client)
            except FlowRunWaitTimeout:
                continue
            except Exception as error:  # noqa: BLE001 - a server outage; `_read` reports one that lasts
                _logger.debug("Waiting for flow run %s was interrupted: %s", self._id, error)
                await asyncio.sleep(1)

    def cancel(self) -> None:
        """Requests the cancellation from Prefect and waits until the run has ended.

        The flow's own process ends the run. If that process is gone, this method marks the flow run and the MLflow run as
        cancelled after the grace period and another 30 seconds.
        """
        flow_run: FlowRun = self._call(self._cancel)
        if run_status(flow_run.state) == "RUNNING":
            flow_run = self._call(self._wait, grace_period() + 30)
        if run_status(flow_run.state) == "RUNNING":
            self._call(self._force_cancelled)
            self._mark_mlflow_run_killed(flow_run)

    async def _cancel(self, client: PrefectClient) -> FlowRun:
        from prefect.states import Cancelling

        flow_run = await self._read(client)
        cancelling = flow_run.state is not None and flow_run.state.is_cancelling()
        if run_status(flow_run.state) == "RUNNING" and not cancelling:
            await client.set_flow_run_state(self._id, Cancelling(message="cancel() was called"))
            flow_run = await self._read(client)
        return flow_run

    async def _force_cancelled(self, client: PrefectClient) -> None:
        from prefect.states import Cancelled

        message = "The flow run was marked as cancelled: its process did not respond."
        await client.set_flow_run_state(self._id, Cancelled(message=message), force=True)

    def _mark_mlflow_run_killed(self, flow_run: FlowRun) -> None:
        from prefect_mlprojects._support.secrets import Secret
        from prefect_mlprojects.tracking import TrackedRun, Tracker, display_uri, resolve_tracking_uri

        run_id, shown_uri = flow_run.labels.get(RUN_ID_LABEL), flow_run.labels.get(TRACKING_URI_LABEL)
        if not run_id or not shown_uri:
            return
        # The label is redacted; this process may have the same URI with its password.
        own = resolve_tracking_uri()
        tracking_uri = own if display_uri(own) == shown_uri else Secret(str(shown_uri))
        experiment_id = str(flow_run.labels.get(EXPERIMENT_ID_LABEL, ""))
        try:
            Tracker().finish(TrackedRun(str(run_id), experiment_id, tracking_uri), "KILLED")
        except ExecutionException as error:
            _logger.warning("The MLflow run %s could not be marked as KILLED: %s", run_id, error)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
