"""What a repeated run asks for."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from prefect_mlprojects.exceptions import ParameterError
from prefect_mlprojects.request import (
    COMMIT_LABEL,
    METRIC_LABEL,
    METRIC_VALUE_LABEL,
    SECRETS_LABEL,
    SOURCE_LABEL,
    RunRequest,
)
from prefect_mlprojects.runs.records import RunRecord
from prefect_mlprojects.runs.references import short_ids
from prefect_mlprojects.runs.repeat import repeated_arguments

DATA: dict[str, Any] = {
    "id": "2eb80103-33bd-4e85-abd0-af9e04f70df2",
    "name": "churn/main",
    "state_type": "FAILED",
    "state_name": "TimedOut",
    "state": {"message": "why"},
    "created": "2026-11-27T10:38:22.191819Z",
    "expected_start_time": None,
    "start_time": "2026-11-27T10:38:22Z",
    "end_time": "2026-11-27T10:38:24.5+00:00",
}


def record(request: dict[str, Any], **labels: Any) -> RunRecord:
    return RunRecord.from_json({**DATA, "parameters": request, "labels": labels})


def git_run(**others: Any) -> RunRecord:
    request = RunRequest("https://host/churn", version="main", parameters={"a": 1, "b": "x"}, run_id="r", retries=2)
    return record(request.flow_parameters(), **{SOURCE_LABEL: "git", COMMIT_LABEL: "c" * 40, **others})


def test_record_has_status_times_and_metric() -> None:
    read = record(
        {"parameters": {"a": 1}, "extra_parameters": {"z": 2}}, **{METRIC_LABEL: "rmse", METRIC_VALUE_LABEL: "nan"}
    )
    assert (read.status, read.state_detail, read.message) == ("FAILED", "TimedOut", "why")
    assert read.parameters == {"a": 1, "z": 2}
    assert read.duration == 2.5
    assert read.created == datetime(2026, 11, 27, 10, 38, 22, 191819, timezone.utc)
    assert read.started is not None
    assert read.started.utcoffset() == timedelta()
    assert read.metric is not None
    assert str(read.metric[1]) == "nan"


def test_repeated_run_has_the_commit_and_the_same_options() -> None:
    arguments = repeated_arguments(git_run(), {})
    assert arguments["version"] == "c" * 40
    assert (arguments["parameters"], arguments["retries"]) == ({"a": 1, "b": "x"}, 2)
    # It would be appended to the earlier MLflow run.
    assert arguments["run_id"] is None


def test_given_values_replace_those_of_the_run() -> None:
    given = {"parameters": {"b": "y", "c": "z"}, "version": "v2", "retries": 0}
    arguments = repeated_arguments(git_run(), given)
    assert arguments["parameters"] == {"a": 1, "b": "y", "c": "z"}
    assert (arguments["version"], arguments["retries"]) == ("v2", 0)


def test_folder_is_repeated_as_it_is() -> None:
    run = record(RunRequest("/some/folder").flow_parameters(), **{SOURCE_LABEL: "local", COMMIT_LABEL: "c" * 40})
    assert repeated_arguments(run, {})["version"] is None


def test_other_backend_or_experiment_drops_what_belonged_to_it() -> None:
    request = RunRequest("u", backend="kubernetes", backend_config={"namespace": "x"}, experiment_id="3")
    run = record(request.flow_parameters())
    assert repeated_arguments(run, {})["backend_config"] == {"namespace": "x"}
    assert "backend_config" not in repeated_arguments(run, {"backend": "local"})
    assert "experiment_id" not in repeated_arguments(run, {"experiment_name": "y"})


def test_undeclared_parameters_of_a_deployments_run_are_kept() -> None:
    run = record({"uri": "u", "parameters": {"a": 1}, "extra_parameters": {"z": 2}})
    assert repeated_arguments(run, {})["parameters"] == {"a": 1, "z": 2}


@pytest.mark.parametrize(
    ("stored", "secret", "given", "words"),
    [
        ({}, "uri", {"git_credentials": "host"}, "--git-credentials NAME"),
        ({}, "docker_auth", {"backend_config": "docker/x"}, "-c TYPE/NAME"),
        ({"uri": "https://h/x.zip?token=***"}, "", None, "its password or token"),
        ({"parameters": {"token": "***", "a": 1}}, "", {"parameters": {"token": "x"}}, "-P token=VALUE"),
        ({"docker_args": {"e": ["TOKEN=***"]}}, "", {"docker_args": {"e": "TOKEN=x"}}, "-A e=VALUE"),
        (
            {"backend_config": {"credentials": "***"}},
            "",
            {"backend_config": "kubernetes-job/x"},
            "'credentials' in the backend's",
        ),
    ],
)
def test_what_was_in_memory_must_be_given_again(
    stored: dict[str, Any], secret: str, given: dict[str, Any] | None, words: str
) -> None:
    run = record({"uri": "u", **stored}, **{SECRETS_LABEL: secret})
    with pytest.raises(ParameterError, match="was kept in memory") as caught:
        repeated_arguments(run, {})
    assert words in caught.value.message
    if given is not None:
        repeated_arguments(run, given)


def test_short_ids_tell_runs_of_the_same_minute_apart() -> None:
    others = [{**DATA, "id": f"01a21c95-b489-74e5-914b-867d6f3a403{digit}"} for digit in "15"]
    ids = short_ids([RunRecord.from_json(each) for each in (DATA, *others)])
    assert len(set(ids.values())) == 3
    assert short_ids([RunRecord.from_json(DATA)]) == {DATA["id"]: "2eb80103"}
