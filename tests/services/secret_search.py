"""Searches for secrets in everything that runs leave behind.

Searched are Prefect's whole database and server log, MLflow's store and artifacts, the process list while the runs go on,
everything that was printed, the caches and temporary folders, and what errors, handles and results show or pickle to.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.services.git_server import USER
from tests.services.mlflow_server import MlflowServer
from tests.services.package_index import PACKAGE

from prefect_mlprojects.server.process import ServerAddress

ENDS = ["FINISHED", "FAILED", "KILLED"]
"""How the entry points ``main``, ``fail`` and ``sleep`` end."""

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
