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
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.retry import retry
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
FLOW_RUN_LABEL = f"{LABEL}.flow-run-id"
EXECUTION_LABEL = f"{LABEL}.execution"
PROBE_LABELS = {FLOW_RUN_LABEL: "probe", f"{LABEL}.project": "image-check"}
"""The labels of containers that never start: an image's files are read from them."""
YOUNG_SECONDS = 300.0
"""How long a container that does not run is left to the run that prepares it, or reads its last output."""
_REMOVAL_TIMEOUT = 60.0


def labels(identity: RunIdentity, execution: str) -> dict[str, str]:
    """Returns the labels that identify a run's container; `execution` is unique to each attempt to run it."""
    return {
        EXECUTION_LABEL: execution,
        FLOW_RUN_LABEL: identity.flow_run_id,
        f"{LABEL}.mlflow-run-id": identity.mlflow_run_id,
        f"{LABEL}.project": identity.project,
        f"{LABEL}.entry-point": identity.entry_point,
    }


def find_running(engine: Any, identity: RunIdentity) -> tuple[str, str] | None:
    """Returns the id and the execution of a flow run's running container, or None."""
    label = f"{FLOW_RUN_LABEL}={identity.flow_run_id}"
    found = engine.containers(filters={"label": label, "status": "running"})
    return (str(found[0]["Id"]), str(found[0]["Labels"].get(EXECUTION_LABEL))) if found else None


def remove_old_probes(engine: Any) -> None:
    """Removes the containers that killed processes left while they read an image's files."""
    for found in engine.containers(
        all=True, filters={"label": [f"{key}={value}" for key, value in PROBE_LABELS.items()]}
    ):
        if time.time() - found["Created"] > YOUNG_SECONDS:
            engine.remove_container(found["Id"], force=True)


def is_young(engine: Any, container_id: str) -> bool:
    """Whether a container that does not run was created or ended a moment ago, or is gone: its run may still need it."""
    from docker.errors import NotFound

    try:
        inspection = engine.inspect_container(container_id)
    except NotFound:
        return True
    # RFC 3339 with nanoseconds; "0001-01-01T00:00:00Z" for one that never ended.
    last = max(inspection["Created"], inspection["State"]["FinishedAt"])
    changed = datetime.strptime(last[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
    return (datetime.now(timezone.utc) - changed).total_seconds() < YOUNG_SECONDS


class ContainerRun:
    """Starts one container, waits until it exits and removes it."""

    def __init__(self, engine: Any, container_id: str, output: TailedOutput, *, tty: bool) -> None:
        self._engine = engine
        self._id = container_id
        self._tailed = output
        self._output = ContainerOutput(engine, container_id, output, tty=tty)
        self._ended = threading.Event()
        self._lost: str | None = None
        self._engine_was_away = False

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
        outcome = explain_end(state)
        if outcome.exit_code in _STOPPED_CODES and self._engine_stops():
            cause = f"the Docker engine was stopped or restarted, which ended the container ({outcome.cause})"
            outcome = replace(outcome, cause=cause, advice=_RUN_AGAIN, reason=FailureCategory.INFRASTRUCTURE)
        return replace(outcome, output_tail=tail)

    def _engine_stops(self) -> bool:
        """Whether the engine was away, or stops within two seconds: it ends its containers before itself."""
        deadline = time.monotonic() + 2.0
        while not self._engine_was_away and time.monotonic() < deadline:
            self._engine_was_away = not self._answers()
            time.sleep(0.2)
        return self._engine_was_away

    def remove(self) -> None:
        """Removes the container. Idempotent."""
        self._call_idempotent("removed", self._engine.remove_container, force=True, v=True)

    def _call_idempotent(self, done: str, call: Callable[..., Any], **options: Any) -> None:
        """Calls the engine about the container; retries while the engine is away, as during its restart."""
        from docker.errors import NotFound

        try:
            retry(lambda: call(self._id, **options), is_transient=_is_away, seconds=_REMOVAL_TIMEOUT)
        except NotFound:
            return
        except OSError as error:
            # The base of Docker's APIError and of all errors of requests.
            advice = f"; remove it: docker rm -f {self._id[:12]}"
            _logger.warning("The container %s could not be %s: %s%s", self._id[:12], done, error, advice)

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
                    self._engine_was_away = True
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

        def note(error: Exception, delay: float) -> None:
            del error, delay
            self._engine_was_away = True

        if self._lost:
            return {}
        try:
            inspection = retry(
                lambda: self._engine.inspect_container(self._id),
                is_transient=_is_away,
                seconds=_ENGINE_TIMEOUT,
                on_retry=note,
            )
        except NotFound:
            return {"ExitCode": 137, "Error": "the container was removed while it ran"}
        except (DockerException, OSError) as error:
            return {"ExitCode": 125, "Error": f"the Docker engine does not answer: {error}"}
        state: Mapping[str, Any] = inspection["State"]
        return state


def _is_away(error: Exception) -> bool:
    """Whether an error tells that the engine can't be reached, or is shutting down, rather than that it refuses."""
    from docker.errors import APIError

    return isinstance(error, OSError) and (not isinstance(error, APIError) or error.is_server_error())


_STOPPED_CODES = (137, 143)
_RUN_AGAIN = "Run it again. With 'live-restore' in the engine's configuration, containers survive its restart."
_DONE = b"done\n"
_GUARD = (
    "import json, sys; job = json.loads(sys.stdin.buffer.readline()); sys.path[:] = job['path']; "
    f"from {__name__} import watch; watch(job)"
)


@contextlib.contextmanager
def guarded(execution: str, config: LocalConfig, grace: float) -> Iterator[None]:
    """Stops and removes the execution's container if this process dies within the context; `grace` is the grace period in seconds.

    A separate process reads ``done`` on its standard input at the context's end; end of file without it means that this
    process died. It finds the container by its label, so that it also finds one that was just being created.
    """
    # Sent by the pipe, since it may hold the engine's key.
    engine = reveal_all({name: value for name, value in dump_config(config).items() if name.startswith("docker-")})
    job = {"label": f"{EXECUTION_LABEL}={execution}", "grace": grace, "path": sys.path, "engine": engine}
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
    """Runs in the guard process: removes the execution's container unless ``done`` comes before the end of standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _DONE:
        return
    engine = connect(LocalConfig.model_validate(job["engine"]))
    deadline = time.monotonic() + _REMOVAL_TIMEOUT
    # The dead process' last request may create a container after the first look.
    for delay in (0, 2, 5):
        time.sleep(delay)
        retry(lambda: _remove_all(engine, job), is_transient=_is_away, seconds=max(0.0, deadline - time.monotonic()))


def _remove_all(engine: Any, job: Mapping[str, Any]) -> None:
    from docker.errors import NotFound

    for found in engine.containers(all=True, filters={"label": job["label"]}):
        with contextlib.suppress(NotFound):
            engine.stop(found["Id"], timeout=int(job["grace"]))
            engine.remove_container(found["Id"], force=True, v=True)


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
