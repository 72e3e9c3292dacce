"""One container from its creation to its removal."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prefect_mlprojects._output import TailedOutput
from prefect_mlprojects.backends.base import ExecutionOutcome, RunIdentity
from prefect_mlprojects.backends.docker.diagnosis import explain_end
from prefect_mlprojects.types import StopSignal, StreamName

_logger = logging.getLogger(__name__)

LABEL = "prefect-mlprojects"
FLOW_RUN_LABEL = f"{LABEL}.flow-run-id"
MLFLOW_RUN_LABEL = f"{LABEL}.mlflow-run-id"
PROJECT_LABEL = f"{LABEL}.project"
ENTRY_POINT_LABEL = f"{LABEL}.entry-point"


def labels(identity: RunIdentity) -> dict[str, str]:
    """Returns the labels by which a run's container is found again.

    Args:
        identity: Who the run is.
    """
    return {
        FLOW_RUN_LABEL: identity.flow_run_id,
        MLFLOW_RUN_LABEL: identity.mlflow_run_id,
        PROJECT_LABEL: identity.project,
        ENTRY_POINT_LABEL: identity.entry_point,
    }


def find_running(engine: Any, identity: RunIdentity) -> str | None:
    """Returns the id of the container that runs already for a run; None when there is none.

    Args:
        engine: Docker's low-level client.
        identity: Who the run is.
    """
    label = f"{FLOW_RUN_LABEL}={identity.flow_run_id}"
    found = engine.containers(filters={"label": label, "status": "running"})
    return str(found[0]["Id"]) if found else None


class ContainerRun:
    """A container that runs: its output, and its end.

    Args:
        engine: Docker's low-level client.
        container_id: The container.
        output: Takes what it prints.
        tty: Whether it has a terminal, whose one stream has no frames.
    """

    def __init__(self, engine: Any, container_id: str, output: TailedOutput, *, tty: bool) -> None:
        self._engine = engine
        self._id = container_id
        self._output = output
        self._tty = tty
        self._ended = threading.Event()
        self._readers: list[threading.Thread] = []
        self._output_lock = threading.Lock()

    def attach(self) -> None:
        """Begins to read the output of a container that is to be started."""
        stream = self._engine.attach(self._id, stdout=True, stderr=True, stream=True, logs=True, demux=not self._tty)
        self._read_in_background(stream, None if not self._tty else "stdout")

    def attach_to_running(self) -> None:
        """Begins to read the output of a container that runs already, from its start.

        Attaching does not bring what was printed before; the engine's log does, but one stream at a time.
        """
        names: tuple[StreamName, ...] = ("stdout",) if self._tty else ("stdout", "stderr")
        for name in names:
            stream = self._engine.logs(
                self._id, stdout=name == "stdout", stderr=name == "stderr", stream=True, follow=True
            )
            self._read_in_background(stream, name)

    def _read_in_background(self, stream: Iterator[Any], name: StreamName | None) -> None:
        reader = threading.Thread(target=self._read, args=(stream, name), name="container-output", daemon=True)
        self._readers.append(reader)
        reader.start()

    def start(self) -> None:
        """Starts it.

        Raises:
            docker.errors.APIError: The engine refused.
        """
        self._engine.start(self._id)

    def wait(self, stop: StopSignal, timeout: float | None, grace: float) -> ExecutionOutcome:
        """Waits for its end, and ends it when that is asked for or the timeout passes.

        Args:
            stop: Asks for the end.
            timeout: Seconds that it may run; None for no limit.
            grace: Seconds between asking and killing.
        """
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
        for reader in self._readers:
            reader.join(10)
        tail = self._output.close()
        if ending == "stopped":
            return ExecutionOutcome("stopped", cause=str(stop.reason), output_tail=tail)
        if ending == "timed-out":
            return ExecutionOutcome(
                "timed-out", cause=f"it took longer than its timeout of {timeout:g} s", output_tail=tail
            )
        cause = explain_end(state)
        return ExecutionOutcome("exited", cause.exit_code, cause.signal, cause.text, cause.advice, tail)

    def end(self, grace: float) -> None:
        """Asks it to end, waits a grace period, and kills it; one that has ended already is left alone."""
        from docker.errors import APIError, NotFound

        try:
            self._engine.stop(self._id, timeout=round(grace))
        except NotFound:
            return
        except (APIError, OSError) as error:
            _logger.warning("The container %s could not be stopped: %s", self._id[:12], error)

    def remove(self) -> None:
        """Removes it; one that is gone already is left alone."""
        from docker.errors import APIError, NotFound

        try:
            self._engine.remove_container(self._id, force=True, v=True)
        except NotFound:
            return
        except (APIError, OSError) as error:
            _logger.warning("The container %s could not be removed: %s", self._id[:12], error)

    def _watch(self, wake: threading.Event) -> None:
        """Waits on the engine, which answers when the container has ended; a connection that breaks is made again."""
        from docker.errors import NotFound
        from requests.exceptions import RequestException

        while True:
            try:
                self._engine.wait(self._id, timeout=None)
            except NotFound:
                # Somebody removed it.
                break
            except (RequestException, OSError) as error:
                _logger.warning("The connection to the Docker engine broke (%s); it is made again", error)
                time.sleep(1)
                continue
            break
        self._ended.set()
        wake.set()

    def _state(self) -> Mapping[str, Any]:
        from docker.errors import NotFound

        try:
            state: Mapping[str, Any] = self._engine.inspect_container(self._id)["State"]
        except NotFound:
            return {"ExitCode": 137, "Error": "the container was removed while it ran"}
        return state

    def _read(self, stream: Iterator[Any], only: StreamName | None) -> None:
        """Passes output on: of one stream, or of both in pairs."""
        try:
            for piece in stream:
                pairs: tuple[tuple[StreamName, bytes | None], ...] = (
                    ((only, piece),) if only is not None else (("stdout", piece[0]), ("stderr", piece[1]))
                )
                for name, data in pairs:
                    if data:
                        with self._output_lock:
                            self._output.write(name, data)
        except Exception as error:  # noqa: BLE001 - whatever broke, the run's end counts
            if not self._ended.is_set():
                _logger.warning("The container's output could not be read to its end: %s", error)
        finally:
            close = getattr(stream, "close", None)
            if callable(close):
                with contextlib.suppress(Exception):
                    close()
