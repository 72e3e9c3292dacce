"""Where tasks run: processes of this machine that stand for the drivers of clusters."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.databricks_api.identity import Directory, SecretScopes
from tests.fakes.databricks_api.runs import FakeRun

RUNTIME = Path(__file__).parent / "runtime"
_LINGER = 15.0
_MOUNTS = re.compile(r"(?<![\w./-])/(Workspace|Volumes|dbfs)/")
_SECRET = re.compile(r"\{\{secrets/([^/}]+)/([^}]+)\}\}")
_NETWORK = ("UV_", "PIP_", "SSL_", "REQUESTS_CA", "HTTP_", "HTTPS_", "NO_PROXY", "http_", "https_", "no_proxy")


@dataclass
class Failure:
    """How a run ends before its task starts.

    Attributes:
        code: The termination code.
        kind: The termination type.
        message: The words of Databricks or the cloud.
        life_cycle: The life-cycle state.
        result: The result state.
    """

    code: str
    kind: str
    message: str
    life_cycle: str = "INTERNAL_ERROR"
    result: str | None = "FAILED"


@dataclass
class Drivers:
    """Runs tasks.

    Attributes:
        root: The workspace's files.
        host: The workspace's address.
        people: Gives a run its token.
        secrets: What a driver may read.
        variables: Further variables of every driver.
        failure: How the next runs end before their task starts.
        hold: While it is set, runs stay in this life-cycle state (``QUEUED``, ``PENDING``) and do not start.
        runtime: Which modules of the runtime a driver has: ``dbruntime`` (today's) or ``pyspark`` (older ones).
        repositories: A git URL -> the repository that it means here.
    """

    root: Path
    host: str
    people: Directory
    secrets: SecretScopes
    variables: dict[str, str] = field(default_factory=dict)
    failure: Failure | None = None
    hold: str | None = None
    runtime: str = "dbruntime"
    repositories: dict[str, Path] = field(default_factory=dict)

    def start(self, run: FakeRun) -> None:
        """Begins a run; it goes on in a thread."""
        threading.Thread(target=self._live, args=(run,), daemon=True).start()

    def _live(self, run: FakeRun) -> None:
        # What a run leaves on an existing cluster is there for the next one.
        cluster = run.task.get("existing_cluster_id")
        folder = self.root / "machines" / str(cluster or run.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        token = self.people.grant(run.creator)
        try:
            self._run(run, folder, token)
        except Exception as error:
            run.end("INTERNAL_ERROR", "FAILED", "INTERNAL_ERROR", "INTERNAL_ERROR", f"{type(error).__name__}: {error}")
            raise
        finally:
            self.people.tokens.pop(token, None)
            if cluster is None:
                shutil.rmtree(folder, ignore_errors=True)

    def _run(self, run: FakeRun, folder: Path, token: str) -> None:
        while self.hold is not None and not run.asked_to_end.is_set():
            run.life_cycle = self.hold
            run.message = "Waiting for cluster" if self.hold == "PENDING" else ""
            time.sleep(0.02)
        if self._cancelled(run):
            return
        if self.failure is not None:
            found = self.failure
            run.end(found.life_cycle, found.result, found.code, found.kind, found.message)
            return
        run.life_cycle = "PENDING"
        python = run.task["spark_python_task"]
        script = self._local(python["python_file"])
        if python.get("source") == "GIT":
            checkout = folder / "repository"
            if not self._check_out(run, checkout):
                return
            script = checkout / python["python_file"]
        if not self._install(run, folder / "libraries"):
            return
        if not script.is_file():
            run.end(
                "INTERNAL_ERROR",
                "FAILED",
                "RESOURCE_NOT_FOUND",
                "CLIENT_ERROR",
                f"Cannot read the python file {python['python_file']}. Please check driver logs for more details.",
            )
            return
        arguments = [
            _MOUNTS.sub(lambda found: f"{self.root}/{found[1]}/", each) for each in python.get("parameters") or []
        ]
        self._execute(
            run, [sys.executable, str(script), *arguments], self._environment(run, folder, token), script.parent
        )

    def _local(self, path: str) -> Path:
        if path.startswith("dbfs:"):
            path = "/dbfs/" + path.removeprefix("dbfs:").lstrip("/")
        return self.root / path.lstrip("/")

    def _environment(self, run: FakeRun, folder: Path, token: str) -> dict[str, str]:
        cluster = run.task.get("new_cluster") or {}
        (folder / "tmp").mkdir(exist_ok=True)
        own = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": os.pathsep.join((str(RUNTIME / self.runtime), str(folder / "libraries"))),
            "DATABRICKS_RUNTIME_VERSION": str(cluster.get("spark_version", "15.4")).partition(".x")[0],
            "DATABRICKS_HOST": self.host,
            "DATABRICKS_TOKEN": token,
        }
        asked = {
            name: self._revealed(value, run.creator) for name, value in (cluster.get("spark_env_vars") or {}).items()
        }
        return {**_network_settings(), **own, **asked, **self.variables}

    def _revealed(self, value: str, user: str) -> str:
        return _SECRET.sub(lambda found: self.secrets.read(found[1], found[2], user), value)

    def _install(self, run: FakeRun, folder: Path) -> bool:
        packages = [each["pypi"]["package"] for each in run.task.get("libraries") or [] if "pypi" in each]
        for environment in run.body.get("environments") or []:
            packages += environment.get("spec", {}).get("dependencies") or []
        if not packages:
            return True
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        done = subprocess.run(
            [uv, "pip", "install", "-q", "--python", sys.executable, "--target", str(folder), *packages],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return True
        run.end(
            "INTERNAL_ERROR",
            "FAILED",
            "LIBRARY_INSTALLATION_ERROR",
            "CLIENT_ERROR",
            f"Library installation failed for library due to user error for pypi packages {packages}. Error messages: "
            f"{done.stderr.strip()}",
        )
        return False

    def _check_out(self, run: FakeRun, folder: Path) -> bool:
        source = run.body["git_source"]
        origin = self.repositories.get(source["git_url"])
        commands = [["clone", "-q", str(origin), str(folder)]]
        commands += [["-C", str(folder), "checkout", "-q", source.get("git_commit") or source.get("git_branch") or ""]]
        for command in commands:
            done = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
            if origin is None or done.returncode:
                run.end(
                    "INTERNAL_ERROR",
                    "FAILED",
                    "REPOSITORY_CHECKOUT_FAILED",
                    "CLIENT_ERROR",
                    f"Failed to checkout Git repository: {done.stderr.strip()}",
                )
                return False
        return True

    def _execute(self, run: FakeRun, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        run.process = process = subprocess.Popen(
            command,
            cwd=folder if folder.is_dir() and (folder / ".git").exists() else self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=dict(environment),
        )
        run.life_cycle = "RUNNING"
        run.message = "In run"
        pieces: list[bytes] = []
        assert process.stdout is not None
        output = process.stdout.fileno()
        reader = threading.Thread(target=lambda: pieces.extend(iter(lambda: os.read(output, 65536), b"")), daemon=True)
        reader.start()
        seconds = run.body.get("timeout_seconds") or None
        deadline = None if seconds is None else time.monotonic() + seconds
        late = False
        while process.poll() is None and not run.asked_to_end.wait(0.03):
            late = deadline is not None and time.monotonic() > deadline
            if late:
                break
        if process.poll() is None:
            run.life_cycle = "TERMINATING"
            end_process(process)
        reader.join(_LINGER)
        if not reader.is_alive():
            process.stdout.close()
        run.logs = b"".join(pieces).decode("utf-8", "replace")
        if late:
            run.end("TERMINATED", "TIMEDOUT", "CANCELED", "CLIENT_ERROR", f"Run timed out after {seconds} seconds")
        elif not self._cancelled(run):
            self._judge(run, process.returncode)

    @staticmethod
    def _cancelled(run: FakeRun) -> bool:
        if not run.asked_to_end.is_set():
            return False
        run.end("TERMINATED", "CANCELED", "USER_CANCELED", "CLIENT_ERROR", f"Run cancelled by {run.cancelled_by}.")
        return True

    @staticmethod
    def _judge(run: FakeRun, code: int) -> None:
        if code == 0:
            run.end("TERMINATED", "SUCCESS", "SUCCESS", "SUCCESS")
            return
        if code < 0:
            message = "The spark driver has stopped unexpectedly and is restarting."
            run.end("TERMINATED", "FAILED", "DRIVER_ERROR", "CLIENT_ERROR", message)
            return
        # A driver shows the last line of the trace, or SystemExit with its code.
        last = run.logs.strip().rpartition("\n")[2]
        run.error = last if re.match(r"^[\w.]+(Error|Exception)\b", last) else f"SystemExit: {code}"
        start = run.logs.rfind("Traceback (most recent call last)")
        run.trace = run.logs[start:] if start >= 0 else None
        message = f"Task {run.task['task_key']} failed with message: {run.error}."
        run.end("TERMINATED", "FAILED", "RUN_EXECUTION_ERROR", "CLIENT_ERROR", message)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Asks a driver to end, and kills it when it does not."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_LINGER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _network_settings() -> dict[str, str]:
    """How this machine reaches a package index: a cluster has that from its init scripts."""
    return {name: value for name, value in os.environ.items() if name.startswith(_NETWORK)}
