"""The backend at work on a workspace, without Prefect and MLflow: what it is told, and what it tells."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.databricks_api import FakeWorkspace
from tests.fakes.databricks_api.runs import FakeRun
from tests.services.recorder import Recorder

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.contract import Command, RunIdentity
from prefect_mlprojects.backends.databricks.backend import DatabricksBackend
from prefect_mlprojects.backends.databricks.config import DatabricksRequest
from prefect_mlprojects.backends.outcome import Outcome
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.spec import (
    build_command,
    check_parameters,
    find_entry_point,
    load_project,
    spark_job_entry_point,
)
from prefect_mlprojects.types import StopSignal

CLUSTER = {"spark_version": "15.4.x-scala2.12", "node_type_id": "i3.xlarge", "num_workers": 1}
FAST = {"poll-interval": 0.1, "max-poll-interval": 0.5}


@dataclass
class Bench:
    """A project's folder, the workspace, and what the last run told."""

    workspace: FakeWorkspace
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)

    def write(self, **files: str) -> None:
        """Writes the project's files; a dot in a name is written as two underscores."""
        for name, text in files.items():
            (self.folder / name.replace("__", ".")).write_text(text)

    def program(self, text: str, command: str = "python main.py") -> None:
        """Makes the project one Python file."""
        self.write(MLproject=f"name: p\nentry_points:\n  main:\n    command: {command}\n", main__py=text)

    def request(self, config: Mapping[str, Any] | None = None, **fields: Any) -> tuple[DatabricksRequest, str]:
        """The checked call of the project, and its command."""
        project = load_project(self.folder)
        name = fields.pop("entry_point", "main")
        entry_point = spark_job_entry_point(project, name) or find_entry_point(project, name)
        parameters = check_parameters(entry_point, fields.pop("parameters", {}))
        copy = fields.pop("working_copy", None) or WorkingCopy(self.folder, str(self.folder), "local", str(self.folder))
        compute = {} if config and {"existing-cluster-id", "environment", "new_cluster"} & set(config) else CLUSTER
        asked = {**FAST, **({"new_cluster": compute} if compute else {}), **(config or {})}
        backend = DatabricksBackend()
        uri = Secret(fields.pop("tracking_uri", "https://tracking.invalid"))
        config_model = backend.parse_config(asked)
        request = DatabricksRequest(project, entry_point, parameters, copy, config_model, uri, **fields)
        return request, build_command(entry_point, parameters)

    def run(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        flow_run_id: str | None = None,
        stop: StopSignal | None = None,
        timeout: float | None = None,
        variables: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Outcome:
        """Runs the project as the flow does: check, prepare, execute."""
        request, line = self.request(config, **fields)
        backend, stop = DatabricksBackend(), stop or StopSignal()
        backend.check(request)
        prepared = backend.prepare(request, self.recorder.report, stop)
        child_env = {"MLFLOW_RUN_ID": "run-1", "MLFLOW_EXPERIMENT_ID": "7", **(variables or {})}
        identity = RunIdentity(flow_run_id or str(uuid.uuid4()), "run-1", "p", "main")
        return backend.execute(prepared, Command(line, child_env, identity, timeout), self.recorder, stop)

    def start(self, *arguments: Any, **fields: Any) -> tuple[threading.Thread, list[Outcome], StopSignal]:
        """Runs the project in a thread; its outcome gets into the list."""
        stop, found = StopSignal(), list[Outcome]()
        thread = threading.Thread(target=lambda: found.append(self.run(*arguments, stop=stop, **fields)), daemon=True)
        thread.start()
        return thread, found, stop

    @property
    def last(self) -> FakeRun:
        """The workspace's newest run."""
        return self.workspace.runs[max(self.workspace.runs)]

    def files(self, folder: str = "") -> list[str]:
        """What lies below the default code path."""
        root = self.workspace.root / "Workspace/Users/ada@example.com/.prefect-mlprojects" / folder
        return sorted(str(each.relative_to(root)) for each in root.rglob("*") if each.is_file())
