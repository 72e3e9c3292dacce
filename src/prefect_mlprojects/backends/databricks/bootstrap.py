# ruff: noqa: T201, UP031 - its standard error is the driver's, and it must run on Python 3.8
"""Runs a project on the driver of a Databricks cluster; uploaded as it is, so standard library and Python 3.8 only.

It gets one argument, a JSON text: where the archive is, the command, plain variables, names of secrets, the environment. It
unpacks the archive on the local disk, builds the environment there (kept for the next run on the same cluster), runs the
command in its own process group, and passes output, signals and exit code on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

CHUNK_SECONDS = 1.0
GRACE_SECONDS = 10.0


class Chunks:
    """Writes output as numbered files, because volumes and workspace files can't be appended to."""

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder) if folder else None
        self._lock = threading.Lock()
        self._pending: list[tuple[str, list[bytes]]] = []
        self._number = 0
        self._closed = threading.Event()
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                print("mlprojects: no live output:", error, file=sys.stderr)
                self._folder = None
        self._thread = threading.Thread(target=self._write_often, daemon=True)
        self._thread.start()

    def add(self, stream: str, data: bytes) -> None:
        """Takes the next output of a stream."""
        if self._folder is not None:
            with self._lock:
                if self._pending and self._pending[-1][0] == stream:
                    self._pending[-1][1].append(data)
                else:
                    self._pending.append((stream, [data]))

    def _write_often(self) -> None:
        while not self._closed.wait(CHUNK_SECONDS):
            self.flush()

    def flush(self) -> None:
        """Writes what has come."""
        with self._lock:
            pending, self._pending = self._pending, []
            for stream, pieces in pending:
                self._number += 1
                self._write("%08d.%s" % (self._number, stream), b"".join(pieces))

    def _write(self, name: str, data: bytes) -> None:
        if self._folder is None:
            return
        try:
            (self._folder / name).write_bytes(data)
        except OSError as error:
            print("mlprojects: output can't be written:", error, file=sys.stderr)
            self._folder = None

    def close(self, code: int) -> None:
        """Writes what is left, and the exit code."""
        self._closed.set()
        self._thread.join()
        self.flush()
        self._write("exit.json", json.dumps({"exit_code": code}).encode())


def unpack(archive: str, digest: str) -> Path:
    """Unpacks the archive into a new folder of the local disk and returns it."""
    content = Path(archive).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise SystemExit("The uploaded archive %s is damaged: run again." % archive)
    folder = Path(tempfile.mkdtemp(prefix="mlprojects-"))
    with tarfile.open(archive, "r:gz") as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="tar")
        else:
            tar.extractall(folder)  # noqa: S202 - our own archive, checked by its digest
    return folder


def build_environment(wanted: dict[str, Any], project: Path, digest: str, log: Any) -> Path:
    """Returns the folder of the environment's programs, built once per content on this machine."""
    requirements = project / wanted["requirements"]
    key = hashlib.sha256((json.dumps(wanted, sort_keys=True) + digest).encode()).hexdigest()[:24]
    root = Path(os.environ.get("MLPROJECTS_ENVIRONMENTS") or Path(tempfile.gettempdir()) / "mlprojects-environments")
    target = root / key
    if (target / "complete").exists():
        return target / "bin"
    root.mkdir(parents=True, exist_ok=True)
    # Another run on this machine may build the same one.
    with open(str(target) + ".lock", "w") as lock:  # noqa: PTH123
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            install(wanted, target, requirements, project, root, log)
            (target / "complete").touch()
    return target / "bin"


def install(wanted: dict[str, Any], target: Path, requirements: Path, project: Path, root: Path, log: Any) -> None:
    """Makes a virtual environment with uv, or with pip where uv is not to be had and the driver's Python fits."""
    python = wanted.get("python")
    uv = shutil.which("uv") or fetch_uv(root, log)
    if uv:
        log(
            [uv, "venv", "-q", *(["--python", python] if python else ["--python", sys.executable]), str(target)],
            project,
        )
        base = [uv, "pip", "install", "-q", "--python", str(target / "bin" / "python")]
    else:
        own = "%d.%d.%d" % sys.version_info[:3]
        if python and not (own + ".").startswith(python + "."):
            raise SystemExit(
                "The project wants Python %s; the driver has %s, and uv can't be installed." % (python, own)
            )
        log([sys.executable, "-m", "venv", str(target)], project)
        base = [str(target / "bin" / "python"), "-m", "pip", "install", "-q"]
    if wanted.get("build"):
        log([*base, *wanted["build"]], project)
    if requirements.read_text().strip():
        log([*base, "-r", str(requirements)], project)


def fetch_uv(root: Path, log: Any) -> str | None:
    """Installs uv beside the environments and returns its path; None where it can't be had."""
    tools = root / "tools"
    try:
        log([sys.executable, "-m", "pip", "install", "-q", "--target", str(tools), "uv"], root)
    except SystemExit:
        return None
    return str(tools / "bin" / "uv")


def read_secrets(places: dict[str, str] | None) -> dict[str, str]:
    """Reads secrets with the runtime's own utilities."""
    if not places:
        return {}
    # Only a Databricks runtime has it.
    session = importlib.import_module("pyspark.sql").SparkSession.builder.getOrCreate()
    utilities = importlib.import_module("pyspark.dbutils").DBUtils(session)
    return {name: utilities.secrets.get(*place.split("/", 1)) for name, place in places.items()}


def run_command(command: list[str], project: Path, variables: dict[str, str], chunks: Chunks) -> int:
    """Runs a command in its own process group and returns its exit code."""
    process = subprocess.Popen(
        command, cwd=str(project), env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )

    def pass_on(number: int, _frame: Any) -> None:
        os.killpg(process.pid, number)
        threading.Timer(GRACE_SECONDS, end).start()

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def copy(source: Any, target: Any, stream: str) -> None:
        while True:
            data = os.read(source.fileno(), 65536)
            if not data:
                return
            target.write(data.decode("utf-8", "replace"))
            target.flush()
            chunks.add(stream, data)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
    except ValueError:
        pass  # Not the main thread: the cluster's end is then the command's.
    threads = [
        threading.Thread(target=copy, args=(process.stdout, sys.stdout, "out"), daemon=True),
        threading.Thread(target=copy, args=(process.stderr, sys.stderr, "err"), daemon=True),
    ]
    for thread in threads:
        thread.start()
    code = process.wait()
    for thread in threads:
        thread.join(GRACE_SECONDS)
    return code if code >= 0 else 128 - code


def main(text: str) -> None:
    """Does it all; exits with the command's exit code when that is not 0."""
    job = json.loads(text)
    chunks = Chunks(job.get("output"))
    code = 1
    project = None

    def log(command: list[str], folder: Path) -> None:
        code = run_command(command, folder, dict(os.environ), chunks)
        if code:
            raise SystemExit("%s failed with exit code %d." % (" ".join(command[:3]), code))

    try:
        root = unpack(job["archive"], job["sha256"])
        project = root / "project"
        variables = {**os.environ, **job["variables"], **read_secrets(job.get("secrets"))}
        if job.get("spark_job"):
            os.environ.update(variables)
            os.chdir(str(project))
            sys.path.insert(0, str(project))
            sys.argv = [job["spark_job"]["file"], *job["spark_job"]["parameters"]]
            try:
                runpy.run_path(job["spark_job"]["file"], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        else:
            if job.get("environment"):
                programs = build_environment(job["environment"], project, job["sha256"], log)
                variables["PATH"] = str(programs) + os.pathsep + variables.get("PATH", os.defpath)
                variables["VIRTUAL_ENV"] = str(programs.parent)
                variables.pop("PYTHONHOME", None)
            code = run_command(["bash", "-c", job["command"]], project, variables, chunks)
    except SystemExit as end:
        chunks.add("err", (str(end.code) + "\n").encode())
        raise
    finally:
        chunks.close(code)
        if project is not None:
            shutil.rmtree(project.parent, ignore_errors=True)
    # A driver takes even SystemExit(0) for a failure.
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main(sys.argv[1])
