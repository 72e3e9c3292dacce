"""Channels behind a real HTTP server: with credentials, and without any network."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import logging
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.environments.exposure import exposed_files

from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal


def lock_file(location: Path) -> Path:
    """The file beside an environment that names its packages."""
    return location.with_name(f"{location.name}.lock.yml")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a channel to those who have the password, if there is one."""

    server: ChannelServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.server.hangs:
            self.server.asked.set()
            self.server.go_on.wait(120)
        wanted = self.server.password
        given = self.headers.get("Authorization", "")
        if wanted is not None and given != "Basic " + base64.b64encode(wanted.encode()).decode():
            self.send_error(401)
            return
        if self.server.token is not None:
            if not self.path.startswith(f"/t/{self.server.token}/"):
                self.send_error(403)
                return
            self.path = self.path.removeprefix(f"/t/{self.server.token}")
        super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


class ChannelServer(http.server.ThreadingHTTPServer):
    password: str | None = None
    token: str | None = None
    hangs = False
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.asked, self.go_on = threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(channel: Any) -> Iterator[ChannelServer]:
    channel.add("data", noarch="generic")
    made = ChannelServer(channel.folder.parent)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.go_on.set()
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDA_REMOTE_MAX_RETRIES", "0")


def test_channel_url_password_is_redacted(workshop: Any, conda: Any, server: ChannelServer) -> None:
    server.password = "user:geheim"
    project = workshop.project({"conda.yaml": conda.yaml([f"http://user:geheim@{server.place}/channel"], "data")})
    environment = workshop.prepare(project, "conda")
    lock = lock_file(environment.plan.location).read_text()
    assert f"http://{server.place}/channel/noarch/data-1.0-0.conda" in lock
    assert "geheim" not in lock + "".join(workshop.lines)
    assert any(line.startswith("Downloading data") for line in workshop.lines)
    kept = [file for file in workshop.cache.rglob("*") if file.is_file() and b"geheim" in file.read_bytes()]
    assert kept == []
    assert workshop.prepare(project, "conda").reused
    for login in ("user:wrong@", ""):  # what the right password has got is not given to others
        others = workshop.project({"conda.yaml": conda.yaml([f"http://{login}{server.place}/channel"], "data")})
        with pytest.raises(EnvironmentBuildError, match="can't be reached"):
            workshop.prepare(others, "conda")
    server.password = "user:other"
    with pytest.raises(EnvironmentBuildError, match=f"the channel http://{server.place}/channel can't be reached") as e:
        workshop.prepare(project, "conda", rebuild=True)
    assert "401" in e.value.message
    assert "geheim" not in e.value.message


def test_channel_url_token_is_redacted(workshop: Any, conda: Any, server: ChannelServer) -> None:
    server.token = "tk-1234"
    project = workshop.project({"conda.yaml": conda.yaml([f"http://{server.place}/t/tk-1234/channel"], "data")})
    environment = workshop.prepare(project, "conda")
    lock = lock_file(environment.plan.location).read_text()
    assert f"http://{server.place}/channel/noarch/data-1.0-0.conda" in lock
    assert "tk-1234" not in lock + "".join(workshop.lines)
    for token in ("/t/tk-wrong", ""):
        others = workshop.project({"conda.yaml": conda.yaml([f"http://{server.place}{token}/channel"], "data")})
        with pytest.raises(EnvironmentBuildError, match="can't be reached"):
            workshop.prepare(others, "conda")
    kept = [file for file in workshop.cache.rglob("*") if file.is_file() and b"tk-1234" in file.read_bytes()]
    assert kept == []


def test_token_kept_in_channel_url_is_not_exposed(
    workshop: Any, conda: Any, server: ChannelServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.token = "api/t/m4rker"
    url = f"http://{server.place}/t/api/t/m4rker/channel"
    project = workshop.project({"conda.yaml": conda.yaml([url], f"'{url}::data'")})
    environment = workshop.prepare(project, "conda")
    assert exposed_files(workshop.cache, "m4rker") == []
    assert environment.plan.location.parent.stat().st_mode & 0o077 == 0
    assert any(line.startswith("Solving for http") for line in workshop.lines)
    server.token = "other"
    with pytest.raises(EnvironmentBuildError) as caught:
        workshop.prepare(project, "conda", rebuild=True)
    shown = [*workshop.lines, *traceback.format_exception(caught.value), caplog.text, repr(environment.plan)]
    assert "m4rker" not in "\n".join(shown)


def test_credentials_from_rattlers_file(
    workshop: Any, conda: Any, server: ChannelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.password = "user:geheim"
    project = workshop.project({"conda.yaml": conda.yaml([f"http://{server.place}/channel"], "data")})
    with pytest.raises(EnvironmentBuildError, match="can't be reached"):
        workshop.prepare(project, "conda")
    credentials = tmp_path / "credentials.json"
    credentials.write_text(json.dumps({"127.0.0.1": {"BasicHTTP": {"username": "user", "password": "geheim"}}}))
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(credentials))
    assert not workshop.prepare(project, "conda").reused


def test_credentials_from_netrc(
    workshop: Any, conda: Any, server: ChannelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.password = "user:geheim"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1\nlogin user\npassword geheim\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    project = workshop.project({"conda.yaml": conda.yaml([f"http://{server.place}/channel"], "data")})
    assert not workshop.prepare(project, "conda").reused


def test_offline_uses_what_was_fetched(
    workshop: Any, conda: Any, server: ChannelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = workshop.project({"conda.yaml": conda.yaml([f"http://{server.place}/channel"], "data")})
    monkeypatch.setenv("CONDA_OFFLINE", "true")
    with pytest.raises(EnvironmentBuildError, match="offline is on"):
        workshop.prepare(project, "conda")
    assert server.requests == []
    monkeypatch.setenv("CONDA_OFFLINE", "false")
    workshop.prepare(project, "conda")
    monkeypatch.setenv("CONDA_OFFLINE", "true")
    server.requests.clear()
    assert not workshop.prepare(project, "conda", rebuild=True).reused
    assert server.requests == []


def test_stop_request_interrupts_hanging_channel(workshop: Any, conda: Any, server: ChannelServer) -> None:
    server.hangs = True
    project = workshop.project({"conda.yaml": conda.yaml([f"http://{server.place}/channel"], "data")})
    stop = StopSignal()
    caught: list[str] = []

    def prepare() -> None:
        try:
            workshop.prepare(project, "conda", stop=stop)
        except EnvironmentBuildError as error:
            caught.append(error.message)

    thread = threading.Thread(target=prepare)
    thread.start()
    assert server.asked.wait(60)
    stop.request("cancelled by a test")
    thread.join(60)
    assert not thread.is_alive()
    assert caught == ["The building of the environment was stopped (cancelled by a test)."]
    assert not server.go_on.is_set()
    assert workshop.leftovers() == []
