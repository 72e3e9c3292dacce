"""A container's environment, and the explanation of its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects.backends.docker.container_env import container_env
from prefect_mlprojects.backends.docker.containers import explain_end, explain_start_failure
from prefect_mlprojects.exceptions import BackendError


def test_local_store_is_mounted_under_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    found = container_env({"MLFLOW_TRACKING_URI": uri}, {}, engine_is_here=True, network=None)

    assert (found.variables["MLFLOW_TRACKING_URI"], found.volumes) == (uri, (f"{tmp_path}:{tmp_path}",))
    assert not found.host_network
    with pytest.raises(BackendError, match="its containers can't reach the store"):
        container_env({"MLFLOW_TRACKING_URI": uri}, {}, engine_is_here=False, network=None)
    with pytest.raises(BackendError, match="can't be mounted"):
        container_env({"MLFLOW_TRACKING_URI": "sqlite:////etc/mlflow.db"}, {}, engine_is_here=True, network=None)


def test_artifacts_of_the_working_directory_are_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "mlruns").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    found = container_env({"MLFLOW_TRACKING_URI": uri}, {}, engine_is_here=True, network=None)

    runs = tmp_path / "work" / "mlruns"
    assert found.volumes == (f"{tmp_path / 'store'}:{tmp_path / 'store'}", f"{runs}:{runs}")


def test_server_on_localhost_is_reached_by_each_network() -> None:
    variables = {
        "MLFLOW_TRACKING_URI": "http://me:secret@localhost:5000/x",
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
    }
    shared = container_env(variables, {}, engine_is_here=True, network=None)
    bridged = container_env(variables, {}, engine_is_here=True, network="bridge")
    remote = container_env(variables, {}, engine_is_here=True, network="my-net")

    assert shared.host_network
    assert dict(shared.variables) == variables
    assert bridged.variables["MLFLOW_TRACKING_URI"] == "http://me:secret@host.docker.internal:5000/x"
    assert bridged.variables["PREFECT_API_URL"] == "http://host.docker.internal:4200/api"
    assert bridged.extra_hosts == {"host.docker.internal": "host-gateway"}
    assert dict(remote.variables) == variables
    assert "secret" not in repr(shared)


def test_remote_server_is_passed_on() -> None:
    found = container_env({"MLFLOW_TRACKING_URI": "https://mlflow.example.com"}, {}, engine_is_here=False, network=None)

    assert (found.volumes, found.host_network, dict(found.extra_hosts)) == ((), False, {})


def test_credentials_are_passed_on_by_name(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text("{}")
    environ = {
        "AWS_SECRET_ACCESS_KEY": "s",
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json"),
        "HOME": "/root",
    }
    found = container_env({}, environ, engine_is_here=True, network=None)

    assert dict(found.variables) == {
        "AWS_SECRET_ACCESS_KEY": "s",
        "GOOGLE_APPLICATION_CREDENTIALS": "/mlflow/credentials/key.json",
    }
    assert found.volumes == (f"{tmp_path / 'key.json'}:/mlflow/credentials/key.json:ro",)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"ExitCode": 0}, "exit code 0"),
        ({"ExitCode": 3}, "exit code 3"),
        ({"ExitCode": 137, "OOMKilled": True}, "out of memory"),
        ({"ExitCode": 143}, "SIGTERM"),
        ({"ExitCode": 127, "Error": 'exec: "sh": executable file not found in $PATH'}, "no shell"),
    ],
)
def test_explain_end_names_the_cause(state: dict[str, object], words: str) -> None:
    assert words in explain_end(state).cause


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("No such image: x:1", "the engine has no such image"),
        ('could not select device driver "" with capabilities: [[gpu]]', "no driver for the devices"),
        ("driver failed: Bind for 0.0.0.0:80 failed: port is already allocated", "a port is in use"),
        ('Conflict. The container name "/x" is already in use by container "1"', "another container has that name"),
        ("network nowhere not found", "network"),
        ("something new", "the engine refused it: something new"),
    ],
)
def test_explain_start_failure_names_the_cause(message: str, words: str) -> None:
    assert words in explain_start_failure(message).cause
