"""Passwords in the URLs of an index: they stay out of messages and, readable for others, out of the cache."""

from __future__ import annotations

import base64
import functools
import http.server
import logging
import threading
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.environments.exposure import exposed_files

from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import EnvironmentManagerName

MARKER = "m4rker-geheim"
PLAN_ERRORS = [
    ("python_env.yaml", f"dependencies: ['./none --config-settings=i=http://u:{MARKER}@h/x']\n"),
    ("python_env.yaml", f"dependencies: http://u:{MARKER}@h/x\n"),
    ("python_env.yaml", f"dependencies: [demo @ file://u:{MARKER}@h/none]\n"),
    ("conda.yaml", f"channels: https://u:{MARKER}@h/x\n"),
    ("conda.yaml", f"dependencies: ['https://u:{MARKER}@h/t/{MARKER}/x::=3']\n"),
    ("conda.yaml", f"dependencies: ['https://u:{MARKER}@h/t/{MARKER}/x::b>=1..*0']\n"),
]


class Index(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Basic " + base64.b64encode(f"user:{MARKER}".encode()).decode():
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic")
            self.end_headers()
            return
        super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


def wheel(folder: Path, name: str) -> None:
    info = f"{name}-1.0.dist-info/"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(info + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """The address, with user and password, of an index with the package "indexed" and of the wheel "direct"."""
    for name in ("simple/indexed", "files"):
        (tmp_path / "index" / name).mkdir(parents=True)
    wheel(tmp_path / "index/simple/indexed", "indexed")
    wheel(tmp_path / "index/files", "direct")
    handler = functools.partial(Index, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:{MARKER}@127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("manager", ["uv", "virtualenv"])
def test_password_of_an_index_and_of_a_requirement_is_private(
    workshop: Any,
    index: str,
    manager: EnvironmentManagerName,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{index}/simple")
    lines = [f"--index-url {index}/simple", "indexed", f"direct @ {index}/files/direct-1.0-py3-none-any.whl"]
    text = "dependencies:\n" + "".join(f"  - {line}\n" for line in lines)
    environment = workshop.prepare(workshop.project({"python_env.yaml": text}), manager)
    workshop.run(environment, "python -c 'import indexed, direct'")
    assert exposed_files(workshop.cache, MARKER) == []
    assert environment.plan.location.parent.stat().st_mode & 0o077 == 0
    kept = [file for file in workshop.cache.rglob("*") if file.is_file() and MARKER.encode() in file.read_bytes()]
    assert kept == []
    # What the right password has got is not given to others, nor is what the installer has kept of it.
    for password in ("wrong", ""):
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.replace(MARKER, password)}/simple")
        monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
        with pytest.raises(EnvironmentBuildError):
            workshop.prepare(workshop.project({"python_env.yaml": text.replace(MARKER, password)}), manager)
        with pytest.raises(EnvironmentBuildError):
            workshop.prepare(workshop.project({"python_env.yaml": "dependencies: [indexed]\n"}), manager)
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{index}/simple")
    with pytest.raises(EnvironmentBuildError) as caught:
        workshop.prepare(workshop.project({"python_env.yaml": text + "  - nosuchpackage\n"}), manager)
    shown = [*workshop.lines, *caught.value.output_tail, *traceback.format_exception(caught.value), caplog.text]
    assert MARKER not in "\n".join((*shown, repr(environment.plan)))
    assert exposed_files(workshop.cache, MARKER) == []


@pytest.mark.parametrize(("name", "text"), PLAN_ERRORS)
def test_password_in_a_malformed_file_is_redacted(workshop: Any, name: str, text: str) -> None:
    with pytest.raises(EnvironmentBuildError) as caught:
        workshop.prepare(workshop.project({name: text}), "conda" if name == "conda.yaml" else "uv")
    assert MARKER not in "".join(traceback.format_exception(caught.value))
