"""A marker is planted in every secret field of the backend's configuration; after runs of each outcome none may be found.

Searched are Prefect's database and server log, MLflow's store and artifacts, the process list during the runs, everything
printed, the caches and temporary folders, what errors, handles and results show or pickle to, the workspace's files, and the
parameters of the submitted tasks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.databricks_api import USER, FakeWorkspace
from tests.fakes.databricks_api.errors import Refusal
from tests.integration.databricks.bench import CLUSTER, FAST
from tests.services import git_server
from tests.services.git_server import serve_repository
from tests.services.mlflow_server import MlflowServer
from tests.services.secret_search import ENDS, House, leaks, marker

from prefect_mlprojects.blocks import (
    DatabricksBackendBlock,
    DatabricksWorkspace,
    GitCredentialsBlock,
    MLflowTrackingServer,
    MLprojectBackend,
)
from prefect_mlprojects.server.process import ServerAddress

MLPROJECT = """\
name: leaky
entry_points:
  main: {{command: "echo done"}}
  fail: {{command: "echo going down >&2; exit 3"}}
  sleep: {{command: "touch {started}; sleep 600"}}
"""
CREDENTIALS = ("token", "client_secret")
CLUSTER_SECRETS = ("docker", "variable", "opaque", "property", "log_analytics", "repository")
TRACKING = {"MLFLOW_TRACKING_USERNAME": "mlflow/user", "MLFLOW_TRACKING_PASSWORD": "mlflow/password"}


@pytest.fixture
def house(
    workspace: FakeWorkspace, tmp_path: Path, prefect_server: ServerAddress, mlflow_server: MlflowServer
) -> House:
    """The folders to search; the environment names the workspace and a tracking server, and holds no credentials."""
    house = House(tmp_path, prefect_server, mlflow_server)
    house.environment["MLFLOW_TRACKING_URI"] = mlflow_server.uri
    del house.environment["DATABRICKS_TOKEN"]
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "MLproject").write_text(MLPROJECT.format(started=tmp_path / "started"))
    return house


@pytest.fixture
def repository(house: House) -> Iterator[str]:
    """HOST:PORT of a server with the project as ``project.git``, behind a password."""
    with serve_repository(house.root / "work") as address:
        yield address


def credentials(workspace: FakeWorkspace, kind: str, secret: str) -> dict[str, str]:
    """Credentials of that kind, which the workspace accepts."""
    if kind == "token":
        workspace.people.tokens[secret] = USER
        return {"host": workspace.host, "token": secret}
    workspace.people.clients["robot"] = secret
    return {"host": workspace.host, "client_id": "robot", "client_secret": secret}


def cluster(secrets: dict[str, str]) -> dict[str, Any]:
    """A cluster with a secret in each place that takes one, and its libraries."""
    return {
        "new_cluster": {
            **CLUSTER,
            "docker_image": {"url": "acme/runtime", "basic_auth": {"username": "ci", "password": secrets["docker"]}},
            "spark_env_vars": {
                "STORE_PASSWORD": secrets["variable"],
                "STORE": secrets["opaque"],
                "SHARED": "{{secrets/mlflow/user}}",
            },
            "spark_conf": {"fs.azure.account.key.acme.dfs.core.windows.net": secrets["property"]},
            "azure_attributes": {"log_analytics_info": {"log_analytics_primary_key": secrets["log_analytics"]}},
        },
        "libraries": [{"maven": {"coordinates": "a:b:1", "repo": f"https://ci:{secrets['repository']}@maven.invalid"}}],
    }


def assert_nowhere(
    house: House, workspace: FakeWorkspace, secrets: dict[str, str], found: set[str], *, submitted: int
) -> None:
    """Checks that no secret was found, and that the tasks were submitted with them where Databricks needs them."""
    assert not found | leaks(secrets, *house.kept, workspace.root)
    assert len(workspace.runs) == submitted
    for run in workspace.runs.values():
        python = json.dumps([run.task["spark_python_task"], run.body["run_name"]])
        assert not [name for name, value in secrets.items() if value in python]
        sent = json.dumps([run.task["new_cluster"], run.task.get("libraries")])
        assert [name for name in CLUSTER_SECRETS if secrets[name] not in sent] == []


@pytest.mark.parametrize("kind", CREDENTIALS)
def test_secrets_given_to_run_are_stored_nowhere(
    house: House, workspace: FakeWorkspace, repository: str, kind: str
) -> None:
    control = marker("control")
    secrets = {"project": git_server.TOKEN, **{name: marker(name) for name in (kind, "tracking", *CLUSTER_SECRETS)}}
    workspace.secrets.values = {"mlflow": {"user": "ci", "password": secrets["tracking"]}}
    house.environment["MLFLOW_TRACKING_URI"] = house.mlflow_server.uri.replace("://", f"://ci:{secrets['tracking']}@")
    ends, found = house.run(
        f"http://{git_server.USER}:{git_server.TOKEN}@{repository}/project.git",
        secrets,
        "main",
        "fail",
        "sleep",
        env_manager="local",
        parameters={"control": control},
        backend="databricks",
        backend_config={
            **FAST,
            **cluster(secrets),
            "credentials": credentials(workspace, kind, secrets[kind]),
            "code-path": "/Volumes/main/ml/code/leaky",
            "secrets": TRACKING,
        },
    )

    assert ends == ENDS, (house.root / "stderr").read_text()
    assert_nowhere(house, workspace, secrets, found, submitted=3)
    # The search does find what is stored in the clear.
    assert any(str(house.mlflow_server.folder) in each for each in leaks({"control": control}, *house.kept))


def test_secrets_in_blocks_and_variables_are_stored_nowhere(
    house: House, workspace: FakeWorkspace, repository: str, save_block: Callable[[Any, str], None]
) -> None:
    secrets = {"project": git_server.TOKEN, **{name: marker(name) for name in ("token", "tracking", *CLUSTER_SECRETS)}}
    workspace.secrets.values = {"mlflow": {"user": "ci", "password": secrets["tracking"]}}
    name = marker("block").lower()
    save_block(GitCredentialsBlock.model_validate({"username": git_server.USER, "token": git_server.TOKEN}), name)
    tracking = {"uri": house.mlflow_server.uri, "username": "ci", "password": secrets["tracking"]}
    save_block(MLflowTrackingServer.model_validate(tracking), name)
    config = {**FAST, "secrets": TRACKING}
    save_block(MLprojectBackend.model_validate({"config": config, "secrets": cluster(secrets)}), name)
    house.environment["DATABRICKS_TOKEN"] = credentials(workspace, "token", secrets["token"])["token"]
    ends, found = house.run(
        f"http://{repository}/project.git",
        secrets,
        "main",
        "fail",
        "sleep",
        env_manager="local",
        git_credentials=name,
        tracking=name,
        backend="databricks",
        backend_config=f"mlproject-backend/{name}",
    )

    assert ends == ENDS, (house.root / "stderr").read_text()
    assert_nowhere(house, workspace, secrets, found, submitted=3)


@pytest.mark.parametrize("kind", CREDENTIALS)
def test_credentials_in_a_workspace_block_are_stored_nowhere(
    house: House, workspace: FakeWorkspace, save_block: Callable[[Any, str], None], kind: str
) -> None:
    secrets = {kind: marker(kind)}
    name = marker("block").lower()
    block = DatabricksWorkspace.model_validate(credentials(workspace, kind, secrets[kind]))
    save_block(block, name)
    config = {**FAST, "new_cluster": CLUSTER, "code-path": "/Volumes/main/ml/code/leaky"}
    save_block(DatabricksBackendBlock(config=config, workspace=block), name)
    options = {"env_manager": "local", "backend": "databricks"}
    ends, found = house.run(
        str(house.root / "work"), secrets, "fail", "sleep", **options, backend_config=f"databricks-backend/{name}"
    )

    assert ends == ENDS[1:], (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *house.kept, workspace.root)


def test_secrets_that_databricks_quotes_in_a_refusal_are_redacted(house: House, workspace: FakeWorkspace) -> None:
    secrets = {name: marker(name) for name in ("token", *CLUSTER_SECRETS)}
    config = {**FAST, **cluster(secrets), "credentials": credentials(workspace, "token", secrets["token"])}
    workspace.secrets.values = {"mlflow": {"user": "ci"}}
    quoted = " ".join(secrets.values())
    workspace.troubles.append(("runs/submit", Refusal(400, "INVALID_PARAMETER_VALUE", f"Invalid cluster: {quoted}")))
    options = {"env_manager": "local", "backend": "databricks", "backend_config": config}
    ends, found = house.run(str(house.root / "work"), secrets, "main", **options)

    assert ends == ["FAILED"]
    assert "Invalid cluster: ***" in (house.root / "stderr").read_text() + os.fsdecode(
        (house.root / "shown").read_bytes()
    )
    assert_nowhere(house, workspace, secrets, found, submitted=0)


def test_secrets_that_databricks_quotes_in_a_state_are_redacted(house: House, workspace: FakeWorkspace) -> None:
    secrets = {name: marker(name) for name in ("token", *CLUSTER_SECRETS)}
    config = {**FAST, **cluster(secrets), "credentials": credentials(workspace, "token", secrets["token"])}
    workspace.secrets.values = {"mlflow": {"user": "ci"}}
    workspace.fail("CLUSTER_ERROR", "CLIENT_ERROR", "The image can't be pulled: " + " ".join(secrets.values()))
    options = {"env_manager": "local", "backend": "databricks", "backend_config": config}
    ends, found = house.run(str(house.root / "work"), secrets, "main", **options)

    assert ends == ["FAILED"]
    assert_nowhere(house, workspace, secrets, found, submitted=1)
