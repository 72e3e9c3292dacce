"""The double itself refuses what Databricks refuses: through the real SDK."""

from __future__ import annotations

import io
from typing import Any

import databricks.sdk.errors as errors
import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.core import Config, DatabricksError
from databricks.sdk.service import compute, jobs
from databricks.sdk.service import workspace as files
from tests.fakes.databricks_api import USER, FakeWorkspace
from tests.integration.databricks.bench import CLUSTER


@pytest.fixture
def client(workspace: FakeWorkspace) -> WorkspaceClient:
    return WorkspaceClient()


def a_task(**fields: Any) -> jobs.SubmitTask:
    values: dict[str, Any] = {
        "task_key": "t",
        "new_cluster": compute.ClusterSpec.from_dict(CLUSTER),
        "spark_python_task": jobs.SparkPythonTask(f"/Workspace/Users/{USER}/a.py"),
    }
    return jobs.SubmitTask(**{**values, **fields})


def submitted(client: WorkspaceClient, **fields: Any) -> int:
    waiter: Any = client.jobs.submit(tasks=[a_task()], **fields)
    return int(waiter.run_id)


def upload(client: WorkspaceClient, text: str) -> None:
    client.workspace.upload(
        f"/Users/{USER}/a.py", io.BytesIO(text.encode()), format=files.ImportFormat.RAW, overwrite=True
    )


def test_submitted_task_runs_and_returns_output(client: WorkspaceClient) -> None:
    upload(client, "print('hello')")

    run = client.jobs.submit(tasks=[a_task()], run_name="n").result()

    assert run.state is not None
    assert run.state.result_state is jobs.RunResultState.SUCCESS
    assert run.tasks is not None
    assert run.tasks[0].run_id is not None
    assert client.jobs.get_run_output(run.tasks[0].run_id).logs == "hello\n"
    assert run.run_id is not None
    with pytest.raises(errors.InvalidParameterValue, match="multiple tasks"):
        client.jobs.get_run_output(run.run_id)
    with pytest.raises(errors.ResourceDoesNotExist):
        client.jobs.get_run(1)


def test_idempotency_token_is_submitted_once(client: WorkspaceClient) -> None:
    upload(client, "")

    assert submitted(client, idempotency_token="x") == submitted(client, idempotency_token="x")
    with pytest.raises(errors.InvalidParameterValue, match="64 characters"):
        client.jobs.submit(tasks=[a_task()], idempotency_token="x" * 65)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tasks": [], "shell_command_task": {}}, "no 'shell_command_task'"),
        (
            {"tasks": [{"task_key": "t", "spark_python_task": {"python_file": "/Workspace/a.py"}}]},
            "exactly one kind of compute",
        ),
        ({"tasks": [{"task_key": "t", "new_cluster": {"sparkversion": "1"}}]}, "no 'sparkversion'"),
        ({"tasks": [{"task_key": 5}]}, "to be str"),
        (
            {"tasks": [{"task_key": "t", "new_cluster": CLUSTER, "spark_python_task": {"python_file": "/tmp/a.py"}}]},
            "Invalid python file reference",
        ),
    ],
)
@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_strange_submissions_are_refused(
    client: WorkspaceClient, body: dict[str, Any], message: str, version: str
) -> None:
    with pytest.raises(errors.BadRequest, match=message):
        client.api_client.do("POST", f"/api/{version}/jobs/runs/submit", body=body)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/2.0/jobs/runs/submit"), ("GET", "/api/2.2/jobs/runs/submit")]
)
def test_wrong_paths_are_refused(client: WorkspaceClient, method: str, path: str) -> None:
    with pytest.raises(errors.NotFound, match="No API found"):
        client.api_client.do(method, path, body={})


def test_runs_are_listed_in_pages(client: WorkspaceClient, workspace: FakeWorkspace) -> None:
    workspace.drivers.hold = "QUEUED"
    upload(client, "")
    expected = {submitted(client) for _ in range(30)}

    assert {each.run_id for each in client.jobs.list_runs(active_only=True, limit=7)} == expected
    assert list(client.jobs.list_runs(completed_only=True)) == []
    with pytest.raises(errors.InvalidParameterValue, match="between 0 and 25"):
        list(client.jobs.list_runs(limit=26))


def test_runs_of_others_are_not_shown(client: WorkspaceClient, workspace: FakeWorkspace) -> None:
    upload(client, "")
    seen = jobs.JobAccessControlRequest(user_name="bob@example.com", permission_level=jobs.JobPermissionLevel.CAN_VIEW)
    secret = submitted(client)
    shown = submitted(client, access_control_list=[seen])
    bob = WorkspaceClient(host=workspace.host, token=workspace.people.grant("bob@example.com"))

    assert [each.run_id for each in bob.jobs.list_runs()] == [shown]
    with pytest.raises(errors.PermissionDenied):
        bob.jobs.get_run(secret)


def test_files_are_refused_as_they_should(client: WorkspaceClient, workspace: FakeWorkspace) -> None:
    upload(client, "1")
    raw = files.ImportFormat.RAW
    with pytest.raises(DatabricksError, match="already exists"):
        client.workspace.upload(f"/Users/{USER}/a.py", io.BytesIO(b""), format=raw)
    with pytest.raises(errors.NotFound, match="parent folder"):
        client.workspace.upload(f"/Users/{USER}/no/a.py", io.BytesIO(b""), format=raw)
    with pytest.raises(errors.BadRequest, match="not empty"):
        client.workspace.delete(f"/Users/{USER}")
    with pytest.raises(errors.NotFound, match="does not exist"):
        client.files.upload("/Volumes/main/ml/none/a", io.BytesIO(b""))
    client.files.upload("/Volumes/main/ml/code/a", io.BytesIO(b""))
    with pytest.raises(errors.AlreadyExists):
        client.files.upload("/Volumes/main/ml/code/a", io.BytesIO(b""))
    client.dbfs.put("/a", contents="", overwrite=False)
    with pytest.raises(DatabricksError, match="already exists"):
        client.dbfs.put("/a", contents="", overwrite=False)
    with pytest.raises(DatabricksError, match="1 MB"):
        client.dbfs.read("/a", length=2 << 20)


def test_volume_listing_is_paginated(client: WorkspaceClient) -> None:
    for number in range(5):
        client.files.upload(f"/Volumes/main/ml/code/{number}", io.BytesIO(b"x"))

    found = list(client.files.list_directory_contents("/Volumes/main/ml/code", page_size=2))

    assert [each.name for each in found] == ["0", "1", "2", "3", "4"]


def test_clusters_are_known_or_not(client: WorkspaceClient) -> None:
    assert client.clusters.get("c-1").cluster_name == "shared"
    with pytest.raises(errors.ResourceDoesNotExist):
        client.clusters.get("c-2")


def test_rate_limit_raises_too_many_requests(client: WorkspaceClient, workspace: FakeWorkspace) -> None:
    workspace.rate_limit = 0

    with pytest.raises(TimeoutError) as caught:
        WorkspaceClient(config=Config(retry_timeout_seconds=1)).current_user.me()

    assert isinstance(caught.value.__cause__, errors.TooManyRequests)
