"""Errors keep their attributes when pickled, and list all problems."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from databricks.sdk.errors import NotFound, Unauthenticated

from prefect_mlprojects.backends.databricks.config import DatabricksConfig
from prefect_mlprojects.backends.databricks.config import refused as databricks_refused
from prefect_mlprojects.backends.kubernetes.api import ApiError
from prefect_mlprojects.backends.kubernetes.diagnosis import refused as kubernetes_refused
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


def test_message_lists_all_problems_with_their_locations() -> None:
    assert str(ProjectSpecError("It fails", PROBLEMS)) == "It fails:\n  - MLproject:3: bad (fix it)\n  - worse"
    assert str(ParameterError("It fails", PROBLEMS[:1])) == "It fails: MLproject:3: bad (fix it)"


@pytest.mark.parametrize(("status", "exit_status"), [(404, 2), (422, 2), (0, 1), (401, 1), (403, 1), (500, 1)])
def test_refusal_of_kubernetes_has_exit_status(status: int, exit_status: int) -> None:
    error = ApiError("get jobs", status, "", "no", namespace="x")
    assert kubernetes_refused(error, "cluster").exit_status == exit_status


@pytest.mark.parametrize(
    ("error", "exit_status"), [(NotFound("no"), 2), (ValueError("no"), 2), (Unauthenticated("no"), 1), (OSError(), 1)]
)
def test_refusal_of_databricks_has_exit_status(error: Exception, exit_status: int) -> None:
    assert databricks_refused("It fails", error, DatabricksConfig()).exit_status == exit_status
