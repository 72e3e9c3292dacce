"""Attacks by whoever may only start a deployment, end to end: through Prefect's API and a real worker; see SECURITY.md."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import api, use_server

from prefect_mlprojects import deploy
from prefect_mlprojects.server.process import ServerAddress

PROJECT = "name: NAME\nentry_points:\n  main:\n    parameters: {word: {type: string, default: a}}\n    command: 'echo got {word}'\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: ServerAddress) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "MLproject").write_text(PROJECT.replace("NAME", f"attacked-{uuid.uuid4().hex[:8]}"))
    monkeypatch.chdir(tmp_path)
    use_server(monkeypatch, prefect_server.api_url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return folder


def test_starter_can_set_nothing_but_the_form(project: Path, prefect_server: ServerAddress, tmp_path: Path) -> None:
    made = deploy(project, env_manager="local", backend_config={"grace-period": 3})
    client = api(prefect_server.api_url)

    def start(parameters: dict[str, Any], **more: Any) -> Any:
        return client.post(f"/deployments/{made.id}/create_flow_run", json={"parameters": parameters, **more})

    attacks: list[dict[str, Any]] = [
        {"docker_args": {"image": "evil"}},
        {"backend": "kubernetes"},
        {"backend_config": {"docker-host": "tcp://evil:2375"}},
        {"backend_config": "local-config/mine"},
        {"version": "evil"},
        {"tracking": "evil"},
        {"uri": "https://evil.example/x.git"},
        {"entry_point": "evil.sh"},
    ]
    for attack in attacks:
        answer = start(attack)
        assert (answer.status_code, "Validation failed" in answer.text) == (409, True), attack

    # The pool's job template has no command, variables and working directory.
    for variables in ({"env": {"PREFECT_MLPROJECTS_TRUSTED_SOURCES": "*"}}, {"command": "evil"}, {"working_dir": "/"}):
        assert start({}, job_variables=variables).status_code == 422, variables

    # The server does not check if it is told not to: then the run does.
    unchecked = start({"docker_args": {"image": "evil"}}, enforce_parameter_schema=False).json()["id"]
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"sources: ['{project}']\nbackends: [local]\n")
    good = start({"parameters": {"word": "b"}}).json()["id"]
    worker = [sys.executable, "-m", "prefect_mlprojects", "worker", "--once", "--policy", str(policy)]
    subprocess.run(worker, check=True, timeout=500, capture_output=True)

    def state(flow_run: str) -> Any:
        return client.get(f"/flow_runs/{flow_run}").json()["state"]

    assert state(good)["type"] == "COMPLETED"
    assert state(unchecked)["type"] == "FAILED"
    assert "The form of the deployment" in state(unchecked)["message"]
    assert "docker_args" in state(unchecked)["message"]

    # The worker's policy holds whatever the deployment says.
    policy.write_text("sources: ['https://github.com/acme/*']\n")
    elsewhere = start({}).json()["id"]
    subprocess.run(worker, check=True, timeout=500, capture_output=True)
    assert state(elsewhere)["type"] == "FAILED"
    assert "the worker's policy, allows https://github.com/acme/* only" in state(elsewhere)["message"]
