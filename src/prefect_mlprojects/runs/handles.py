"""Handles on flow runs: their status in MLflow's words, waiting for them, cancelling them.

This module is light at import: Prefect is imported when a handle first talks to it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.server.api import call_api, flow_run_url
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.types import RunStatus

if TYPE_CHECKING:
    import concurrent.futures

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, State

    from prefect_mlprojects.tasks.session import RunResult, RunSession

_logger = logging.getLogger(__name__)

RUN_ID_LABEL = "mlflow.run_id"
EXPERIMENT_ID_LABEL = "mlflow.experiment_id"
TRACKING_URI_LABEL = "mlflow.tracking_uri"
COMMIT_LABEL = "git.commit"
BRANCH_LABEL = "git.branch"
REPOSITORY_LABEL = "git.repository"

_STATUS_BY_STATE_TYPE: dict[str, RunStatus] = {
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


def run_status(state: State[Any] | None) -> RunStatus:
    """Maps a Prefect state to MLflow's run status.

    The mapping goes by the state's type, so that a state with a name nobody has heard of (Late, AwaitingRetry, TimedOut …)
    maps too; a flow run that has no state yet, or one of a type yet to be invented, is RUNNING.

    Args:
        state: A flow run's state, or None.

    Returns:
        ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``.
    """
    if state is None:
        return "RUNNING"
    return _STATUS_BY_STATE_TYPE.get(str(getattr(state.type, "value", state.type)), "RUNNING")


class SubmittedRun(ABC):
    """A handle on a submitted run; thread-safe.

    It has what ``mlflow.projects.SubmittedRun`` has, and the flow run's id, address and result.
    """

    @classmethod
    def attach(cls, flow_run_id: str | UUID) -> SubmittedRun:
        """Returns a handle on a flow run that any process started.

        Args:
            flow_run_id: The flow run's id.

        Raises:
            ExecutionException: There is no flow run of that id.
            PrefectServerError: The Prefect server can't be reached.
        """
        return AttachedSubmittedRun(flow_run_id)

    @property
    @abstractmethod
    def run_id(self) -> str:
        """The MLflow run's id; waits for the MLflow run to exist.

        Raises:
            ExecutionException: The run ended before there was an MLflow run.
        """

    @property
    @abstractmethod
    def flow_run_id(self) -> str:
        """The Prefect flow run's id."""

    @property
    @abstractmethod
    def url(self) -> str | None:
        """The flow run's page in the Prefect UI, when its address is known."""

    @abstractmethod
    def wait(self) -> bool:
        """Waits for the run to end.

        Returns:
            Whether it finished successfully.
        """

    @abstractmethod
    def get_status(self) -> RunStatus:
        """Returns ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``; never waits for the run."""

    @abstractmethod
    def cancel(self) -> None:
        """Ends the run and waits until it has ended; a run that ended already is left as it is."""

    @abstractmethod
    def result(self) -> RunResult:
        """Waits for the run to end and returns how it did; never raises for a failed run."""


class LocalSubmittedRun(SubmittedRun):
    """A handle on a run whose flow runs in this process.

    Attributes:
        session: The run's session in this process.

    Args:
        session: The run's session in this process.
        future: Ends when the flow run has ended.
        url: The flow run's page in the Prefect UI.
    """

    def __init__(self, session: RunSession, future: concurrent.futures.Future[None], url: str | None) -> None:
        self.session = session
        self._future = future
        self._url = url

    @property
    def run_id(self) -> str:
        """The MLflow run's id; waits for the MLflow run to exist."""
        session = self.session
        session.wait_until(lambda: session.tracked_run is not None or self._future.done())
        if session.tracked_run is None:
            raise ExecutionException(
                f"Flow run {self.flow_run_id} ended before it had an MLflow run: {self.result().message}"
            )
        return session.tracked_run.run_id

    @property
    def flow_run_id(self) -> str:
        """The Prefect flow run's id."""
        assert self.session.flow_run_id is not None, "a handle is made once the flow run exists"
        return self.session.flow_run_id

    @property
    def url(self) -> str | None:
        """The flow run's page in the Prefect UI, when its address is known."""
        return self._url

    def wait(self) -> bool:
        """Waits for the run to end and returns whether it finished successfully."""
        return self.result().status == "FINISHED"

    def get_status(self) -> RunStatus:
        """Returns ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``; asks no server."""
        result = self.session.result
        return result.status if self._future.done() and result is not None else "RUNNING"

    def cancel(self) -> None:
        """Ends the run and waits until it has ended."""
        self.session.stop.request("cancel() was called")
        self.result()

    def result(self) -> RunResult:
        """Waits for the run to end and returns how it did."""
        self._future.result()
        assert self.session.result is not None, "the launcher leaves a result in every case"
        return self.session.result


class AttachedSubmittedRun(SubmittedRun):
    """A handle on a flow run that any process runs: everything goes through Prefect's API.

    Args:
        flow_run_id: The flow run's id.

    Raises:
        ExecutionException: There is no flow run of that id.
        PrefectServerError: The Prefect server can't be reached.
    """

    def __init__(self, flow_run_id: str | UUID) -> None:
        from prefect_mlprojects.server.process import resolve_api

        try:
            self._id = flow_run_id if isinstance(flow_run_id, UUID) else UUID(str(flow_run_id))
        except ValueError:
            raise ExecutionException(f"{flow_run_id!r} is not the id of a flow run (a UUID).") from None
        self._api = resolve_api()
        self._call(self._read)

    def _call(self, method: Any, *arguments: Any) -> Any:
        return call_api(self._api.api_url, method, *arguments)

    async def _read(self, client: PrefectClient) -> FlowRun:
        from prefect.exceptions import ObjectNotFound

        try:
            return await client.read_flow_run(self._id)
        except ObjectNotFound:
            raise ExecutionException(
                f"There is no flow run {self._id} on the Prefect server at {self._api.api_url}."
            ) from None

    @property
    def run_id(self) -> str:
        """The MLflow run's id; waits for the MLflow run to exist."""
        delay = 0.2
        while True:
            flow_run: FlowRun = self._call(self._read)
            if run_id := flow_run.labels.get(RUN_ID_LABEL):
                return str(run_id)
            if run_status(flow_run.state) != "RUNNING":
                message = flow_run.state.message if flow_run.state else ""
                raise ExecutionException(f"Flow run {self._id} ended before it had an MLflow run: {message}")
            time.sleep(delay)
            delay = min(delay * 1.5, 2.0)

    @property
    def flow_run_id(self) -> str:
        """The Prefect flow run's id."""
        return str(self._id)

    @property
    def url(self) -> str | None:
        """The flow run's page in the Prefect UI, when its address is known."""
        return flow_run_url(self._api.ui_url, self.flow_run_id)

    def get_status(self) -> RunStatus:
        """Returns ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED`` as Prefect's server has it."""
        flow_run: FlowRun = self._call(self._read)
        return run_status(flow_run.state)

    def wait(self) -> bool:
        """Waits for the run to end and returns whether it finished successfully."""
        return self.result().status == "FINISHED"

    def result(self) -> RunResult:
        """Waits for the run to end and returns how it did, as far as Prefect's server knows."""
        from prefect_mlprojects.tasks.session import RunResult

        flow_run: FlowRun = self._call(self._wait, None)
        labels = flow_run.labels
        return RunResult(
            status=run_status(flow_run.state),
            run_id=_text(labels.get(RUN_ID_LABEL)),
            flow_run_id=self.flow_run_id,
            message=(flow_run.state.message if flow_run.state else None) or "",
            experiment_id=_text(labels.get(EXPERIMENT_ID_LABEL)),
            tracking_uri=_text(labels.get(TRACKING_URI_LABEL)),
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
                # Long waits are cut: an event that got lost costs half a minute then, not the whole wait.
                await wait_for_flow_run(self._id, timeout=max(1, math.ceil(min(remaining, 30))), client=client)
            except FlowRunWaitTimeout:
                continue
            except Exception as error:  # noqa: BLE001 - the server may be away for a while; reading it again tells
                _logger.debug("Waiting for flow run %s was interrupted: %s", self._id, error)
                await asyncio.sleep(1)

    def cancel(self) -> None:
        """Asks Prefect to cancel the run and waits until it has ended.

        The process that runs the flow ends it. Where that process is gone, nobody does: after the grace period and half a
        minute more, the flow run and the MLflow run are marked as ended from here.
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

        message = "No process was left that ran this flow run; it was marked as cancelled."
        await client.set_flow_run_state(self._id, Cancelled(message=message), force=True)

    def _mark_mlflow_run_killed(self, flow_run: FlowRun) -> None:
        from prefect_mlprojects._support.secrets import Secret
        from prefect_mlprojects.tracking import TrackedRun, Tracker, display_uri, resolve_tracking_uri

        run_id, shown_uri = flow_run.labels.get(RUN_ID_LABEL), flow_run.labels.get(TRACKING_URI_LABEL)
        if not run_id or not shown_uri:
            return
        # The label has no password; this process may know the same store with it.
        own = resolve_tracking_uri()
        tracking_uri = own if display_uri(own) == shown_uri else Secret(str(shown_uri))
        experiment_id = str(flow_run.labels.get(EXPERIMENT_ID_LABEL, ""))
        try:
            Tracker().finish(TrackedRun(str(run_id), experiment_id, tracking_uri), "KILLED")
        except ExecutionException as error:
            _logger.warning("The MLflow run %s could not be marked as KILLED: %s", run_id, error)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
