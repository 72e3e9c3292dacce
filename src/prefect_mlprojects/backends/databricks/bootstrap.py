# ruff: noqa: T201, UP031 - it reports to the driver's standard error, and must run on Python 3.8
"""Runs a project on the driver of a Databricks cluster; uploaded as a file, so standard library and Python 3.8 only.

Its argument is a job in JSON (`task.py` makes it). It unpacks the archive on the local disk, builds the environment there
(cached for the next run), runs the command in its own process group, and forwards output, signals and exit code.
"""

from __future__ import annotations

import contextlib
import fcntl
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
import time
import traceback
from pathlib import Path
from typing import Any

GRACE_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
SLOWER = 200.0  # The pause between writes is the run time divided by this: a long run gets few files.


class SetupError(Exception):
    """The command can't be started."""


class Chunks:
    """Writes output as numbered files, because volumes and workspace files can't be appended to.

    A file holds pieces of both streams in order, each after a line with the stream's name and the number of bytes.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder) if folder else None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._pending: list[tuple[str, bytes]] = []
        self._number, self._began = 0, time.monotonic()
        self._try("no live output", lambda folder: folder.mkdir(parents=True, exist_ok=True))
        self._thread = threading.Thread(target=self._write_often, daemon=True)
        self._thread.start()

    def add(self, stream: str, data: bytes) -> None:
        """Queues output of a stream."""
        if self._folder is not None and data:
            with self._lock:
                self._pending.append((stream, data))

    def _write_often(self) -> None:
        pause = FIRST_PAUSE
        while not self._closed.wait(pause):
            self.flush()
            pause = min(max(FIRST_PAUSE, (time.monotonic() - self._began) / SLOWER), LONGEST_PAUSE)

    def flush(self) -> None:
        """Writes the queued output."""
        with self._lock:
            framed = [b"%s %d\n%s" % (stream.encode(), len(data), data) for stream, data in self._pending]
            self._pending = []
            if framed:
                self._number += 1
                self._write("%08d" % self._number, b"".join(framed))

    def _write(self, name: str, data: bytes) -> None:
        self._try("output can't be written", lambda folder: (folder / name).write_bytes(data))

    def _try(self, failure: str, work: Any) -> None:
        """Calls `work` with the folder; after an error no more output is written."""
        try:
            if self._folder is not None:
                work(self._folder)
        except OSError as error:
            print("mlprojects: %s: %s" % (failure, error), file=sys.stderr)
            self._folder = None

    def close(self, code: int, problem: str) -> None:
        """Writes the remaining output, the exit code and the problem."""
        self._closed.set()
        self._thread.join()
        self.flush()
        self._write("exit.json", json.dumps({"exit_code": code, "problem": problem}).encode())


class Tee:
    """A text stream that also writes to the chunks, for code in this process."""

    def __init__(self, stream: Any, name: str, chunks: Chunks) -> None:
        self._stream, self._name, self._chunks = stream, name, chunks

    def write(self, text: str) -> int:
        """Writes to the stream and the chunks."""
        self._chunks.add(self._name, text.encode("utf-8", "replace"))
        return int(self._stream.write(text) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unpack(archive: str, digest: str) -> Path:
    """Unpacks the archive into a new folder on the local disk and returns it."""
    try:
        content = Path(archive).read_bytes()
    except OSError as error:
        raise SetupError(
            "The uploaded project can't be read on the driver (%s). Run again; if it stays, choose a code-path that this kind "
            "of compute can read." % error
        ) from None
    if hashlib.sha256(content).hexdigest() != digest:
        advice = "run 'mlprojects databricks clean' and run again."
        raise SetupError("The uploaded archive %s is damaged: %s" % (archive, advice))
    folder = Path(tempfile.mkdtemp(prefix="mlprojects-"))
    with tarfile.open(archive, "r:gz") as tar:
        options: Any = {"filter": "tar"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(folder, **options)  # noqa: S202 - our own archive, checked by its digest
    return folder


def build_environment(wanted: dict[str, Any], root: Path, log: Any) -> Path:
    """Returns the environment's bin folder; an environment is built once per content on this machine."""
    project = root / "project"
    if wanted.get("key") is None:
        # It refers to the project's folder, which is removed with the run.
        install(wanted, root / "environment", project, root, log)
        return root / "environment" / "bin"
    kept = Path(os.environ.get("MLPROJECTS_ENVIRONMENTS") or Path(tempfile.gettempdir()) / "mlprojects-environments")
    own = "%s %s %s" % (sys.version_info[:3], sys.executable, wanted["installer"])
    target = kept / hashlib.sha256((wanted["key"] + own).encode()).hexdigest()[:24]
    if (target / "complete").exists():
        print("mlprojects: using the existing environment %s" % target, file=sys.stderr)
        return target / "bin"
    kept.mkdir(parents=True, exist_ok=True)
    # Another run on this machine may be building the same one.
    with Path(str(target) + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            install(wanted, target, project, kept, log)
            (target / "complete").touch()
    return target / "bin"


def install(wanted: dict[str, Any], target: Path, project: Path, root: Path, log: Any) -> None:
    """Creates a virtual environment with uv, or with pip if uv is not wanted or not available."""
    python = wanted.get("python")
    uv = find_uv(root, log) if wanted["installer"] == "uv" else None
    print("mlprojects: building the environment %s with %s" % (target, uv or "pip"), file=sys.stderr)
    if wanted.get("locked"):
        if uv is None:
            raise SetupError("The project's uv.lock can't be installed: the driver has no uv and can't install it.")
        command = [uv, "sync", "-q", "--frozen", "--no-dev", "--no-editable"]
        log(command, project, {"UV_PROJECT_ENVIRONMENT": str(target)})
        return
    if uv is not None:
        log([uv, "venv", "-q", "--no-project", "--python", python or sys.executable, str(target)], project)
        base = [uv, "pip", "install", "-q", "--python", str(target / "bin" / "python")]
    else:
        own = "%d.%d.%d" % sys.version_info[:3]
        if python and not fits(own, python):
            missing = "The project needs Python %s; the driver has %s, and no uv to install another." % (python, own)
            raise SetupError(missing + " Choose a runtime with that Python.")
        log([sys.executable, "-m", "venv", str(target)], project)
        base = [str(target / "bin" / "python"), "-m", "pip", "install", "-q"]
    for name in wanted.get("files", ()):
        log([*base, "-r", name], project, wanted.get("variables"))


def fits(own: str, wanted: str) -> bool:
    """Returns whether a Python's version matches the wanted version, prefix or range."""
    if wanted[:1].isdigit():
        return (own + ".").startswith(wanted.rstrip(".") + ".")
    for name in ("packaging", "pip._vendor.packaging"):
        with contextlib.suppress(ImportError):
            return bool(importlib.import_module(name + ".specifiers").SpecifierSet(wanted).contains(own))
    return False


def find_uv(root: Path, log: Any) -> str | None:
    """Returns uv's path, after installing it beside the environments if the driver has none; None if that fails."""
    own, found = root / "tools" / "bin" / "uv", shutil.which("uv")
    if found is None and not own.exists():
        with contextlib.suppress(SetupError):
            log([sys.executable, "-m", "pip", "install", "-q", "--target", str(root / "tools"), "uv"], root)
    return found or (str(own) if own.exists() else None)


def read_secrets(places: dict[str, str] | None) -> dict[str, str]:
    """Reads secrets, by variable, with the runtime's utilities."""
    if not places:
        return {}
    try:
        utilities = importlib.import_module("databricks.sdk.runtime").dbutils
    except ImportError:
        # Runtimes before 13.
        session = importlib.import_module("pyspark.sql").SparkSession.builder.getOrCreate()
        utilities = importlib.import_module("pyspark.dbutils").DBUtils(session)
    found = {}
    for name, place in places.items():
        try:
            found[name] = utilities.secrets.get(*place.split("/", 1))
        except Exception as error:  # noqa: BLE001 - the utilities raise Java's errors
            raise SetupError(
                "The secret %s for the variable %s can't be read on the driver (%s). Check the scope and the key, and that "
                "the run's user has READ on the scope." % (place, name, str(error).partition("\n")[0])
            ) from None
    return found


class Command:
    """A command in its own process group, which receives the signals of this process."""

    def __init__(self, command: list[str], folder: Path, variables: dict[str, str], chunks: Chunks) -> None:
        self._chunks, self._asked = chunks, False
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=str(folder), env=variables, stdout=pipe, stderr=pipe, start_new_session=True
        )

    def run(self) -> int:
        """Waits until the whole process group has ended; returns the command's exit code."""
        process, before = self._process, {}
        # In another thread than the main one, which can't have handlers, an interrupt ends the command, below.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, lambda number, _frame: self._end(number))
        pipes = (process.stdout, sys.stdout, "out"), (process.stderr, sys.stderr, "err")
        threads = [threading.Thread(target=self._copy, args=each, daemon=True) for each in pipes]
        for thread in threads:
            thread.start()
        try:
            code = process.wait()
        except BaseException:
            self._end(signal.SIGTERM)
            process.wait()
            raise
        finally:
            self._sweep()
            for number, handler in before.items():
                signal.signal(number, handler)
        for thread in threads:
            thread.join(GRACE_SECONDS)
        return code if code >= 0 else 128 - code

    def _end(self, number: int) -> None:
        self._asked = True
        self._kill(number)
        timer = threading.Timer(GRACE_SECONDS, self._kill, [signal.SIGKILL])
        timer.daemon = True
        timer.start()

    def _kill(self, number: int) -> bool:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
            return True
        return False

    def _sweep(self) -> None:
        """Kills the rest of the group, which would keep the cluster busy."""
        deadline = time.monotonic() + GRACE_SECONDS
        # After a stop, children that outlive their shell have the same grace period.
        while self._asked and time.monotonic() < deadline and self._kill(0):
            time.sleep(0.05)
        self._kill(signal.SIGKILL)

    def _copy(self, source: Any, target: Any, stream: str) -> None:
        for data in iter(lambda: os.read(source.fileno(), 65536), b""):
            self._chunks.add(stream, data)
            target.write(data.decode("utf-8", "replace"))
            target.flush()


def run_in_process(job: dict[str, Any], project: Path, variables: dict[str, str], chunks: Chunks) -> int:
    """Runs a Spark job's file in this Python, which has the Spark session, and returns its exit code."""
    os.environ.update(variables)
    os.chdir(str(project))
    sys.path.insert(0, str(project))
    sys.argv = [job["file"], *job["parameters"]]
    out, err = Tee(sys.stdout, "out", chunks), Tee(sys.stderr, "err", chunks)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(job["file"], run_name="__main__")
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return end.code or 0
            print(end.code, file=sys.stderr)
            return 1
        except Exception:
            chunks.add("err", traceback.format_exc().encode("utf-8", "replace"))
            raise
    return 0


def command_variables(job: dict[str, Any], root: Path, log: Any) -> dict[str, str]:
    """Returns the command's complete environment."""
    variables = {**os.environ, **job["variables"], **read_secrets(job.get("secrets"))}
    # Output goes through a pipe, which Python would buffer.
    variables.setdefault("PYTHONUNBUFFERED", "1")
    programs = Path(sys.executable).parent
    if job.get("environment"):
        programs = build_environment(job["environment"], root, log)
        variables["VIRTUAL_ENV"] = str(programs.parent)
        # The driver's packages are for its own Python.
        variables = {name: variables[name] for name in variables if name not in ("PYTHONPATH", "PYTHONHOME")}
    elif not job.get("spark_job"):
        # "python" is the driver's Python, with the cluster's libraries.
        uploaded = os.path.dirname(job["archive"])  # noqa: PTH120
        variables["PYTHONPATH"] = os.pathsep.join(each for each in sys.path if each and each != uploaded)
    variables["PATH"] = str(programs) + os.pathsep + variables.get("PATH", os.defpath)
    return variables


def main(text: str) -> None:
    """Runs a job; exits with the command's exit code if that is not 0."""
    job = json.loads(text)
    chunks = Chunks(job.get("output"))
    code, problem, root = 1, "", None

    def log(command: list[str], folder: Path, further: dict[str, str] | None = None) -> None:
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        code = Command(command, folder, {**variables, **(further or {})}, chunks).run()
        if code:
            shown = " ".join([os.path.basename(command[0]), *command[1:]])  # noqa: PTH119
            raise SetupError("The environment can't be built: '%s' failed with exit code %d." % (shown, code))

    try:
        root = unpack(job["archive"], job["sha256"])
        variables = command_variables(job, root, log)
        if job.get("spark_job"):
            code = run_in_process(job["spark_job"], root / "project", variables, chunks)
        else:
            code = Command(["bash", "-c", job["command"]], root / "project", variables, chunks).run()
    except SetupError as error:
        problem = str(error)
        raise SystemExit(problem) from None
    finally:
        chunks.close(code, problem)
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)
    # Drivers report even SystemExit(0) as a failure.
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main(sys.argv[1])
