"""One container from its creation to its removal, the process that guards it, and the reasons for its end."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.secrets import reveal_all
from prefect_mlprojects.backends.configuration import dump_config
from prefect_mlprojects.backends.containers.engine import LocalConfig, connect
from prefect_mlprojects.backends.docker.output import ContainerOutput
from prefect_mlprojects.backends.outcome import Outcome, explain_exit, stopped_outcome, timed_out_outcome
from prefect_mlprojects.types import FailureCategory, StopSignal

if TYPE_CHECKING:
    from prefect_mlprojects.backends.contract import RunIdentity

_logger = logging.getLogger(__name__)

_PING_AFTER = 60.0
"""Seconds after which a silent engine is pinged."""
_ENGINE_TIMEOUT = 300.0
"""Seconds for which an engine may be unreachable (restarted, network down) before its container counts as lost."""

LABEL = "prefect-mlprojects"


def labels(identity: RunIdentity) -> dict[str, str]:
    """Returns the labels that identify a run's container."""
    return {
        f"{LABEL}.flow-run-id": identity.flow_run_id,
        f"{LABEL}.mlflow-run-id": identity.mlflow_run_id,
        f"{LABEL}.project": identity.project,
        f"{LABEL}.entry-point": identity.entry_point,
    }


def find_running(engine: Any, identity: RunIdentity) -> str | None:
    """Returns the id of a flow run's running container, or None."""
    label = f"{LABEL}.flow-run-id={identity.flow_run_id}"
    found = engine.containers(filters={"label": label, "status": "running"})
    return str(found[0]["Id"]) if found else None


class ContainerRun:
    """Starts one container, waits until it exits and removes it."""

    def __init__(self, engine: Any, container_id: str, output: TailedOutput, *, tty: bool) -> None:
        self._engine = engine
        self._id = container_id
        self._tailed = output
        self._output = ContainerOutput(engine, container_id, output, tty=tty)
        self._ended = threading.Event()
        self._lost: str | None = None

    def start(self, *, attach: bool) -> None:
        """Starts the container and begins to read its output; raises ``docker.errors.APIError``.

        Attaching delivers incomplete lines at once, but needs a connection that does not break: an engine on this machine.
        Otherwise the engine's log is read.
        """
        if attach:
            self._output.attach()
        self._engine.start(self._id)
        if not attach:
            self._output.follow_log()

    def resume(self) -> None:
        """Begins to read the output of a running container, from its first line."""
        self._output.follow_log()

    def wait(self, stop: StopSignal, timeout: float | None, grace: float) -> Outcome:
        """Waits until the container exits; stops it on a stop request or after `timeout` seconds."""
        wake = threading.Event()
        threading.Thread(target=self._watch, args=(wake,), name="container-end", daemon=True).start()
        forget = stop.on_request(wake.set)
        try:
            in_time = wake.wait(timeout)
        finally:
            forget()
        exited = self._ended.is_set()
        if not exited:
            # Docker sends SIGTERM, and SIGKILL after the grace period.
            self._call_idempotent("stopped", self._engine.stop, timeout=round(grace))
            self._ended.wait(grace + 30)
        state = self._state()
        self._output.finish()
        tail = self._tailed.close()
        if not exited:
            return stopped_outcome(stop, tail) if in_time else timed_out_outcome(timeout, tail)
        if self._lost:
            advice = f"The container may still be running: docker rm -f {self._id[:12]}"
            return Outcome("lost", cause=self._lost, advice=advice, output_tail=tail)
        return replace(explain_end(state), output_tail=tail)

    def remove(self) -> None:
        """Removes the container. Idempotent."""
        self._call_idempotent("removed", self._engine.remove_container, force=True, v=True)

    def _call_idempotent(self, done: str, call: Callable[..., Any], **options: Any) -> None:
        from docker.errors import NotFound

        try:
            call(self._id, **options)
        except NotFound:
            return
        except OSError as error:
            # The base of Docker's APIError and of all errors of requests.
            _logger.warning("The container %s could not be %s: %s", self._id[:12], done, error)

    def _watch(self, wake: threading.Event) -> None:
        """Waits until the container exits; reconnects if the connection breaks."""
        from docker.errors import NotFound

        away_since: float | None = None
        while not self._ended.is_set():
            try:
                self._engine.wait(self._id, timeout=_PING_AFTER)
                break
            except NotFound:
                # It was removed by someone else.
                break
            except OSError as error:
                if self._answers():
                    # A running container sends nothing, which looks like a dead connection.
                    away_since = None
                    continue
                if away_since is None:
                    away_since = time.monotonic()
                    _logger.warning("The connection to the Docker engine broke (%s); reconnecting", error)
            if time.monotonic() - away_since > _ENGINE_TIMEOUT:
                self._lost = f"the Docker engine has not answered for {_ENGINE_TIMEOUT:g} s"
                break
            self._ended.wait(1)
        self._ended.set()
        wake.set()

    def _answers(self) -> bool:
        from docker.errors import DockerException

        try:
            return bool(self._engine.ping())
        except (DockerException, OSError):
            return False

    def _state(self) -> Mapping[str, Any]:
        from docker.errors import DockerException, NotFound

        if self._lost:
            return {}
        try:
            state: Mapping[str, Any] = self._engine.inspect_container(self._id)["State"]
        except NotFound:
            return {"ExitCode": 137, "Error": "the container was removed while it ran"}
        except (DockerException, OSError) as error:
            return {"ExitCode": 125, "Error": f"the Docker engine does not answer: {error}"}
        return state


_DONE = b"done\n"
_GUARD = (
    "import json, sys; job = json.loads(sys.stdin.buffer.readline()); sys.path[:] = job['path']; "
    f"from {__name__} import watch; watch(job)"
)


@contextlib.contextmanager
def guarded(container_id: str, config: LocalConfig, grace: float) -> Iterator[None]:
    """Stops the container if this process dies within the context; `grace` is the grace period in seconds.

    A separate process reads ``done`` on its standard input after the container's exit; end of file without it means that this
    process died.
    """
    # Sent by the pipe, since it may hold the engine's key.
    engine = reveal_all({name: value for name, value in dump_config(config).items() if name.startswith("docker-")})
    job = {"container": container_id, "grace": grace, "path": sys.path, "engine": engine}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            process.stdin.write(_DONE)
            process.stdin.close()
        process.wait()


def watch(job: Mapping[str, Any]) -> None:
    """Runs in the guard process: stops the container unless ``done`` comes before the end of standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _DONE:
        return
    engine = connect(LocalConfig.model_validate(job["engine"]))
    with contextlib.suppress(Exception):
        engine.stop(job["container"], timeout=int(job["grace"]))
    with contextlib.suppress(Exception):
        engine.remove_container(job["container"], force=True)


_IMAGE, _SCHEDULING, _INFRASTRUCTURE = FailureCategory.IMAGE, FailureCategory.SCHEDULING, FailureCategory.INFRASTRUCTURE
_NO_DRIVER = "For GPUs install the NVIDIA Container Toolkit on the engine's machine, or leave gpus out."
_NO_DEVICE = "a requested device does not exist on the Docker host"

# Substring of the engine's message, cause, advice, category; the first match counts.
_START_FAILURES: tuple[tuple[str, str, str, FailureCategory], ...] = (
    ("no such image", "the engine has no such image", "Pull or build it, or correct its name.", _IMAGE),
    ("manifest unknown", "the registry has no such image or tag", "Correct the image's name or tag.", _IMAGE),
    ("executable file not found", "the image has no shell (sh) for the command", "Use an image that has one.", _IMAGE),
    (
        "no such file or directory: unknown",
        "the image has no sh, or its entrypoint is missing",
        "Correct the entrypoint.",
        _IMAGE,
    ),
    ("could not select device driver", "the engine has no driver for the devices requested", _NO_DRIVER, _SCHEDULING),
    ("no such device", _NO_DEVICE, "Correct the devices.", _SCHEDULING),
    ("error gathering device information", _NO_DEVICE, "Correct the devices.", _SCHEDULING),
    ("port is already allocated", "a port is in use already", "Publish another port.", _INFRASTRUCTURE),
    ("address already in use", "a port is in use already", "Publish another port.", _INFRASTRUCTURE),
    (
        "is already in use by container",
        "another container has that name",
        "Leave the name out, or choose another.",
        _INFRASTRUCTURE,
    ),
    ("unknown runtime", "unknown container runtime", "Correct the runtime.", _INFRASTRUCTURE),
    ("network", "the network does not exist or can't be used", "Correct the network.", _INFRASTRUCTURE),
    ("permission denied", "the engine was not permitted to do it", "Look at the engine's message.", _INFRASTRUCTURE),
    ("unable to find user", "the image has no such user", "Correct the user.", _IMAGE),
    ("mount", "a folder can't be mounted", "Correct the volumes.", _INFRASTRUCTURE),
    ("no space left", "the engine's disk is full", "Free some space: docker system prune.", _INFRASTRUCTURE),
)


def explain_start_failure(message: str) -> Outcome:
    """Explains the engine's error about a container that could not be created or started. Pure."""
    detail = message.strip().rstrip(".")
    for sign, cause, advice, category in _START_FAILURES:
        if sign in message.lower():
            return Outcome("not-started", cause=f"{cause} ({detail})", advice=advice, reason=category)
    return Outcome("not-started", cause=f"the engine refused it: {detail}", reason=_INFRASTRUCTURE)


def explain_end(state: Mapping[str, Any]) -> Outcome:
    """Explains why a container exited, from ``State`` of its inspection. Pure."""
    code = int(state.get("ExitCode") or 0)
    if state.get("OOMKilled"):
        advice = "Give the container more memory (docker_args memory=…), or use less."
        cause = "out of memory: the kernel killed it"
        return Outcome("exited", code, 9, cause, advice, reason=FailureCategory.OUT_OF_MEMORY)
    if error := str(state.get("Error") or "").strip():
        return replace(explain_start_failure(error), ending="exited", exit_code=code)
    return explain_exit(code)
