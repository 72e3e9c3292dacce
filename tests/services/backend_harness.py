"""Runs a command on any backend, through the contract alone; each backend contributes a small subclass.

``python -m tests.services.backend_harness`` runs one in another process, for tests that kill the client of a run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tests.services.recorder import Recorder
from tests.services.waiting import wait_for

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.contract import AnyBackend, AnyRequest, BackendRequest, Command, RunIdentity
from prefect_mlprojects.backends.outcome import Outcome
from prefect_mlprojects.backends.registry import select_backend
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.spec import build_command, check_parameters, find_entry_point, load_project
from prefect_mlprojects.types import StopSignal

ROOT = Path(__file__).parents[2]


@dataclass
class RecordingEvents(Recorder):
    """A recorder that calls `on_event` with what happened: ``report``, ``tag`` or ``output``."""

    on_event: Callable[[str], None] = lambda kind: None

    def write(self, stream: Any, data: bytes) -> None:
        super().write(stream, data)
        self.on_event("output")

    def report(self, line: str) -> None:
        super().report(line)
        self.on_event("report")

    def tag(self, tags: Mapping[str, str]) -> None:
        super().tag(tags)
        self.on_event("tag")


@dataclass
class BackendHarness:
    """A backend with a project's folder.

    Attributes:
        folder: The project's folder.
        config: The backend's configuration, as a user writes it.
        image: The image to name; None for backends without.
        child_env: Variables of each command.
        recorder: Receives what happens.
    """

    name: ClassVar[str] = "local"
    env_manager: ClassVar[str | None] = None
    survives_client: ClassVar[bool] = False
    """True if the command continues without its client, and a later client of the same flow run finds it."""
    separates_streams: ClassVar[bool] = True
    passes_variables: ClassVar[bool] = True
    """Whether variables of a run reach the command, also secret ones."""
    long_grace: ClassVar[Mapping[str, Any]] = {"grace-period": 30}
    """Keys of the configuration that give a stopped command more time than any test needs."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    child_env: dict[str, Secret | str] = field(default_factory=dict)
    recorder: RecordingEvents = field(default_factory=RecordingEvents)

    def remaining(self, flow_run_id: str) -> list[str]:
        """Returns what is left running, or left behind, of a flow run."""
        raise NotImplementedError

    def visible(self) -> str:
        """Returns what others can see of the runs at the backend's service, apart from output."""
        return ""

    def request(self, command: str, parameters: Mapping[str, str] | None = None) -> tuple[AnyBackend, AnyRequest, str]:
        """Returns the backend, the checked request for a project with this command, and the command line."""
        declared = "".join(f"      {name}: string\n" for name in parameters or {})
        text = f"name: harness\nentry_points:\n  main:\n    parameters:\n{declared}    command: {json.dumps(command)}\n"
        (self.folder / "MLproject").write_text(text if declared else text.replace("    parameters:\n", ""))
        project = load_project(self.folder)
        entry_point = find_entry_point(project, "main")
        checked = check_parameters(entry_point, parameters or {})
        docker_args = {"image": self.image} if self.image else None
        backend = select_backend(self.name, project, docker_args)
        request: AnyRequest = BackendRequest(
            project,
            entry_point,
            checked,
            WorkingCopy(self.folder, str(self.folder), "local", str(self.folder)),
            backend.parse_config(self.config),
            Secret("https://tracking.invalid"),
            docker_args,
            env_manager=self.env_manager,
        )
        return backend, request, build_command(entry_point, checked)

    def run(
        self,
        command: str,
        parameters: Mapping[str, str] | None = None,
        *,
        flow_run_id: str | None = None,
        timeout: float | None = None,
        stop: StopSignal | None = None,
        prepare_stop: StopSignal | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Runs a command as the flow does: check, prepare, execute, release; `on_event` learns of the execution."""
        backend, request, line = self.request(command, parameters)
        backend.check(request)
        prepared = backend.prepare(request, self.recorder.report, prepare_stop or StopSignal())
        if on_event is not None:
            self.recorder.on_event = on_event
        identity = RunIdentity(flow_run_id or str(uuid.uuid4()), "run-1", "harness", "main")
        child_env = {"MLFLOW_RUN_ID": "run-1", "MLFLOW_EXPERIMENT_ID": "7", **self.child_env}
        try:
            return backend.execute(
                prepared, Command(line, child_env, identity, timeout), self.recorder, stop or StopSignal()
            )
        finally:
            backend.release(prepared)

    def run_and_stop(self, command: str, flow_run_id: str, when: Callable[[str], bool]) -> Outcome:
        """Runs a command, and requests a stop at the first event of the execution that `when` accepts."""
        stop = StopSignal()

        def on_event(kind: str) -> None:
            if when(kind):
                stop.request("enough")

        return self.run(command, flow_run_id=flow_run_id, stop=stop, on_event=on_event)

    def start(self, command: str, flow_run_id: str) -> tuple[threading.Thread, list[Outcome], StopSignal]:
        """Runs a command in a thread; its outcome is appended to the list."""
        stop, outcomes = StopSignal(), list[Outcome]()
        thread = threading.Thread(
            target=lambda: outcomes.append(self.run(command, flow_run_id=flow_run_id, stop=stop)), daemon=True
        )
        thread.start()
        return thread, outcomes, stop

    def start_client(self, command: str, flow_run_id: str) -> subprocess.Popen[bytes]:
        """Runs a command from another process, which writes the command's output to its own."""
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        assert process.stdin is not None
        options = [self.name, self.env_manager, str(self.folder), self.config, self.image, command, flow_run_id]
        process.stdin.write(json.dumps(options).encode() + b"\n")
        process.stdin.close()
        return process

    def wait_for_output(self, text: bytes) -> None:
        """Waits until the command has written `text`."""
        wait_for(lambda: text in self.recorder.data, f"the output {text!r}", 60)

    @property
    def lines(self) -> list[str]:
        """The output's lines, both streams together."""
        return self.recorder.data.decode().splitlines()


class _ForwardingEvents(RecordingEvents):
    def write(self, stream: Any, data: bytes) -> None:
        del stream
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _main() -> None:
    name, env_manager, folder, config, image, command, flow_run_id = json.loads(sys.stdin.readline())
    kind = type("Harness", (BackendHarness,), {"name": name, "env_manager": env_manager})
    kind(Path(folder), config, image, recorder=_ForwardingEvents()).run(command, flow_run_id=flow_run_id)


if __name__ == "__main__":
    _main()
