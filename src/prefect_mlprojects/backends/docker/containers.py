"""One container from its creation to its removal."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects.backends.contract import RunIdentity
from prefect_mlprojects.backends.docker.output import ContainerOutput
from prefect_mlprojects.backends.outcome import (
    ExitCause,
    Outcome,
    exited_outcome,
    explain_exit,
    stopped_outcome,
    timed_out_outcome,
)
from prefect_mlprojects.types import FailureCategory, StopSignal

_logger = logging.getLogger(__name__)

_PING_AFTER = 60.0
"""Seconds after which a silent engine is pinged."""
_ENGINE_TIMEOUT = 300.0
"""Seconds for which an engine may be unreachable (restarted, network down) before its container counts as lost."""

LABEL = "prefect-mlprojects"
FLOW_RUN_LABEL = f"{LABEL}.flow-run-id"
MLFLOW_RUN_LABEL = f"{LABEL}.mlflow-run-id"
PROJECT_LABEL = f"{LABEL}.project"
ENTRY_POINT_LABEL = f"{LABEL}.entry-point"


def labels(identity: RunIdentity) -> dict[str, str]:
    """Returns the labels that identify a run's container."""
    return {
        FLOW_RUN_LABEL: identity.flow_run_id,
        MLFLOW_RUN_LABEL: identity.mlflow_run_id,
        PROJECT_LABEL: identity.project,
        ENTRY_POINT_LABEL: identity.entry_point,
    }


def find_running(engine: Any, identity: RunIdentity) -> str | None:
    """Returns the id of a flow run's running container, or None."""
    label = f"{FLOW_RUN_LABEL}={identity.flow_run_id}"
    found = engine.containers(filters={"label": label, "status": "running"})
    return str(found[0]["Id"]) if found else None


class ContainerRun:
    """Starts one container, waits for its end and removes it."""

    def __init__(self, engine: Any, container_id: str, output: TailedOutput, *, tty: bool) -> None:
        self._engine = engine
        self._id = container_id
        self._tailed = output
        self._output = ContainerOutput(engine, container_id, output, tty=tty)
        self._ended = threading.Event()
        self._lost: str | None = None

    def start(self, *, attach: bool) -> None:
        """Starts the container and begins to read its output.

        Attaching delivers incomplete lines at once, but needs a connection that does not break: an engine on this machine.
        Otherwise the engine's log is read. Raises ``docker.errors.APIError``.
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
        ending = "exited"
        if not self._ended.is_set():
            ending = "stopped" if in_time else "timed-out"
            self.end(grace)
            self._ended.wait(grace + 30)
        state = self._state()
        self._output.finish()
        tail = self._tailed.close()
        if ending == "stopped":
            return stopped_outcome(stop, tail)
        if ending == "timed-out":
            return timed_out_outcome(timeout or 0.0, tail)
        if self._lost:
            return Outcome(
                "lost",
                cause=self._lost,
                advice=f"The container may still be running: docker rm -f {self._id[:12]}",
                output_tail=tail,
            )
        return exited_outcome(explain_end(state), tail)

    def end(self, grace: float) -> None:
        """Stops the container: SIGTERM, grace period, SIGKILL. Idempotent."""
        from docker.errors import APIError, NotFound
        from requests.exceptions import RequestException

        try:
            self._engine.stop(self._id, timeout=round(grace))
        except NotFound:
            return
        except (APIError, RequestException, OSError) as error:
            _logger.warning("The container %s could not be stopped: %s", self._id[:12], error)

    def remove(self) -> None:
        """Removes the container. Idempotent."""
        from docker.errors import APIError, NotFound
        from requests.exceptions import RequestException

        try:
            self._engine.remove_container(self._id, force=True, v=True)
        except NotFound:
            return
        except (APIError, RequestException, OSError) as error:
            _logger.warning("The container %s could not be removed: %s", self._id[:12], error)

    def _watch(self, wake: threading.Event) -> None:
        """Waits until the container exits; reconnects if the connection breaks."""
        from docker.errors import APIError, NotFound
        from requests.exceptions import RequestException

        away_since: float | None = None
        while True:
            try:
                self._engine.wait(self._id, timeout=_PING_AFTER)
            except NotFound:
                # It was removed by someone else.
                break
            except (RequestException, APIError, OSError) as error:
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
                if self._ended.wait(1):
                    break
                continue
            break
        self._ended.set()
        wake.set()

    def _answers(self) -> bool:
        from docker.errors import DockerException
        from requests.exceptions import RequestException

        try:
            return bool(self._engine.ping())
        except (DockerException, RequestException, OSError):
            return False

    def _state(self) -> Mapping[str, Any]:
        from docker.errors import DockerException, NotFound
        from requests.exceptions import RequestException

        if self._lost:
            return {}
        try:
            state: Mapping[str, Any] = self._engine.inspect_container(self._id)["State"]
        except NotFound:
            return {"ExitCode": 137, "Error": "the container was removed while it ran"}
        except (DockerException, RequestException, OSError) as error:
            return {"ExitCode": 125, "Error": f"the Docker engine does not answer: {error}"}
        return state


_IMAGE, _INFRASTRUCTURE = FailureCategory.IMAGE, FailureCategory.INFRASTRUCTURE


@dataclass(frozen=True)
class StartFailure:
    """Why the engine refused to create or start a container.

    Attributes:
        cause: The cause with the engine's message.
        advice: What to do about it; may be empty.
        category: The category of the failure.
    """

    cause: str
    advice: str
    category: FailureCategory


# Substring of the engine's message, cause, advice, category; the first match counts.
_START_FAILURES: tuple[tuple[str, str, str, FailureCategory], ...] = (
    ("no such image", "the engine has no such image", "Pull or build it, or correct its name.", _IMAGE),
    ("manifest unknown", "the registry has no such image or tag", "Correct the image's name or tag.", _IMAGE),
    (
        "executable file not found",
        "the image has no shell (sh) to run the command with",
        "Use an image that has one.",
        _IMAGE,
    ),
    (
        "no such file or directory: unknown",
        "the image has no sh, or its entrypoint is missing",
        "Correct the entrypoint.",
        _IMAGE,
    ),
    (
        "could not select device driver",
        "the engine has no driver for the devices requested",
        "For GPUs install the NVIDIA Container Toolkit on the engine's machine, or leave gpus out.",
        FailureCategory.SCHEDULING,
    ),
    (
        "no such device",
        "a requested device does not exist on the Docker host",
        "Correct the devices.",
        FailureCategory.SCHEDULING,
    ),
    (
        "error gathering device information",
        "a requested device does not exist on the Docker host",
        "Correct the devices.",
        FailureCategory.SCHEDULING,
    ),
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


def explain_start_failure(message: str) -> StartFailure:
    """Explains the engine's error about a container that could not be created or started. Pure."""
    low = message.lower()
    detail = message.strip().rstrip(".")
    for sign, cause, advice, category in _START_FAILURES:
        if sign in low:
            return StartFailure(f"{cause} ({detail})", advice, category)
    return StartFailure(f"the engine refused it: {detail}", "", _INFRASTRUCTURE)


def explain_end(state: Mapping[str, Any]) -> ExitCause:
    """Explains why a container exited, from ``State`` of its inspection. Pure."""
    code = int(state.get("ExitCode") or 0)
    if state.get("OOMKilled"):
        return ExitCause(
            code,
            9,
            "out of memory: the kernel killed it",
            "Give the container more memory (docker_args memory=…), or use less.",
            FailureCategory.OUT_OF_MEMORY,
        )
    if error := str(state.get("Error") or "").strip():
        failure = explain_start_failure(error)
        return ExitCause(code, None, failure.cause, failure.advice, failure.category)
    return explain_exit(code)
