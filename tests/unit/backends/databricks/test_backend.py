from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.backends.base import BackendCall
from prefect_mlprojects.backends.databricks.backend import DatabricksBackend
from prefect_mlprojects.backends.databricks.task import remote_variables
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.spec import (
    build_command,
    check_parameters,
    find_entry_point,
    load_project,
    spark_job_entry_point,
)

CLUSTER = {"new_cluster": {"spark_version": "15.4.x-scala2.12", "num_workers": 1}}


def a_call(folder: Path, text: str, **fields: Any) -> tuple[BackendCall, str]:
    (folder / "MLproject").write_text(text)
    project = load_project(folder)
    entry_point = spark_job_entry_point(project, "main") or find_entry_point(project, "main")
    parameters = check_parameters(entry_point, {})
    copy = WorkingCopy(directory=folder, uri=str(folder), kind="local", source_name=str(folder))
    values = {"config": CLUSTER, "tracking_uri": "databricks://staging", **fields}
    return BackendCall(project, entry_point, parameters, copy, **values), build_command(entry_point, parameters)


def planned(call: BackendCall, command: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(DatabricksBackend().plan(call, command)["submission"])
    return body


def test_a_spark_job_runs_its_python_file(tmp_path: Path) -> None:
    text = "name: j\ndatabricks_spark_job:\n  python_file: job.py\n  parameters: [a, b]\n  python_libraries: [six==1.16.0]\n"

    task = planned(*a_call(tmp_path, text))["tasks"][0]

    argument = json.loads(task["spark_python_task"]["parameters"][0])
    assert argument["spark_job"] == {"file": "job.py", "parameters": ["a", "b"]}
    assert argument["variables"] == {"MLFLOW_TRACKING_URI": "databricks"}
    assert task["libraries"] == [{"pypi": {"package": "six==1.16.0"}}]


def test_a_spark_jobs_entry_point_must_be_a_python_command(tmp_path: Path) -> None:
    text = "name: j\ndatabricks_spark_job:\n  python_libraries: []\nentry_points:\n  main: {command: bash run.sh}\n"

    with pytest.raises(BackendError, match="only supports 'python' command"):
        planned(*a_call(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("docker_env: {image: busybox}\n", {}, "wants a Docker container"),
        ("", {"config": {}}, "Backend spec must be provided"),
        ("", {"tracking_uri": "sqlite:////x.db"}, "Got local tracking URI"),
        ("", {"tracking_uri": "https://ada:geheim@mlflow.example.com"}, "secret scope"),
        ("", {"config": {**CLUSTER, "git-source": True}}, "git-source can't be used"),
    ],
)
def test_what_can_not_work_is_refused(tmp_path: Path, text: str, fields: dict[str, Any], message: str) -> None:
    call, command = a_call(tmp_path, text + "entry_points:\n  main: {command: python a.py}\n", **fields)

    with pytest.raises(BackendError, match=message) as caught:
        planned(call, command)

    assert "geheim" not in caught.value.message


def test_paths_are_placed_as_the_driver_sees_them(tmp_path: Path) -> None:
    call, _ = a_call(tmp_path, "entry_points:\n  main: {command: python a.py}\n")
    backend = DatabricksBackend()

    placed = backend.place_paths(call, {"a": "dbfs:/data/x.csv", "b": str(tmp_path / "data/y.csv")})

    assert placed == {"a": "/dbfs/data/x.csv", "b": "data/y.csv"}
    for value in ("s3://bucket/x", "/elsewhere/y"):
        with pytest.raises(BackendError, match="declare the parameter as uri"):
            backend.place_paths(call, {"a": value})


def test_no_secret_is_among_the_variables() -> None:
    found = remote_variables(
        {"MLFLOW_RUN_ID": "r", "DATABRICKS_TOKEN": "geheim", "PREFECT_API_URL": "http://u:geheim@h"},
        "https://ada:geheim@mlflow.example.com",
    )

    assert found == {"MLFLOW_RUN_ID": "r", "MLFLOW_TRACKING_URI": "https://mlflow.example.com"}
