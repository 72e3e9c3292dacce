"""Errors keep their attributes when pickled, and list all problems."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from prefect_mlprojects.exceptions import (
    BackendError,
    EnvironmentBuildError,
    ExecutionException,
    FetchError,
    ParameterError,
    PrefectServerError,
    Problem,
    ProjectSpecError,
    RunCancelled,
    RunFailed,
    RunTimedOut,
    TrackingError,
)

PROBLEMS = [Problem("bad", Path("MLproject"), 3, "fix it"), Problem("worse", parameter="alpha", value="x")]


@pytest.mark.parametrize(
    "error",
    [
        ExecutionException("plain"),
        ProjectSpecError("Project can't be loaded", PROBLEMS),
        ParameterError("Parameters do not fit", PROBLEMS[:1]),
        FetchError("gone", uri="x"),
        EnvironmentBuildError("no", manager="uv", output_tail=["a", "b"]),
        BackendError("no", backend="moon"),
        TrackingError("no", tracking_uri="http://x"),
        PrefectServerError("no", api_url="http://y"),
        RunFailed("no", exit_code=3, run_id="r", flow_run_id="f", output_tail=["z"]),
        RunFailed("no", signal=9),
        RunCancelled("no", run_id="r"),
        RunTimedOut("no", timeout=1.5),
    ],
)
def test_errors_keep_their_attributes_when_pickled(error: ExecutionException) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.message == error.message == str(error)
    assert copy.__dict__ == error.__dict__


def test_the_message_lists_all_problems_with_their_locations() -> None:
    assert str(ProjectSpecError("It fails", PROBLEMS)) == "It fails:\n  - MLproject:3: bad (fix it)\n  - worse"
    assert str(ParameterError("It fails", PROBLEMS[:1])) == "It fails: MLproject:3: bad (fix it)"
