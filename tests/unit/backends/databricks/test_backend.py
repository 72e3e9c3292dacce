from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.databricks.backend import DatabricksBackend
from prefect_mlprojects.backends.databricks.config import DatabricksRequest
from prefect_mlprojects.backends.databricks.storage import check_size
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


def a_call(folder: Path, text: str, **fields: Any) -> tuple[DatabricksRequest, str]:
    (folder / "MLproject").write_text(text)
    project = load_project(folder)
    entry_point = spark_job_entry_point(project, "main") or find_entry_point(project, "main")
    parameters = check_parameters(entry_point, {})
    copy = WorkingCopy(directory=folder, uri=str(folder), kind="local", source_name=str(folder))
    copy = fields.pop("working_copy", copy)
    config = DatabricksBackend().parse_config(fields.pop("config", CLUSTER))
    uri = Secret(fields.pop("tracking_uri", "databricks://staging"))
    request = DatabricksRequest(project, entry_point, parameters, copy, config, uri, **fields)
    return request, build_command(entry_point, parameters)


def planned(call: DatabricksRequest, command: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(DatabricksBackend().plan(call, command).sections["submission"])
    return body


def test_spark_job_runs_its_python_file(tmp_path: Path) -> None:
    text = "name: j\ndatabricks_spark_job:\n  python_file: job.py\n  parameters: [a, b]\n  python_libraries: [six==1.16.0]\n"

    task = planned(*a_call(tmp_path, text))["tasks"][0]

    argument = json.loads(task["spark_python_task"]["parameters"][0])
    assert argument["spark_job"] == {"file": "job.py", "parameters": ["a", "b"]}
    assert argument["variables"] == {"MLFLOW_TRACKING_URI": "databricks"}
    assert task["libraries"] == [{"pypi": {"package": "six==1.16.0"}}]


def test_spark_job_entry_point_without_python_command_raises(tmp_path: Path) -> None:
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
def test_unsupported_project_or_config_raises(tmp_path: Path, text: str, fields: dict[str, Any], message: str) -> None:
    call, command = a_call(tmp_path, text + "entry_points:\n  main: {command: python a.py}\n", **fields)

    with pytest.raises(BackendError, match=message) as caught:
        planned(call, command)

    assert "geheim" not in caught.value.message


GIT = {"git-source": True, **CLUSTER}
URL = "https://github.com/ada/project.git"


def a_git_call(folder: Path, text: str, uri: str = URL, **fields: Any) -> tuple[DatabricksRequest, str]:
    facts = {"commit": "0" * 40, "repository_url": URL, **fields}
    return a_call(folder, text, config=GIT, working_copy=WorkingCopy(folder, uri, "git", uri, **facts))


@pytest.mark.parametrize(
    ("text", "uri", "python_file", "parameters"),
    [
        ("entry_points:\n  main: {command: python a.py 'Ada; x' \"b c\"}\n", URL, "a.py", ["Ada; x", "b c"]),
        ("entry_points:\n  main: {command: python3 a.py}\n", f"{URL}#sub/folder", "sub/folder/a.py", []),
        ("databricks_spark_job: {python_file: job.py, parameters: [a, 'b c']}\n", URL, "job.py", ["a", "b c"]),
    ],
)
def test_git_project_includes_its_commit(
    tmp_path: Path, text: str, uri: str, python_file: str, parameters: list[str]
) -> None:
    body = planned(*a_git_call(tmp_path, text, uri))

    assert body["git_source"] == {"git_url": URL, "git_provider": "gitHub", "git_commit": "0" * 40}
    task = body["tasks"][0]["spark_python_task"]
    assert task == {"python_file": python_file, "parameters": parameters, "source": "GIT"}


@pytest.mark.parametrize(
    ("command", "fields", "message"),
    [
        ("python a.py", {"dirty": True}, "without uncommitted changes"),
        ("python a.py", {"repository_url": "https://git.example.com/x.git"}, "no git provider"),
        ("bash a.sh", {}, "one plain command"),
        *(
            (f"python a.py {shell}", {}, "one plain command")
            for shell in ("&& x", "> f", "$HOME", "`x`", "*.csv", "; x")
        ),
    ],
)
def test_git_project_that_databricks_cannot_check_out_raises(
    tmp_path: Path, command: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        planned(*a_git_call(tmp_path, f"entry_points:\n  main:\n    command: {json.dumps(command)}\n", **fields))


def test_command_above_length_limit_raises(tmp_path: Path) -> None:
    call, command = a_call(tmp_path, "entry_points:\n  main: {command: python a.py}\n")

    with pytest.raises(BackendError, match="Databricks accepts 9500"):
        planned(call, command + " x" * 5000)


def test_archive_above_size_limit_suggests_volume() -> None:
    with pytest.raises(BackendError, match="set code-path to a volume"):
        check_size("/Workspace/Users/ada/x", (500 << 20) + 1)

    check_size("/Workspace/Users/ada/x", 500 << 20)
    check_size("/Volumes/main/ml/code", 5000 << 20)


def test_paths_are_placed_as_the_driver_sees_them(tmp_path: Path) -> None:
    call, _ = a_call(tmp_path, "entry_points:\n  main: {command: python a.py}\n")
    backend = DatabricksBackend()

    placed = backend.map_paths(
        call, {"a": "dbfs:/data/x.csv", "b": str(tmp_path / "data/y.csv"), "c": "dbfs:/Volumes/m/l/c/z"}
    )

    assert placed == {"a": "/dbfs/data/x.csv", "b": "data/y.csv", "c": "/Volumes/m/l/c/z"}
    for value in ("s3://bucket/x", "/elsewhere/y"):
        with pytest.raises(BackendError, match="declare the parameter as uri"):
            backend.map_paths(call, {"a": value})


def test_remote_variables_contain_no_secret() -> None:
    found = remote_variables(
        {"MLFLOW_RUN_ID": "r", "DATABRICKS_TOKEN": "geheim", "PREFECT_API_URL": "http://u:geheim@h"},
        "https://ada:geheim@mlflow.example.com",
    )

    assert found == {"MLFLOW_RUN_ID": "r", "MLFLOW_TRACKING_URI": "https://mlflow.example.com"}
