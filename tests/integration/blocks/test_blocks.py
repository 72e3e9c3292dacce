"""Blocks on a real server: registered, masked, and used by runs."""

# mypy: disable-error-code="arg-type"
# Secrets are given as text, as users do; pydantic makes them secret.

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import api, use_server

from prefect_mlprojects import deploy, run
from prefect_mlprojects.blocks import GitCredentialsBlock, MLflowProject, MLflowTrackingServer, MLprojectBackend
from prefect_mlprojects.exceptions import BackendError, ExecutionException, ParameterError

SECRET = "s3cret-" + uuid.uuid4().hex
GREET = str(Path(__file__).parents[2] / "projects" / "greet")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    use_server(monkeypatch, prefect_server.api_url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


@pytest.fixture
def save(save_block: Callable[[Any, str], None]) -> Callable[[Any], str]:
    """Saves a block under a name of its own, which it returns."""

    def do(block: Any) -> str:
        name = f"t-{uuid.uuid4().hex[:8]}"
        save_block(block, name)
        return name

    return do


def test_embedded_server_registers_block_types(prefect_server: Any) -> None:
    found = api(prefect_server.api_url).post("/block_types/filter", json={"limit": 200}).json()

    assert {"git-credentials", "mlflow-tracking-server", "mlflow-project", "mlproject-backend"} <= {
        each["slug"] for each in found
    }


def test_blocks_commands_register_and_list() -> None:
    command = [sys.executable, "-m", "prefect_mlprojects", "blocks"]
    done = subprocess.run([*command, "register"], capture_output=True, text=True, check=True)
    assert "Registered Git Credentials (git-credentials)" in done.stdout
    subprocess.run([*command, "list"], capture_output=True, text=True, check=True)


def test_secrets_are_masked_in_the_api(prefect_server: Any, save: Callable[[Any], str]) -> None:
    blocks = [
        GitCredentialsBlock(token=SECRET, hosts=["example.com"]),
        MLflowTrackingServer(uri="https://mlflow.example.com", username="me", password=SECRET),
        MLprojectBackend(config={"grace-period": 3}, secrets={"token": SECRET}),
    ]
    for block in blocks:
        name = save(block)
        slug = block.get_block_type_slug()
        shown = api(prefect_server.api_url).get(f"/block_types/slug/{slug}/block_documents/name/{name}").text
        assert SECRET not in shown
        assert "********" in shown
        assert SECRET not in repr(block) + str(block)


def test_backend_config_is_read_from_a_block(save: Callable[[Any], str], prefect_server: Any) -> None:
    name = save(MLprojectBackend(config={"grace-period": 3}))
    done = run(GREET, backend_config=f"mlproject-backend/{name}", env_manager="local")

    assert done.get_status() == "FINISHED"
    stored = api(prefect_server.api_url).get(f"/flow_runs/{done.flow_run_id}").json()
    assert stored["parameters"]["backend_config"] == f"mlproject-backend/{name}"


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ("mlproject-backend/nowhere", ExecutionException, "no block 'mlproject-backend/nowhere'.*UI under Blocks"),
        ("no-such-type/x", ExecutionException, "no block 'no-such-type/x'"),
        ({"credentials": "nowhere"}, ExecutionException, "no block .docker-registry/nowhere."),
    ],
)
def test_unsuitable_blocks_are_refused(config: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(GREET, backend_config=config, env_manager="local")


def test_invalid_configuration_in_a_block_is_refused(save: Callable[[Any], str]) -> None:
    name = save(MLprojectBackend(config={"grace": 3}, secrets={"token": SECRET}))
    with pytest.raises(BackendError, match="unknown key 'grace'") as caught:
        run(GREET, backend_config=f"mlproject-backend/{name}", env_manager="local")
    assert SECRET not in str(caught.value)


def test_tracking_server_is_read_from_a_block(save: Callable[[Any], str], workspace: Path, prefect_server: Any) -> None:
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{workspace / 'other.db'}"
    done = run(GREET, tracking=save(MLflowTrackingServer(uri=store)), env_manager="local")

    assert MlflowClient(store).get_run(done.run_id).info.status == "FINISHED"
    secret = MLflowTrackingServer(uri="http://127.0.0.1:9", username="me", password=SECRET)
    with pytest.raises(ExecutionException) as caught:
        run(GREET, tracking=save(secret), env_manager="local")
    assert SECRET not in str(caught.value)
    assert "127.0.0.1:9" in str(caught.value)


def test_password_with_special_characters_is_quoted() -> None:
    block = MLflowTrackingServer(uri="https://h/path", username="a@b", password="p/w:x")
    assert block.tracking_uri() == "https://a%40b:p%2Fw%3Ax@h/path"


def test_project_block_is_run_by_name(save: Callable[[Any], str], capfd: pytest.CaptureFixture[str]) -> None:
    name = save(MLflowProject(uri=GREET, parameters={"name": "block", "times": 2}, options={"env_manager": "local"}))

    run(f"block://{name}")
    assert capfd.readouterr().out.count("hello block") == 2
    run(f"block://{name}", parameters={"times": 1})
    assert capfd.readouterr().out.count("hello block") == 1
    with pytest.raises(ExecutionException, match="no block 'mlflow-project/nowhere'"):
        run("block://nowhere")
    wrong = save(MLflowProject(uri=GREET, options={"env_manger": "local"}))
    with pytest.raises(ParameterError, match=r"(?s)unknown run option 'env_manger'.*did you mean 'env_manager'"):
        run(f"block://{wrong}")


def test_project_block_is_deployed_by_name(save: Callable[[Any], str], prefect_server: Any) -> None:
    name = save(MLflowProject(uri=GREET, parameters={"name": "block"}, options={"env_manager": "local"}))

    made = deploy(f"block://{name}", name=f"of-{name}", parameters={"times": 3}, work_pool=None)
    stored = api(prefect_server.api_url).get(f"/deployments/{made.id}").json()
    # Where the project is and which version stays the block's matter; the form shows its values.
    assert stored["parameters"]["uri"] == f"block://{name}"
    assert stored["parameters"]["parameters"] == {"name": "block", "times": 3}
    assert (stored["parameters"]["env_manager"], stored["parameters"]["backend"]) == ("local", "local")
    fields = stored["parameter_openapi_schema"]["properties"]["parameters"]["properties"]
    assert (fields["name"]["default"], fields["times"]["default"]) == ("block", 3)
    with pytest.raises(ExecutionException, match="no block 'mlflow-project/nowhere'"):
        deploy("block://nowhere")


def test_git_credentials_are_found_by_host_and_name(
    save: Callable[[Any], str], prefect_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect_mlprojects.blocks.resolution import find_git_credentials
    from prefect_mlprojects.server.api import call_api
    from prefect_mlprojects.sources.git import GitUrl

    host = f"{uuid.uuid4().hex}.example.com"
    save(GitCredentialsBlock(token="other", hosts=["elsewhere.example.com"]))
    general = save(GitCredentialsBlock(token="general", hosts=[host]))
    save(GitCredentialsBlock(token="exact", hosts=[f"{host}:8443"]))

    def token(url: str, *name: str) -> str | None:
        found = call_api(prefect_server.api_url, find_git_credentials, GitUrl(url), *name)
        return found.token if found else None

    assert token(f"https://{host}/o/r") == "general"
    assert token(f"ssh://git@{host}:22/o/r") == "general"
    assert token(f"https://{host}:8443/o/r") == "exact"
    assert token(f"https://{host}:1/o/r") is None
    assert token(f"http://{host}/o/r") is None
    assert token("https://unknown.example.com/o/r") is None
    assert token("https://unknown.example.com/o/r", general) == "general"


def test_run_uses_git_credentials_of_its_host(save: Callable[[Any], str], tmp_path: Path) -> None:
    """The server's 401 tells which credentials came: a real repository with a password is fetched in the tests of sources."""
    import base64
    import http.server
    import threading

    came: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(self.headers.get("Authorization") or "")
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    save(GitCredentialsBlock(username="ci", token=SECRET, hosts=[f"http://{host}"]))
    with pytest.raises(ExecutionException) as caught:
        run(f"http://{host}/o/r", env_manager="local")
    server.shutdown()
    server.server_close()

    assert "Basic " + base64.b64encode(f"ci:{SECRET}".encode()).decode() in came
    assert SECRET not in str(caught.value)


def test_configuration_file_takes_precedence_over_block(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "backend.json").write_text(json.dumps({"grace-period": 1}))
    done = run(GREET, backend_config="conf/backend.json", env_manager="local")
    assert done.get_status() == "FINISHED"
    assert os.environ.get("MLPROJECTS_GIT_TOKEN") is None


def test_literal_credentials_are_never_stored(prefect_server: Any, workspace: Path) -> None:
    from prefect_mlprojects import deploy

    config = {"credentials": {"username": "ci", "password": SECRET}}
    done = run(GREET, backend_config=config, env_manager="local")
    stored = api(prefect_server.api_url).get(f"/flow_runs/{done.flow_run_id}").json()
    assert done.get_status() == "FINISHED"
    assert SECRET not in json.dumps(stored)
    with pytest.raises(BackendError, match=r"holds secrets \(credentials\)") as caught:
        deploy(GREET, backend_config=config)
    assert SECRET not in str(caught.value)
    (workspace / "config.json").write_text(json.dumps(config))
    done = run(GREET, backend_config=str(workspace / "config.json"), env_manager="local")
    stored = api(prefect_server.api_url).get(f"/flow_runs/{done.flow_run_id}").json()
    assert SECRET not in json.dumps(stored)
    with pytest.raises(BackendError, match="Keep them in a block"):
        deploy(GREET, backend_config=str(workspace / "config.json"))
