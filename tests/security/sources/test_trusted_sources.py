"""Ways around PREFECT_MLPROJECTS_TRUSTED_SOURCES."""

from __future__ import annotations

import functools
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.git_server import GitSite

from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.types import StopSignal

from .conftest import Fetch, add_repository

SETTING = "PREFECT_MLPROJECTS_TRUSTED_SOURCES"
PATTERNS = "https://host.example/org/* ssh://host.example/org/* /srv/projects/*"


@pytest.mark.parametrize(
    "uri",
    [
        "https://host.example/org/../evil/x",
        "https://host.example/org/%2e%2e/evil/x",
        "https://host.example/org/%2E./evil/x",
        "https://host.example/org/%252e%252e/evil/x",
        "https://host.example/org/..%2fevil/x",
        "https://host.example/org/./x",
        "https://host.example/org/x%5c..%5cevil",
        "https://host.example/org/..\\evil/x",
        "https://host.example/org/x%00",
        "https://host.example/org/%zz",
        "https://host.example/org/%2e%2e/evil.zip",
        "https://host.example/org/x.zip::https://evil.example/x.zip",
        "https://host.example@evil.example/org/x",
        "https://evil.example\\@host.example/org/x.zip",
        "https://evil.example/x?https://host.example/org/x",
        "https://host.example.evil.example/org/x",
        "https://host.example:8443/org/x",
        "http://host.example/org/x",
        "host.example:org/../evil/x",
        "mallory@host.example:org/x",
        "ssh://mallory@host.example/org/x",
        "simplecache::https://host.example/org/x.zip",
    ],
)
def test_address_that_leads_elsewhere_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, PATTERNS)
    with pytest.raises(FetchError, match=SETTING):
        detect_source(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "https://host.example/org/x",
        "https://user:pw@HOST.example/org/My%20Project/_git/x",
        "https://host.example/org/x..y/v1.0.zip?a=b",
        "host.example:org/x",
        "git@host.example:org/x",
    ],
)
def test_ordinary_address_is_trusted(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, PATTERNS)
    assert detect_source(uri).kind in ("git", "zip")


@pytest.mark.parametrize("name", ["projects%2f..%2fevil", "%2e%2e", "projects%2Fx"])
def test_encoded_local_path_is_taken_literally(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "evil" / name / "x"
    folder.mkdir(parents=True)
    (tmp_path / "evil" / "trusted").mkdir()
    monkeypatch.setenv(SETTING, f"{tmp_path}/trusted/* {tmp_path}/projects/* {tmp_path}/evil/trusted/*")
    for uri in (str(folder), folder.as_uri(), f"{tmp_path}/evil/trusted/../{name}/x"):
        with pytest.raises(FetchError, match=SETTING):
            detect_source(uri)


def test_redirect_of_git_is_followed_to_trusted_addresses_only(
    own_site: GitSite, other_site: GitSite, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = add_repository(other_site, "project", {"MLproject": "name: moved\n"})
    uri = f"{own_site.redirect_to(f'{other_site.address}/open')}/project.git"
    monkeypatch.setenv(SETTING, f"{own_site.address}/*")
    for version in (None, "trunk", commit):
        with pytest.raises(FetchError, match=f"redirected to {other_site.address}/open/project.git.*{SETTING}"):
            fetch(uri, version)
    monkeypatch.setenv(SETTING, f"{own_site.address}/* {other_site.address}/open/*")
    assert (fetch(uri).directory / "MLproject").read_text() == "name: moved\n"


def test_submodule_outside_of_trusted_sources_is_refused(
    own_site: GitSite, other_site: GitSite, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_repository(own_site, "project", {"MLproject": "name: x\n"}, {"evil": f"{other_site.address}/open/x.git"})
    monkeypatch.setenv(SETTING, f"{own_site.address}/*")
    with pytest.raises(FetchError, match=SETTING):
        fetch(f"{own_site.address}/open/project.git")
    assert other_site.received == []


class Site(http.server.SimpleHTTPRequestHandler):
    """Serves files; ``/to/URL`` redirects to it."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two web servers with the same archive."""
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("MLproject", "name: zipped")
    handler = functools.partial(Site, directory=str(tmp_path))
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{servers[0].server_port}", f"http://127.0.0.1:{servers[1].server_port}"
    for server in servers:
        server.shutdown()
        server.server_close()


def test_redirect_of_archive_is_followed_to_trusted_addresses_only(
    sites: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = sites
    direct, twice = f"{own}/to/{other}/p.zip", f"{own}/to/{own}/to/{other}/p.zip"
    monkeypatch.setenv(SETTING, f"{own}/*")
    for uri in (direct, twice, f"{own}/to/file:///etc/passwd.zip"):
        with pytest.raises(FetchError, match=f"redirected to .*{SETTING}"):
            detect_source(uri).fetch(StopSignal(), lambda _: None)
    for trusted in (f"{own}/* {other}/p.zip", ""):
        monkeypatch.setenv(SETTING, trusted)
        copy = detect_source(twice).fetch(StopSignal(), lambda _: None)
        assert (copy.directory / "MLproject").read_text() == "name: zipped"
