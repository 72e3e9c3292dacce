"""Errors keep their attributes when pickled, and list all problems."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from prefect_mlprojects.exceptions import (
    BackendError,
    BackendUnavailableError,
    EnvironmentBuildError,
    ExecutionException,
    FetchError,
    InvalidEnvironmentError,
    InvalidInputError,
    InvalidTrackingError,
    ParameterError,
    PrefectServerError,
    Problem,
    ProjectSpecError,
    RunCancelled,
    RunFailed,
    RunTimedOut,
    SourceUnavailableError,
    TrackingError,
)

PROBLEMS = [Problem("bad", Path("MLproject"), 3, "fix it"), Problem("worse", parameter="alpha", value="x")]


@pytest.mark.parametrize(
    ("error", "exit_status"),
    [
        (ExecutionException("plain"), 1),
        (InvalidInputError("no such block"), 2),
        (ProjectSpecError("Project can't be loaded", PROBLEMS), 2),
        (ParameterError("Parameters do not fit", PROBLEMS[:1]), 2),
        (FetchError("gone", uri="x"), 2),
        (SourceUnavailableError("unreachable", uri="x"), 1),
        (EnvironmentBuildError("no", manager="uv", output_tail=["a", "b"]), 1),
        (InvalidEnvironmentError("no", manager="mamba"), 2),
        (BackendError("no", backend="moon"), 2),
        (BackendUnavailableError("no", backend="moon"), 1),
        (TrackingError("no", tracking_uri="http://x"), 1),
        (InvalidTrackingError("no", tracking_uri="http://x"), 2),
        (PrefectServerError("no", api_url="http://y"), 1),
        (RunFailed("no", exit_code=3, run_id="r", flow_run_id="f", output_tail=["z"]), 1),
        (RunFailed("no", signal=9), 1),
        (RunCancelled("no", run_id="r"), 130),
        (RunTimedOut("no", timeout=1.5), 1),
    ],
)
def test_errors_keep_their_attributes_when_pickled(error: ExecutionException, exit_status: int) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert copy.exit_status == exit_status
    assert type(copy) is type(error)
    assert copy.message == error.message == str(error)
    assert copy.__dict__ == error.__dict__


def test_the_message_lists_all_problems_with_their_locations() -> None:
    assert str(ProjectSpecError("It fails", PROBLEMS)) == "It fails:\n  - MLproject:3: bad (fix it)\n  - worse"
    assert str(ParameterError("It fails", PROBLEMS[:1])) == "It fails: MLproject:3: bad (fix it)"
