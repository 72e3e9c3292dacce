"""Prefect's own commands and clients find the embedded server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.services.waiting import free_port

Run = Callable[..., "subprocess.CompletedProcess[str]"]

SCRIPT = """
import asyncio
import prefect
from prefect import get_client
from prefect.blocks.system import Secret
from prefect_mlprojects import run

handle = run("project", env_manager="local")

async def read():
    async with get_client() as client:
        return (await client.read_flow_run(handle.flow_run_id)).state.name

print("state", asyncio.run(read()))
Secret(value="kept").save("for-the-test")
print("block", Secret.load("for-the-test").get())
print("again", run("project", env_manager="local").get_status())
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty HOME, and a project beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "MLproject").write_text("name: found\nentry_points: {main: {command: echo hello}}\n")
    return tmp_path / "home"


@pytest.fixture
def command(home: Path) -> Iterator[Run]:
    """Runs a program of this environment with the empty HOME, as a user without any setting."""
    ours = ("PREFECT_", "MLFLOW_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {"HOME": str(home), "PREFECT_MLPROJECTS_SERVER_START_TIMEOUT": "240"}
    first_port = {"PREFECT_MLPROJECTS_SERVER_PORT": str(free_port())}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            capture_output=True,
            text=True,
            cwd=home.parent,
            env=env | more,
            timeout=400,
            check=False,
        )

    started = run("prefect_mlprojects", "server", "start", **first_port)
    assert started.returncode == 0, started.stderr
    yield run
    run("prefect_mlprojects", "server", "stop")


def test_prefect_commands_and_clients_find_the_embedded_server(command: Run, home: Path) -> None:
    deployed = command("prefect_mlprojects", "deploy", "project")
    assert deployed.returncode == 0, deployed.stderr
    assert "run_project/found" in command("prefect", "deployment", "ls").stdout
    done = command("prefect", "deployment", "run", "run_project/found")
    assert done.returncode == 0, done.stderr

    (home.parent / "script.py").write_text(SCRIPT)
    said = command("script").stdout
    assert "state Completed" in said
    assert "block kept" in said
    assert "again FINISHED" in said

    # Stopping it would take the server away from a run.
    (home.parent / "project" / "MLproject").write_text("name: found\nentry_points: {main: {command: sleep 600}}\n")
    run = command("prefect_mlprojects", "run", "project", "--env-manager", "local", "--detach").stdout.strip()
    refused = command("prefect_mlprojects", "server", "stop")
    assert refused.returncode == 1
    assert f"found/main  {run}" in refused.stderr
    assert command("prefect_mlprojects", "status", run).stdout.startswith("RUNNING\n")
    assert command("prefect_mlprojects", "cancel", run).returncode == 0

    # After a restart the address is the same, also for programs that have read the profile.
    profiles = home / ".prefect" / "profiles.toml"
    before = profiles.read_text()
    assert command("prefect_mlprojects", "server", "stop").returncode == 0
    assert "found" in command("prefect_mlprojects", "deployments", "list").stdout
    assert profiles.read_text() == before

    # A profile that the user chose stays as it is.
    own = 'active = "work"\n\n[profiles.work]\n# mine\nPREFECT_LOGGING_LEVEL = "ERROR"\n'
    profiles.write_text(own)
    assert command("prefect_mlprojects", "server", "stop").returncode == 0
    assert "found" in command("prefect_mlprojects", "deployments", "list").stdout
    assert profiles.read_text() == own
