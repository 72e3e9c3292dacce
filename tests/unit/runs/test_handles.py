"""The mapping of Prefect's states to MLflow's run statuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prefect import states
from prefect.client.schemas.objects import State, StateType

from prefect_mlprojects.runs.handles import run_status


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (states.Scheduled(), "RUNNING"),
        (states.Late(), "RUNNING"),
        (states.AwaitingRetry(), "RUNNING"),
        (states.Retrying(), "RUNNING"),
        (states.Pending(), "RUNNING"),
        (states.Running(), "RUNNING"),
        (states.Paused(), "RUNNING"),
        (states.Suspended(), "RUNNING"),
        (states.Cancelling(), "RUNNING"),
        (states.Completed(), "FINISHED"),
        (states.Failed(), "FAILED"),
        (states.Failed(name="TimedOut"), "FAILED"),
        (states.Crashed(), "FAILED"),
        (states.Cancelled(), "KILLED"),
        (State(type=StateType.COMPLETED, name="Never heard of"), "FINISHED"),
        (SimpleNamespace(type="EVAPORATED"), "RUNNING"),
        (None, "RUNNING"),
    ],
)
def test_state_maps_to_run_status(state: Any, status: str) -> None:
    assert run_status(state) == status


def test_final_state_types_are_all_mapped() -> None:
    final = {kind for kind in StateType if run_status(State(type=kind)) != "RUNNING"}
    assert final == {StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}
