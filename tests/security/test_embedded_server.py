"""Attacks on the embedded server by other users of the machine and by web pages; see SECURITY.md."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.services.prefect_api import api, authorization
from tests.services.second_user import give_to_second_user, need_second_user, python_for_everyone, run_as_second_user

from prefect_mlprojects._support.process.tree import process_birth
from prefect_mlprojects._support.secrets import reveal
from prefect_mlprojects.exceptions import EnvironmentBuildError, ExecutionException, PrefectServerError
from prefect_mlprojects.server.access import LOGIN_PATH, login_link, read_auth
from prefect_mlprojects.server.process import ServerAddress, ensure_server, server_status
from prefect_mlprojects.server.record import APPLICATION, ServerRecord, is_alive, write_record
from prefect_mlprojects.settings import server_directory

SECRETS = {"block_documents": None, "include_secrets": True}


def fetched(server: ServerAddress, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    return httpx.request(method, f"{server.ui_url}{path}", timeout=60, **options)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/block_documents/filter", SECRETS),
        ("/api/flows/", {"name": "mine"}),
        ("/api/deployments/filter", {}),
        ("/api/flow_runs/filter", {}),
        ("/api/logs/filter", {}),
        ("/api/work_pools/", {"name": "mine", "type": "process"}),
        ("/api/admin/database/clear", {"confirm": True}),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic bWxwcm9qZWN0czp4"}, {"Authorization": "Bearer x"}])
def test_api_without_the_password_is_refused(
    path: str, body: Any, headers: dict[str, str], prefect_server: ServerAddress
) -> None:
    assert fetched(prefect_server, path, "POST", json=body, headers=headers).status_code == 401


def test_api_with_the_password_works(prefect_server: ServerAddress) -> None:
    assert api(prefect_server.api_url).post("/block_documents/filter", json=SECRETS).status_code == 200


def test_another_user_reads_no_secret_over_http(prefect_server: ServerAddress) -> None:
    code = (
        "import sys, urllib.request, urllib.error\n"
        "request = urllib.request.Request(sys.argv[1], b'{\"include_secrets\": true}', {'Content-Type': 'application/json'})\n"
        "try: print(urllib.request.urlopen(request, timeout=30).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
    )
    url = f"{prefect_server.api_url}/block_documents/filter"
    assert run_as_second_user(python_for_everyone(), "-c", code, url).stdout.strip() == "401"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:4280", "127.0.0.1.evil.example", "", "[::1", "192.0.2.1"]
)
@pytest.mark.parametrize("path", ["/api/health", "/api/flows/filter", "/", "/ui-settings", LOGIN_PATH])
def test_foreign_host_name_is_refused(host: str, path: str, prefect_server: ServerAddress) -> None:
    """A page whose name is resolved to 127.0.0.1 (DNS rebinding) has the same origin as the server, but its own host name."""
    assert fetched(prefect_server, path, headers={"Host": host, **authorization()}).status_code in (400, 403)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "localhost", "LOCALHOST:4280", "host.docker.internal:4280"])
def test_own_host_name_is_accepted(host: str, prefect_server: ServerAddress) -> None:
    assert fetched(prefect_server, "/api/health", headers={"Host": host}).text == "true"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9", "http://localhost"])
def test_foreign_web_page_is_refused(origin: str, prefect_server: ServerAddress) -> None:
    headers = {"Origin": origin, **authorization()}
    asked = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for answer in (
        fetched(prefect_server, "/api/flows/", "OPTIONS", headers=asked),
        fetched(prefect_server, "/api/flows/filter", "POST", json={}, headers=headers),
        fetched(prefect_server, LOGIN_PATH, "POST", content="x", headers=headers),
    ):
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    framed = {"Sec-Fetch-Dest": "iframe", "Sec-Fetch-Site": "cross-site"}
    assert fetched(prefect_server, "/", headers=framed).status_code == 403


def test_own_pages_are_accepted(prefect_server: ServerAddress) -> None:
    port = urlsplit(prefect_server.api_url).port
    for name in ("127.0.0.1", "localhost"):
        headers = {"Origin": f"http://{name}:{port}", **authorization()}
        answer = fetched(prefect_server, "/api/flows/filter", "POST", json={}, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, headers["Origin"])


@pytest.mark.parametrize("path", ["/api/events/in", "/api/events/out", "/api/logs/out"])
def test_websockets_without_the_password_or_of_foreign_pages_are_refused(
    path: str, prefect_server: ServerAddress
) -> None:
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed, InvalidStatus

    port = urlsplit(prefect_server.api_url).port

    async def answer(token: str | None, name: str = "127.0.0.1", **options: Any) -> str:
        try:
            async with connect(f"ws://{name}:{port}{path}", host="127.0.0.1", port=port, **options) as socket:
                if token is not None:
                    await socket.send(json.dumps({"type": "auth", "token": token}))
                return str(json.loads(await asyncio.wait_for(socket.recv(), 30)).get("type"))
        except InvalidStatus as error:
            return str(error.response.status_code)
        except ConnectionClosed:
            return "closed"

    async def attempts() -> list[str]:
        auth = read_auth(server_directory())
        assert auth is not None
        foreign: Any = {"origin": "https://evil.example", "subprotocols": ["prefect"]}
        rebound: Any = {"name": "evil.example", "subprotocols": ["prefect"]}
        return [
            await answer(None),
            await answer("wrong", subprotocols=["prefect"]),
            await answer(reveal(auth), **foreign),
            await answer(reveal(auth), **rebound),
            await answer(reveal(auth), subprotocols=["prefect"]),
        ]

    assert asyncio.run(attempts()) == ["403", "closed", "403", "403", "auth_success"]


def test_login_link_works_once(prefect_server: ServerAddress) -> None:
    link = urlsplit(str(login_link(f"{prefect_server.ui_url}/deployments/x")))
    code, _, rest = link.fragment.partition("/")
    assert (link.path, rest) == (LOGIN_PATH, "deployments/x")
    assert login_link("https://prefect.example/runs") == "https://prefect.example/runs"

    def exchange(text: str, **headers: str) -> httpx.Response:
        return fetched(prefect_server, LOGIN_PATH, "POST", content=text, headers=headers)

    issued, nonce, mac = code.split(".")
    old = f"{int(time.time()) - 9 * 3600:x}"
    for wrong in (
        "",
        code[:-1],
        f"{code}0",
        f"{issued}.{nonce}x.{mac}",
        f"{old}.{nonce}.{mac}",
        "x.y.z",
        "a" * 10_000,
        "\udcff",
    ):
        assert exchange(wrong.encode("utf-8", "surrogatepass").decode("latin-1")).status_code == 401
    first = exchange(code)
    assert first.status_code == 200
    assert {"Authorization": f"Basic {first.json()['password']}"} == authorization()
    assert "no-store" in first.headers["cache-control"]
    assert exchange(code).status_code == 401

    # A browser that has the password gets its cookie again; without it, pages lead to the login page.
    assert exchange("", **authorization()).status_code == 200
    page = fetched(prefect_server, "/runs?a=1", headers={"Accept": "text/html"})
    assert (page.status_code, page.headers["location"]) == (303, f"{LOGIN_PATH}?next=/runs%3Fa%3D1")
    cookie = {"Cookie": first.headers["set-cookie"].partition(";")[0], "Accept": "text/html"}
    assert fetched(prefect_server, "/runs", headers=cookie).status_code == 200
    assert fetched(prefect_server, "/api/flows/filter", "POST", json={}, headers=cookie).status_code == 401


def test_password_is_in_no_command_line_or_log(prefect_server: ServerAddress) -> None:
    auth = read_auth(server_directory())
    assert auth is not None
    password = reveal(auth).partition(":")[2]
    lines = subprocess.run(["ps", "axww", "-o", "command="], capture_output=True, text=True, check=True).stdout
    assert APPLICATION in lines
    assert password not in lines
    assert password not in (server_directory() / "server.log").read_text(errors="replace")


def test_files_of_the_server_are_private(prefect_server: ServerAddress) -> None:
    folder, profiles = server_directory(), Path(os.environ["PREFECT_HOME"]) / "profiles.toml"
    assert prefect_server.api_url
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir(), profiles)}
    assert modes.pop(folder.name) == 0o700
    assert set(modes) >= {"prefect.db", "server.log", "server.json", "server.lock", "auth", "profiles.toml"}
    assert set(modes.values()) == {0o600}


@pytest.fixture
def open_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user can reach, for a server and a cache; the umask lets everybody write."""
    folder = Path(tempfile.mkdtemp(prefix="mlp-security-"))
    folder.chmod(0o755)
    monkeypatch.setenv("PREFECT_MLPROJECTS_SERVER_DIR", str(folder / "server"))
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(folder / "cache"))
    before = os.umask(0)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def test_files_at_umask_000_can_not_be_reached_by_another_user(open_folder: Path) -> None:
    need_second_user()
    from prefect_mlprojects._support.files import private_directory, write_atomically
    from prefect_mlprojects._support.locks import hold_lock

    write_record(private_directory(open_folder / "server"), ServerRecord(1, "x", 1, "y", ready=True))
    write_atomically(open_folder / "new" / "deep" / "file", "secret")
    with hold_lock(open_folder / "cache" / "locks" / "x.lock"):
        pass
    found = run_as_second_user("find", str(open_folder), "-mindepth", "2", check=False)
    assert found.stdout == ""
    for path in ("server/server.json", "new/deep/file", "cache/locks/x.lock"):
        assert run_as_second_user("cat", str(open_folder / path), check=False).returncode != 0
        assert (open_folder / path).stat().st_mode & 0o777 == 0o600
    assert run_as_second_user("touch", str(open_folder / "server" / "planted"), check=False).returncode != 0


def test_folder_of_another_user_is_refused(open_folder: Path, tmp_path: Path) -> None:
    for name in ("server", "cache"):
        (open_folder / name).mkdir(mode=0o755)
        give_to_second_user(open_folder / name)
    with pytest.raises(PrefectServerError, match=r"can't be used: it belongs to another user \(nobody\).*SERVER_DIR"):
        ensure_server(print)
    with pytest.raises(PrefectServerError, match="belongs to another user"):
        server_status()
    _refuses_cache(tmp_path, "belongs to another user")


def test_folder_that_others_may_write_to_is_refused(open_folder: Path, tmp_path: Path) -> None:
    need_second_user()
    planted = json.dumps(
        {"pid": os.getpid(), "birth": process_birth(os.getpid()), "port": 9, "instance": "x", "ready": True}
    )
    for name in ("server", "cache"):
        (open_folder / name).mkdir(mode=0o777)
    run_as_second_user("sh", "-c", f"echo '{planted}' > {open_folder / 'server' / 'server.json'}")
    with pytest.raises(PrefectServerError, match="every user may write to it; check its files, then run `chmod 700"):
        ensure_server(print)
    _refuses_cache(tmp_path, "every user may write to it")
    # Writable by the group only: refused if another user has used that.
    (open_folder / "server").chmod(0o770)
    with pytest.raises(PrefectServerError, match=r"'server\.json' in it belongs to another user"):
        ensure_server(print)
    (open_folder / "server" / "server.json").unlink()
    assert not server_status().running
    assert (open_folder / "server").stat().st_mode & 0o777 == 0o700


def _refuses_cache(tmp_path: Path, words: str) -> None:
    from prefect_mlprojects.environments.cache import user_cache
    from prefect_mlprojects.sources import detect_source
    from prefect_mlprojects.types import StopSignal

    with pytest.raises(EnvironmentBuildError, match=words):
        user_cache()
    with pytest.raises(ExecutionException, match=words):
        detect_source("https://git.example/acme/x.git", None).fetch(StopSignal(), print)


def test_record_of_another_users_process_is_not_believed() -> None:
    user = need_second_user()
    with (
        _sleeping(APPLICATION, user=user.pw_uid) as foreign,
        _sleeping(APPLICATION) as own,
        _sleeping("other") as other,
    ):
        records = [ServerRecord(each, process_birth(each) or "", 9, "x", ready=True) for each in (foreign, own, other)]
        assert [is_alive(each) for each in records] == [False, True, False]


@contextmanager
def _sleeping(argument: str, **options: Any) -> Iterator[int]:
    command = ["sh", "-c", "echo; read line", argument]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate(b"\n")


def test_server_environment_has_no_secret_of_its_starter() -> None:
    from prefect_mlprojects._support.secrets import Secret
    from prefect_mlprojects.server.environment import server_environment

    starter = {
        "PATH": "/bin",
        "HOME": "/home/me",
        "LC_ALL": "C",
        "AWS_SECRET_ACCESS_KEY": "s",
        "MLFLOW_TRACKING_PASSWORD": "s",
        "MLFLOW_RUN_ID": "r",
        "PREFECT_API_KEY": "s",
        "PREFECT_API_AUTH_STRING": "s",
        "PREFECT_API_URL": "http://elsewhere/api",
        "PREFECT_MLPROJECTS_EXECUTION_ID": "x",
        "PREFECT_SERVER_API_AUTH_STRING": "old:s",
        "PREFECT_SERVER_LOGGING_LEVEL": "DEBUG",
        "HTTPS_PROXY": "http://me:s@proxy",
        "http_proxy": "http://proxy",
        "ANYTHING_ELSE": "s",
    }
    kept = server_environment(starter, 4200, "sqlite://", Secret("a:b"))
    assert "s" not in kept.values()
    assert {name for name in kept if name in starter} == {
        "PATH", "HOME", "LC_ALL", "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_LOGGING_LEVEL", "http_proxy",
    }  # fmt: skip
    assert kept["PREFECT_SERVER_API_AUTH_STRING"] == "a:b"
    assert "PREFECT_SERVER_API_AUTH_STRING" not in server_environment(starter, 4200, "sqlite://", None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_running_server_has_no_secret_of_its_starter(prefect_server: ServerAddress) -> None:
    pid = server_status().pid
    names = {
        each.partition(b"=")[0].decode() for each in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if each
    }
    assert prefect_server.api_url
    assert {name for name in names if not name.startswith(("PREFECT_", "LC_", "XDG_", "PYTHON"))} <= {
        "HOME", "USER", "LOGNAME", "SHELL", "PATH", "TMPDIR", "TZ", "LANG", "LANGUAGE", "VIRTUAL_ENV", "SSL_CERT_FILE",
        "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "LD_LIBRARY_PATH", "NO_PROXY", "no_proxy", "TEMP", "TMP",
        "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy",
    }  # fmt: skip
