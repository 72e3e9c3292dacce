"""Deploy, work and cancel on Prefect's own server with PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.services.waiting import free_port, wait_for

from prefect_mlprojects import deploy

from .conftest import started


@pytest.fixture
def postgresql(need_program: Callable[[str], str]) -> Iterator[str]:
    """A database of the test's own; PostgreSQL refuses to run as root."""
    need_program("pg_ctlcluster")
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"))
    # Its user must be able to enter the folder, which pytest's are closed for.
    folder = Path(f"/tmp/mlprojects-postgresql-{os.getpid()}")
    folder.mkdir(mode=0o755)
    port = free_port()
    run_as: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        run_as = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"

    def run(*arguments: str) -> None:
        subprocess.run([*run_as, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    run(str(programs / "initdb"), "-D", str(data), "-U", "prefect", "-A", "trust")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        run(str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        run(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server(postgresql: str, tmp_path: Path) -> Iterator[str]:
    """Prefect's own server, as ``prefect server start`` runs it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
                "PREFECT_API_DATABASE_CONNECTION_URL": postgresql,
                "PREFECT_HOME": str(tmp_path / "prefect"),
            },
        )

    def healthy() -> bool:
        assert process.poll() is None, (tmp_path / "server.log").read_text()
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(healthy, "the server", 240)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def test_deploy_run_and_cancel(project: Path, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("PREFECT_API_URL", server)
    # Prefect reads its environment once, when it is imported: by another test, perhaps, for another server.
    with temporary_settings({PREFECT_API_URL: server}):
        deploy_run_and_cancel(project, tmp_path)


def deploy_run_and_cancel(project: Path, tmp_path: Path) -> None:
    made = deploy(project, env_manager="local")
    sleeper: Any = deploy(project, "sleep", env_manager="local")
    with started("worker", log=tmp_path / "worker.log") as worker:
        run = made.run({"needed": 1})
        wait_for(lambda: run.get_status() != "RUNNING" or worker.poll() is not None, "the run's end", 240)
        assert run.get_status() == "FINISHED", (tmp_path / "worker.log").read_text()
        cancelled = sleeper.run()
        wait_for(lambda: "sleeping 23" in (tmp_path / "worker.log").read_text(), "the command")
        cancelled.cancel()
        assert cancelled.get_status() == "KILLED"
