"""The embedded Prefect server: started once, shared, healed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import authorization
from tests.services.waiting import wait_for

from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.address import check_reachable
from prefect_mlprojects.server.process import ServerAddress, ensure_server, server_status, stop_server


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a server of the test's own, which is stopped after it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PREFECT_MLPROJECTS_SERVER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("PREFECT_MLPROJECTS_SERVER_DIR", str(tmp_path / "server"))
    # Its profile is not that of the session's server.
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    yield tmp_path / "server"
    stop_server()


ENSURE = "from prefect_mlprojects.server.process import ensure_server; a = ensure_server(print); print('AT', a.api_url, a.started)"


def test_server_starts_is_shared_and_stops(own_server: Path) -> None:
    """One server for three processes at the same instant; reused; healed after kill -9 on a port that was taken."""
    # Without a password, as older versions started it.
    before = {**os.environ, "PREFECT_MLPROJECTS_SERVER_AUTH": "false", "AWS_SECRET_ACCESS_KEY": "of-the-starter"}
    command = [sys.executable, "-c", ENSURE]
    starters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=before) for _ in range(3)]
    outputs = [starter.communicate(timeout=300)[0] for starter in starters]
    found = [line.split()[1:] for output in outputs for line in output.splitlines() if line.startswith("AT ")]
    assert len({url for url, _ in found}) == 1
    assert sorted(started for _, started in found) == ["False", "False", "True"]
    (announced,) = [line for output in outputs for line in output.splitlines() if "mlprojects server stop" in line]
    assert announced.startswith("Prefect server: http://127.0.0.1:")

    status = server_status()
    assert (status.running, status.healthy) == (True, True)
    assert status.pid is not None
    if sys.platform == "linux":
        assert b"of-the-starter" not in Path(f"/proc/{status.pid}/environ").read_bytes()
    _gets_a_password_once_no_run_is_active(found[0][0])
    status = server_status()
    assert status.pid is not None
    again = ensure_server(print)
    assert (again.api_url, again.started) == (found[0][0], False)
    ui = json.loads(get(again.ui_url or "", "/ui-settings"))
    assert ui["api_url"] == again.api_url

    # A busy server is waited for, not replaced.
    os.kill(status.pid, signal.SIGSTOP)
    threading.Timer(9, os.kill, (status.pid, signal.SIGCONT)).start()
    assert ensure_server(print) == again
    assert server_status().pid == status.pid

    os.kill(status.pid, signal.SIGKILL)
    port = int(again.api_url.split(":")[2].split("/")[0])
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_for(lambda: binds(squatter, port), "the killed server's port to become free", 60)
        squatter.listen()
        starter = subprocess.Popen([sys.executable, "-c", ENSURE], stdout=subprocess.DEVNULL)
        wait_for(lambda: server_status().running, "a server to start", 60)
    starter.kill()
    starter.wait()
    orphan = server_status().pid
    healed = ensure_server(print)
    assert (server_status().pid, healed.started) == (orphan, False), "what a killed starter began is used"
    assert healed.api_url != again.api_url
    assert stop_server()
    assert not server_status().running
    assert not stop_server()


def _gets_a_password_once_no_run_is_active(api_url: str) -> None:
    import httpx

    flow = httpx.post(f"{api_url}/flows/", json={"name": "kept"}).json()["id"]
    run = httpx.post(f"{api_url}/flow_runs/", json={"flow_id": flow, "state": {"type": "RUNNING"}}).json()["id"]
    said: list[str] = []
    assert not ensure_server(said.append).started
    assert "has active runs. Restart it once they have ended" in said[0]
    ended = {"state": {"type": "COMPLETED"}, "force": True}
    httpx.post(f"{api_url}/flow_runs/{run}/set_state", json=ended).raise_for_status()
    replaced = ensure_server(said.append)
    assert (replaced.api_url, replaced.started) == (api_url, True)
    assert httpx.get(f"{api_url}/flows/{flow}").status_code == 401
    assert httpx.get(f"{api_url}/flows/{flow}", headers=authorization()).json()["name"] == "kept"


def get(base: str, path: str) -> str:
    import urllib.request

    with urllib.request.urlopen(base + path, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def binds(squatter: socket.socket, port: int) -> bool:
    try:
        squatter.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "state",
    [
        "",
        "{",
        "[]",
        '{"pid": "a"}',
        '{"pid": 1, "birth": "x", "port": 4200}',
        '{"pid": 1, "birth": "x", "port": 4200, "instance": "y", "ready": true}',
    ],
)
def test_stale_or_corrupt_state_file_is_ignored(state: str, own_server: Path) -> None:
    own_server.mkdir()
    (own_server / "server.json").write_text(state)
    status = server_status()
    assert (status.running, status.address) == (False, None)
    assert not stop_server()


def test_unusable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PREFECT_MLPROJECTS_SERVER_DIR", str(tmp_path / "file" / "server"))
    with pytest.raises(PrefectServerError, match=r"file/server.*PREFECT_MLPROJECTS_SERVER_DIR"):
        ensure_server(print)


def test_full_disk_is_named_and_leaves_no_partial_database(own_server: Path) -> None:
    own_server.mkdir()
    code = (
        "import resource, signal; from prefect_mlprojects.server.process import ensure_server;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "ensure_server(print)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PrefectServerError" in done.stderr
    assert f"needs the folder {own_server}, which can't be used: the database could not be created" in done.stderr
    assert not list(own_server.glob("*prefect.db*"))


def test_server_exiting_at_start_shows_its_log(
    own_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is the one that the active profile names; the log's old entries are not shown; a proxy is told of."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    said: list[str] = []
    profiles = tmp_path / "profiles.toml"
    url = "nonsense://user:secret@host/db"
    profiles.write_text(f'active = "a"\n[profiles.a]\nPREFECT_SERVER_DATABASE_CONNECTION_URL = "{url}"\n')
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(profiles))
    own_server.mkdir()
    (own_server / "server.log").write_text("=== server started long ago\nan old trouble\n")
    with pytest.raises(PrefectServerError, match=r"ended at its start.*server\.log") as caught:
        ensure_server(said.append)
    assert [line for line in said if "NO_PROXY=127.0.0.1" in line]
    assert "secret" not in str(caught.value)
    assert "an old trouble" not in str(caught.value)
    assert not (own_server / "prefect.db").exists()


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """Starts http servers that give one answer to everything."""
    servers: list[HTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/api"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_unusable_configured_server_is_named(
    answering: Callable[[int, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_reachable(answering(200, b"true"))
    check_reachable(answering(307, b""))
    for status, body, words in (
        (401, b"", "PREFECT_API_KEY"),
        (200, b"<html>", "does not look like a Prefect server"),
        (503, b"", "answered 503"),
        (404, b"", "does not look like a Prefect server"),
    ):
        with pytest.raises(PrefectServerError, match=words):
            check_reachable(answering(status, body))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        with pytest.raises(PrefectServerError, match=r"did not answer within 0\.5 s"):
            check_reachable(url, timeout=0.5)
    with pytest.raises(PrefectServerError, match="can't be reached") as caught:
        check_reachable("http://me:secret@127.0.0.1:9/api")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "userinfo", "expected"),
    [
        ("", "", None),
        ('PREFECT_API_KEY = "k"', "", "Bearer k"),
        ('PREFECT_API_KEY = "k"\nPREFECT_API_AUTH_STRING = "me:pass"', "", "Basic bWU6cGFzcw=="),
        ('PREFECT_API_KEY = "k"', "me:p%40ss@", "Basic bWU6cEBzcw=="),
    ],
)
def test_api_key_of_profile_is_sent_to_the_server(
    settings: str, userinfo: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    (tmp_path / "profiles.toml").write_text(f'active = "a"\n[profiles.a]\n{settings}\n')
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(PrefectServerError, match=r"refused .*\(401\)") as caught:
            check_reachable(f"http://{userinfo}127.0.0.1:{server.server_port}/api")
    assert seen == [expected]
    assert "p%40ss" not in str(caught.value)


CREATE = """
from prefect_mlprojects.server.application import ensure_sqlite_database
url = "sqlite+aiosqlite:///{path}"
print(ensure_sqlite_database(url), ensure_sqlite_database(url))
"""


def test_fast_migrations_create_the_same_schema_as_prefect(tmp_path: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT")},
        "PREFECT_HOME": str(tmp_path),
    }
    migrated = tmp_path / "migrated.db"
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "server", "database", "upgrade", "-y"],
        env={**environment, "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{migrated}"},
        check=True,
        capture_output=True,
    )
    created = tmp_path / "created.db"
    (tmp_path / "created.db-wal").write_text("of a database that was removed")
    (tmp_path / f".created.db.{'0' * 32}").write_text("of a process that was killed")
    done = subprocess.run(
        [sys.executable, "-c", CREATE.format(path=created)], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "False"]
    assert sorted(path.name for path in tmp_path.glob("*created*")) == ["created.db"]
    assert revision(created) == revision(migrated)
    assert clauses(created) == clauses(migrated), "see server/application.py: MigrationConfiguration"
    with sqlite3.connect(created) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def revision(database: Path) -> str:
    with sqlite3.connect(database) as connection:
        (number,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(number)


def clauses(database: Path) -> list[str]:
    """The clauses of a schema and its rows; Alembic writes the constraints of a table in an order that changes."""
    with sqlite3.connect(database) as connection:
        dump = "\n".join(connection.iterdump())
    return sorted(clause.strip() for clause in re.split(r",\s|\n", dump) if clause.strip())


def test_concurrent_writers_get_no_503(prefect_server: ServerAddress) -> None:
    import httpx

    async def hammer() -> list[int]:
        async with httpx.AsyncClient(base_url=prefect_server.api_url, headers=authorization(), timeout=120) as client:
            flow = (await client.post("/flows/", json={"name": "hammer"})).json()["id"]
            answers = await asyncio.gather(
                *(client.post("/flow_runs/", json={"flow_id": flow, "state": {"type": "PENDING"}}) for _ in range(150))
            )
            return [answer.status_code for answer in answers]

    assert set(asyncio.run(hammer())) == {201}


def test_configured_server_takes_precedence(
    answering: Callable[[int, bytes], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = answering(200, b"true")
    code = "from prefect_mlprojects.server.process import resolve_api; print(resolve_api(print).api_url)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PREFECT_API_URL": url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == url
