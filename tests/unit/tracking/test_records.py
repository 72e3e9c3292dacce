from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import TrackingRequest
from prefect_mlprojects.tracking._mlflow_internals import batches
from prefect_mlprojects.tracking.records import mlflow_advice, project_tags, storable, user_name

COPY = WorkingCopy(directory=Path("/p"), uri="/p", kind="local", source_name="file:///p")
REQUEST = TrackingRequest(tracking_uri=Secret("sqlite:////x.db"), working_copy=COPY, entry_point="main")


def test_project_tags_outside_git_are_minimal() -> None:
    assert project_tags(REQUEST) == {
        "mlflow.user": user_name(),
        "mlflow.source.name": "file:///p",
        "mlflow.source.type": "PROJECT",
        "mlflow.project.entryPoint": "main",
        "mlflow.project.backend": "local",
    }


def test_project_tags_complete_request_tags_all_fields() -> None:
    request = dataclasses.replace(
        REQUEST,
        working_copy=dataclasses.replace(
            COPY, commit="c" * 40, branch="trunk", repository_url="https://host/r", dirty=True
        ),
        environment="uv",
        backend="kubernetes",
        parent_run_id="parent",
        flow_run_id="f",
        flow_run_url="http://prefect/f",
    )

    assert project_tags(request) == {
        "mlflow.user": user_name(),
        "mlflow.source.name": "file:///p",
        "mlflow.source.type": "PROJECT",
        "mlflow.source.git.commit": "c" * 40,
        "mlflow.source.git.branch": "trunk",
        "mlflow.source.git.dirty": "true",
        "mlflow.source.git.repoURL": "https://host/r",
        "mlflow.project.entryPoint": "main",
        "mlflow.project.backend": "kubernetes",
        "mlflow.project.env": "uv",
        "mlflow.parentRunId": "parent",
        "prefect.flow_run_id": "f",
        "prefect.flow_run_url": "http://prefect/f",
    }


def test_project_tags_local_environment_is_not_tagged() -> None:
    assert "mlflow.project.env" not in project_tags(dataclasses.replace(REQUEST, environment="local"))


def test_project_tags_source_password_is_redacted() -> None:
    copy = dataclasses.replace(COPY, source_name="https://me:hunter2@host/r")

    tags = project_tags(dataclasses.replace(REQUEST, working_copy=copy))

    assert tags["mlflow.source.name"] == "https://me:***@host/r"


def test_user_name_unknown_user_id_is_unknown() -> None:
    # Such a user is what a container with `--user 12345` has.
    program = "from prefect_mlprojects.tracking.records import user_name; import os, pwd\n"
    program += "os.setuid(3123456) if os.getuid() == 0 else None; print(user_name())"
    environment = {n: v for n, v in os.environ.items() if n not in ("LOGNAME", "USER", "LNAME", "USERNAME")}

    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == ("unknown" if os.getuid() == 0 else user_name())


def test_storable_long_values_are_shortened_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert storable("parameter", {"a": "x" * 6000, "b": "y" * 6001}) == {"a": "x" * 6000, "b": "y" * 6000}
        assert storable("tag", {"t": "z" * 9000}) == {"t": "z" * 8000}

    assert [record.getMessage() for record in caplog.records] == [
        "The parameter 'b' has 6001 characters; MLflow records its first 6000.",
        "The tag 't' has 9000 characters; MLflow records its first 8000.",
    ]


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("plain", "plain"),
        ("with space", "with space"),
        ("a.b-c:d/e_f", "a.b-c:d/e_f"),
        ("größe", "größe"),
        ("a,b=c", "a_b_c"),
        ("line\nbreak", "line_break"),
        ("../up", "___up"),
        ("/abs", "_abs"),
        ("a//b", "a__b"),
        (".", "_"),
        ("k" * 300, "k" * 250),
    ],
)
def test_storable_forbidden_names_are_changed_with_a_warning(
    name: str, recorded: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert storable("parameter", {name: "1"}) == {recorded: "1"}

    assert bool(caplog.records) == (name != recorded)


def test_storable_changed_name_never_replaces_another(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert storable("parameter", {"a,b": "1", "a_b": "2", "a;b": "3"}) == {"a_b": "2"}

    assert "MLflow can't store a parameter named 'a,b'" in caplog.text


def test_storable_empty_name_is_left_out() -> None:
    assert storable("parameter", {"": "1", "b": "2"}) == {"b": "2"}


def test_storable_bytes_that_are_not_utf8_are_escaped() -> None:
    assert storable("parameter", {"a": "x\udcffy", "b": "\0"}) == {"a": "x\\udcffy", "b": "\\x00"}


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=260), st.text(max_size=50), max_size=8))
def test_storable_entries_are_accepted_by_mlflow(entries: dict[str, str]) -> None:
    from mlflow.utils import validation

    validate_param: Any = validation._validate_param
    validate_tag: Any = validation._validate_tag
    for name, value in storable("parameter", entries).items():
        assert validate_param(name, value).key == name
    for name, value in storable("tag", entries).items():
        assert validate_tag(name, value).key == name


@given(st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=6000), max_size=20))
def test_batches_hold_every_entry_once_and_in_order(entries: dict[str, str]) -> None:
    parts = list(batches(entries))

    assert [item for part in parts for item in part.items()] == list(entries.items())
    assert all(parts)


def test_batches_respect_limits_of_one_request() -> None:
    assert [len(part) for part in batches({str(n): "x" for n in range(250)})] == [100, 100, 50]
    # Characters that JSON writes as six.
    assert [len(part) for part in batches({str(n): "\u4e2d" * 6000 for n in range(30)})] == [13, 13, 4]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mlflow.exceptions.MlflowException: active experiment ID does not match environment run ID", "'experiment:'"),
        ("MlflowException: Changing param values is not allowed. Params were already logged=...", "declared as float"),
        ("Model registry functionality is unavailable; got unsupported URI 'sqlite:////x/mlflow.db' for", "sqlalchemy"),
        ("ValueError: x", ""),
    ],
)
def test_errors_of_mlflow_in_the_code_get_advice(line: str, words: str) -> None:
    advice = mlflow_advice(iter(["before", line, "after"]))
    assert words in advice
    assert bool(advice) == bool(words)
