"""Handles on flow runs: status, result, waiting and cancellation.

Prefect is imported when a handle first calls its API, so that importing this module is cheap.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import ExecutionException, PrefectServerError
from prefect_mlprojects.runs.presentation import RunView, display_live
from prefect_mlprojects.runs.records import STATUS_BY_STATE_TYPE
from prefect_mlprojects.server.api import flow_run_url
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.types import RunStatus

if TYPE_CHECKING:
    import concurrent.futures

    from prefect.client.schemas.objects import State

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
        from prefect_mlprojects.runs.attached import AttachedSubmittedRun

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

    @abstractmethod
    def _view(self) -> RunView:
        """Returns what is shown of the run, without waiting for it; may raise if the server does not answer."""

    def _safe_view(self) -> RunView:
        try:
            return self._view()
        except Exception as error:  # noqa: BLE001 - showing a handle never raises
            return RunView(self._flow_run_id, "status unknown", message=str(error), url=self._url)

    def __repr__(self) -> str:
        return self._safe_view().as_text(type(self).__name__)

    def _repr_html_(self) -> str:
        return self._safe_view().as_html()

    def _ipython_display_(self) -> None:
        display_live(self._safe_view, type(self).__name__)

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
        self,
        session: RunSession,
        future: concurrent.futures.Future[None],
        api_url: str,
        ui_url: str | None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        assert session.flow_run_id is not None, "handles are created once the flow run exists"
        super().__init__(session.flow_run_id, flow_run_url(ui_url, session.flow_run_id))
        self.session = session
        self._future = future
        self._api_url = api_url
        self._parameters = parameters or {}
        self._started = time.monotonic()
        self._seconds: float | None = None
        future.add_done_callback(lambda _: self._set_end())
        session.stop.on_request(session.wake)

    def _set_end(self) -> None:
        self._seconds = time.monotonic() - self._started

    def _view(self) -> RunView:
        session, status = self.session, self.get_status()
        result, tracked = session.result, session.tracked_run
        ended = status != "RUNNING" and result is not None
        return RunView(
            self.flow_run_id,
            "RUNNING (Cancelling)" if status == "RUNNING" and session.stop.requested else status,
            session.name,
            result.message if ended and result is not None else "",
            time.monotonic() - self._started if self._seconds is None else self._seconds,
            self._parameters,
            result.metrics if ended and result is not None else {},
            self.url,
            tracked.run_id if tracked is not None else None,
            tracked.url if tracked is not None else None,
            live=not ended,
        )

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
