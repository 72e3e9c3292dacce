"""The handle on a flow run of any process; Prefect is imported when it first waits or cancels."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects.exceptions import ExecutionException, InvalidInputError
from prefect_mlprojects.request import (
    CATEGORY_LABEL,
    CAUSE_LABEL,
    EXIT_CODE_LABEL,
    EXPERIMENT_ID_LABEL,
    RUN_ID_LABEL,
    TRACKING_URI_LABEL,
)
from prefect_mlprojects.runs.handles import SubmittedRun, run_status
from prefect_mlprojects.runs.presentation import RunView
from prefect_mlprojects.server.api import call_api, flow_run_url
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.types import FailureCategory, RunStatus

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from prefect_mlprojects.tasks.session import RunResult

_logger = logging.getLogger(__name__)

_VIEW_SECONDS = 2.0
"""How long showing a handle waits for the server."""


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

    def _view(self) -> RunView:
        from prefect_mlprojects.runs.records import RunRecord
        from prefect_mlprojects.server.rest import RestApi

        found = RestApi(self._api.api_url, timeout=_VIEW_SECONDS).get(f"/flow_runs/{self._id}")
        if found is None:
            return RunView(self.flow_run_id, "deleted", url=self.url)
        record = RunRecord.from_json(found)
        return RunView(
            self.flow_run_id,
            record.shown_status,
            record.name,
            record.message if record.status != "FINISHED" else "",
            record.duration,
            record.parameters,
            dict([record.metric]) if record.metric else {},
            self.url,
            _text(record.labels.get(RUN_ID_LABEL)),
            record.mlflow_page()[0],
            live=record.status == "RUNNING",
        )

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
