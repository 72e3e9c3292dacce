"""A marker is planted in every entrance of a secret; after runs of each outcome it must not be found anywhere.

Searched are Prefect's whole database and server log, MLflow's store and artifacts, the process list while the runs go on,
everything that was printed, the caches and temporary folders, and what errors, handles and results show or pickle to.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from tests.services.git import git
from tests.services.git_server import TOKEN, USER, SmartHttp
from tests.services.mlflow_server import MlflowServer
from tests.services.package_index import PACKAGE, package_index

from prefect_mlprojects.blocks import GitCredentialsBlock, MLflowTrackingServer, MLprojectBackend
from prefect_mlprojects.server.process import ServerAddress

MLPROJECT = """\
name: leaky
python_env: python_env.yaml
entry_points:
  main: {{command: "python -c 'import {package}; print({package}.VALUE)'"}}
  fail: {{command: "echo going down >&2; exit 3"}}
  sleep: {{command: "touch {started}; sleep 600"}}
"""

# Runs a project with each outcome, and writes down all that a user could look at, print or pickle.
SCRIPT = """\
import json, pathlib, pickle, sys, time, traceback
from prefect_mlprojects import run
given = json.load(sys.stdin)
shown, ends, started = [], [], pathlib.Path(given["started"])

def look(thing):
    shown.append(f"{thing!r} {thing} {getattr(thing, '__dict__', '')}".encode())
    try:
        shown.append(pickle.dumps(thing))
    except TypeError as error:
        assert "secret" in str(error), error

for entry_point in given["entry_points"]:
    try:
        handle = run(given["uri"], entry_point, synchronous=False, **given["options"])
        shown.append(f"{handle!r} {handle.session!r}".encode())
        if entry_point == "sleep":
            while not started.exists() and handle.get_status() == "RUNNING":
                time.sleep(0.05)
            handle.cancel()
        result = handle.result()
        ends.append(result.status)
        look(result)
        look(result.error)
    except Exception as error:
        ends.append(type(error).__name__)
        look(error)
        traceback.print_exc()
pathlib.Path(given["shown"]).write_bytes(b"\\n".join(shown))
print(json.dumps(ends))
"""

THIRD_PARTY = """\
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.containers.config import LocalConfig
from prefect_mlprojects.backends.local.backend import LocalBackend


class MoonConfig(LocalConfig):
    token: Secret | None = None
    headers: dict[str, Secret] = {}


class Moon(LocalBackend):
    name = "moon"
    config_model = MoonConfig
"""


def marker(entrance: str) -> str:
    return f"MARK-{entrance}-{uuid.uuid4().hex}"


@contextlib.contextmanager
def watched_processes(secrets: Mapping[str, str], found: set[str]) -> Iterator[None]:
    """Adds to `found` the commands of this machine's processes that have a secret among their arguments."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    with contextlib.suppress(OSError):
                        command = (entry / "cmdline").read_bytes()
                        found.update(
                            f"{name} in the process list: {command!r}"
                            for name, each in secrets.items()
                            if each.encode() in command
                        )

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    stop.set()
    thread.join()


def texts(path: Path) -> Iterator[bytes]:
    """What a file holds: a database row by row, because its pages cut long values."""
    if path.suffix == ".db":
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                with contextlib.suppress(sqlite3.OperationalError):
                    for row in database.execute(f'SELECT * FROM "{table}"'):
                        yield b"\0".join(cell if isinstance(cell, bytes) else str(cell).encode() for cell in row)
        return
    with contextlib.suppress(OSError):
        yield path.read_bytes()


def leaks(secrets: Mapping[str, str], *places: Path, private: bool = False) -> set[str]:
    """Where secrets are found; with `private`, a file that only its owner may read does not count."""
    spellings = {
        name: [
            value.encode(),
            quote(value, safe="").encode(),
            base64.b64encode(f"ci:{value}".encode()),
            base64.b64encode(f"{USER}:{value}".encode()),
        ]
        for name, value in secrets.items()
    }
    found = set()
    for path in (each for place in places for each in (place.rglob("*") if place.is_dir() else [place])):
        if not path.is_file() or path.is_symlink():
            continue
        if private and not stat.S_IMODE(path.stat().st_mode) & 0o077:
            continue
        for text in texts(path):
            found |= {f"{name} in {path}" for name, all_ in spellings.items() if any(each in text for each in all_)}
    return found


class House:
    """The folders of one test, a private repository, and the places to search."""

    def __init__(self, tmp_path: Path, prefect_server: ServerAddress, mlflow_server: MlflowServer) -> None:
        self.root = tmp_path
        self.mlflow_server = mlflow_server
        self.environment = {
            **os.environ,
            "HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "tmp"),
            "UV_CACHE_DIR": str(tmp_path / "uv"),
            "PREFECT_MLPROJECTS_CACHE_DIR": str(tmp_path / "cache"),
            "PREFECT_API_URL": prefect_server.api_url,
        }
        for name in ("home", "tmp", "uv", "cache"):
            (tmp_path / name).mkdir()

    @property
    def kept(self) -> list[Path]:
        """Where secrets could be kept."""
        servers = [Path(os.environ["PREFECT_MLPROJECTS_SERVER_DIR"]), Path(os.environ["PREFECT_HOME"])]
        names = ("home", "tmp", "uv", "cache", "shown", "stdout", "stderr")
        return [*servers, self.mlflow_server.folder, *(self.root / name for name in names)]

    def run(
        self, uri: str, secrets: Mapping[str, str], *entry_points: str, **options: Any
    ) -> tuple[list[str], set[str]]:
        """How the runs ended, and where secrets were found."""
        given = {
            "uri": uri,
            "entry_points": entry_points,
            "options": options,
            "shown": str(self.root / "shown"),
            "started": str(self.root / "started"),
        }
        found: set[str] = set()
        with (
            watched_processes(secrets, found),
            (self.root / "stdout").open("wb") as out,
            (self.root / "stderr").open("wb") as err,
        ):
            subprocess.run(
                [sys.executable, "-c", SCRIPT],
                input=json.dumps(given).encode(),
                stdout=out,
                stderr=err,
                env=self.environment,
                cwd=self.root,
                timeout=300,
            )
        printed = (self.root / "stdout").read_text()
        assert printed, (self.root / "stderr").read_text()
        ends: list[str] = json.loads(printed.splitlines()[-1])
        return ends, found

    def project(self, *dependencies: str) -> Path:
        folder = self.root / "work"
        folder.mkdir()
        (folder / "MLproject").write_text(MLPROJECT.format(package=PACKAGE, started=self.root / "started"))
        (folder / "python_env.yaml").write_text(
            json.dumps({"build_dependencies": [], "dependencies": list(dependencies)})
        )
        return folder


@pytest.fixture
def house(tmp_path: Path, prefect_server: ServerAddress, mlflow_server: MlflowServer) -> House:
    return House(tmp_path, prefect_server, mlflow_server)


@pytest.fixture
def private_repository(house: House) -> Iterator[str]:
    """HOST:PORT of a server with the project as ``project.git``, behind the password `TOKEN`."""
    folder = house.project(PACKAGE)
    for arguments in (
        ("init", "-q", "-b", "trunk"),
        ("add", "-A"),
        ("commit", "-qm", "x"),
        ("clone", "-q", "--bare", ".", str(house.root / "remote" / "project.git")),
    ):
        git(folder, *arguments)
    handler = type("Handler", (SmartHttp,), {"root": house.root / "remote"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


ENDS = ["FINISHED", "FAILED", "KILLED"]


def test_secrets_given_to_run(house: House, private_repository: str) -> None:
    control = marker("control")
    secrets = {
        "project": TOKEN,
        **{name: marker(name) for name in ("tracking", "index", "proxy", "auth", "registry", "engine", "header")},
    }
    with package_index("ci", secrets["index"]) as index:
        house.environment |= {
            "MLFLOW_TRACKING_URI": house.mlflow_server.uri.replace("://", f"://ci:{secrets['tracking']}@"),
            "UV_INDEX_URL": f"http://ci:{secrets['index']}@{index}/simple",
            "HTTPS_PROXY": f"http://ci:{secrets['proxy']}@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
            "PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps({"X-Access": secrets["header"]}),
        }
        ends, found = house.run(
            f"http://{USER}:{TOKEN}@{private_repository}/project.git",
            secrets,
            "main",
            "fail",
            "sleep",
            env_manager="uv",
            parameters={"control": control},
            docker_auth={"username": "ci", "password": secrets["auth"]},
            backend_config={
                "credentials": {"username": "ci", "password": secrets["registry"]},
                "docker-engine": {"host": "tcp://127.0.0.1:9", "client_key": secrets["engine"]},
            },
        )

    assert ends == ENDS, (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *house.kept)
    # The search does find what is stored in the clear.
    seen = leaks({"control": control}, *house.kept)
    servers = (os.environ["PREFECT_MLPROJECTS_SERVER_DIR"], str(house.mlflow_server.folder))
    assert all(any(server in place and place.endswith(".db") for place in seen) for server in servers), seen


def test_secrets_from_blocks(house: House, private_repository: str, save_block: Callable[[Any, str], None]) -> None:
    secrets = {"project": TOKEN, "tracking": marker("tracking"), "registry": marker("registry")}
    name = f"leak-{uuid.uuid4().hex[:8]}"
    save_block(GitCredentialsBlock.model_validate({"username": USER, "token": TOKEN}), name)
    save_block(
        MLflowTrackingServer.model_validate(
            {"uri": house.mlflow_server.uri, "username": "ci", "password": secrets["tracking"]}
        ),
        name,
    )
    credentials = {"credentials": {"username": "ci", "password": secrets["registry"]}}
    save_block(MLprojectBackend.model_validate({"config": {"grace-period": 3}, "secrets": credentials}), name)
    ends, found = house.run(
        f"http://{private_repository}/project.git",
        secrets,
        "fail",
        "sleep",
        env_manager="local",
        git_credentials=name,
        tracking=name,
        backend_config=f"mlproject-backend/{name}",
    )

    assert ends == ["FAILED", "KILLED"], (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *house.kept)


def test_secrets_of_a_third_partys_backend(house: House) -> None:
    secrets = {"token": marker("token"), "header": marker("header")}
    (house.root / "site" / "moon-1.0.dist-info").mkdir(parents=True)
    (house.root / "site" / "moon.py").write_text(THIRD_PARTY)
    info = house.root / "site" / "moon-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moon\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prefect_mlprojects.backends]\nmoon = moon:Moon\n")
    house.environment["PYTHONPATH"] = os.pathsep.join(
        [str(house.root / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    house.environment["MLFLOW_TRACKING_URI"] = house.mlflow_server.uri
    ends, found = house.run(
        str(house.project()),
        secrets,
        "fail",
        "sleep",
        env_manager="local",
        backend="moon",
        backend_config={"token": secrets["token"], "headers": {"Authorization": secrets["header"]}},
    )

    assert ends == ["FAILED", "KILLED"], (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *house.kept)


@pytest.mark.parametrize("served", [True, False])
def test_secrets_in_a_projects_requirements(served: bool, house: House) -> None:
    secrets = {"index": marker("index")}
    house.environment["MLFLOW_TRACKING_URI"] = house.mlflow_server.uri
    with package_index("ci", secrets["index"] if served else "another") as index:
        folder = house.project(f"--index-url http://ci:{secrets['index']}@{index}/simple", PACKAGE)
        ends, found = house.run(str(folder), secrets, "main", env_manager="uv")

    assert ends == ["FINISHED" if served else "FAILED"], (house.root / "stderr").read_text()
    # The cache may keep the project's own files, for its owner.
    assert not found | leaks(secrets, *(each for each in house.kept if each.name != "cache"))
    assert not leaks(secrets, house.root / "cache", private=True)


def test_secrets_of_a_conda_channel(house: House) -> None:
    secrets = {"channel": marker("channel")}
    house.environment["MLFLOW_TRACKING_URI"] = house.mlflow_server.uri
    folder = house.project()
    (folder / "MLproject").write_text(
        (folder / "MLproject").read_text().replace("python_env: python_env.yaml", "conda_env: conda.yaml")
    )
    channel = f"http://ci:{secrets['channel']}@127.0.0.1:9/channel"
    (folder / "conda.yaml").write_text(json.dumps({"channels": [channel], "dependencies": ["python"]}))
    ends, found = house.run(str(folder), secrets, "main", env_manager="conda")

    assert ends == ["FAILED"], (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *(each for each in house.kept if each.name != "cache"))
    assert not leaks(secrets, house.root / "cache", private=True)


@pytest.fixture(autouse=True)
def needs_git() -> None:
    assert shutil.which("git") is not None, "these tests need git"
