"""MLflow's own backend plugins (entry-point group ``mlflow.project_backend``) as backends.

A plugin is a class with one method (mlflow/projects/backend/abstract_backend.py)::

    run(project_uri, entry_point, params, version, backend_config, tracking_uri, experiment_id) -> SubmittedRun

It creates and ends the MLflow run itself. It runs in a child process, so that it sees the tracking URI of this run in its
environment, its output is captured, and a plugin that hangs can be killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from pydantic import BaseModel, ConfigDict, model_validator

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.process.run import run_process
from prefect_mlprojects._support.redaction import is_secret
from prefect_mlprojects._support.secrets import Secret, reveal, reveal_all, reveal_values
from prefect_mlprojects.backends.configuration import dump_config
from prefect_mlprojects.backends.contract import (
    Backend,
    BackendPlan,
    BackendRequest,
    Command,
    ExecutionEvents,
    Prepared,
    Report,
)
from prefect_mlprojects.backends.outcome import Outcome, stopped_outcome, timed_out_outcome
from prefect_mlprojects.exceptions import BackendUnavailableError
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "mlflow.project_backend"
REQUEST_VARIABLE = "PREFECT_MLPROJECTS_PLUGIN_REQUEST"

# A plugin's cancel() waits until the remote work has ended.
_CANCEL_SECONDS = 60.0


def plugin_entry_points() -> dict[str, EntryPoint]:
    """Returns the plugins of installed packages by name, without this package's own."""
    from importlib.metadata import entry_points

    found = entry_points(group=ENTRY_POINT_GROUP)
    return {each.name: each for each in found if not each.value.startswith("prefect_mlprojects.")}


class PluginConfig(BaseModel):
    """The configuration of a plugin: any keys; MLflow gives plugins no way to describe them."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _mark_secrets(cls, given: Any) -> Any:
        return _marked(given)


def _marked(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _marked(each, str(key)) for key, each in value.items()}
    if isinstance(value, list):
        return [_marked(each, name) for each in value]
    return Secret(value) if isinstance(value, str) and is_secret(name, value) else value


@dataclass
class _Reports:
    """What the child process has reported; each report sets some of the fields."""

    run_id: str | None = None
    succeeded: bool | None = None
    status: str = ""
    error: str = ""
    cancelled: bool = False


_Request: TypeAlias = BackendRequest[PluginConfig]
_Prepared: TypeAlias = Prepared[PluginConfig, None]


class MlflowPluginBackend(Backend[PluginConfig, None]):
    """Runs projects by a plugin of MLflow."""

    config_model = PluginConfig
    tracks_runs = True

    def __init__(self, name: str) -> None:
        """Adapts the plugin called `name`."""
        self.name = name  # type: ignore[misc]  # one class serves all plugins

    def environment_kind(self, request: _Request) -> str:
        """Returns the plugin's name; the plugin prepares its environment."""
        del request
        return self.name

    def plan(self, request: _Request, command: str) -> BackendPlan:
        """Returns which class would run the project."""
        del request, command
        return BackendPlan(self.name, sections={"MLflow plugin": plugin_entry_points()[self.name].value})

    def prepare(self, request: _Request, report: Report, stop: StopSignal) -> _Prepared:
        """Prepares nothing; sets the tags that ``mlflow run`` sets on a plugin's run."""
        del report, stop
        tags = {"mlflow.project.backend": self.name}
        if request.run_options.get("run_name"):
            tags["mlflow.runName"] = str(request.run_options["run_name"])
        return Prepared(request, None, f"MLflow plugin {self.name}", True, tags=tags)

    def execute(self, prepared: _Prepared, command: Command, events: ExecutionEvents, stop: StopSignal) -> Outcome:
        """Calls the plugin's ``run()``, waits for the run that it submitted, and cancels it on a stop request.

        Raises `BackendError` if the plugin can't be loaded, or raises an error.
        """
        if stop.requested:
            return stopped_outcome(stop)
        request = prepared.request
        environment = {
            **os.environ,
            **reveal_values(command.child_env),
            "MLFLOW_TRACKING_URI": reveal(request.tracking_uri),
            REQUEST_VARIABLE: json.dumps(_plugin_request(self.name, request, command)),
        }
        reports, tail = _Reports(), TailedOutput(events)
        with _report_pipe(reports, request, events) as descriptor:
            result = run_process(
                [sys.executable, "-c", _PROCESS, str(descriptor)],
                cwd=None,
                env=environment,
                write=tail.write,
                stop=stop,
                timeout=command.timeout,
                grace=max(grace_period(), _CANCEL_SECONDS),
                pass_fds=(descriptor,),
            )
        lines = tail.close()
        if result.ending in ("stopped", "timed-out"):
            if reports.run_id is not None and not reports.cancelled and reports.succeeded is None:
                cause = f"the plugin {self.name!r} did not end the run within {_CANCEL_SECONDS:g} s"
                advice = "It may still be running: look for it where the plugin runs projects."
                return Outcome("lost", cause=cause, advice=advice, output_tail=lines)
            if result.ending == "stopped":
                return stopped_outcome(stop, lines)
            return timed_out_outcome(command.timeout, lines)
        if reports.succeeded is None:
            reason = reports.error or f"its process ended with code {result.return_code}"
            raise BackendUnavailableError(f"The MLflow plugin {self.name!r} failed: {reason}", backend=self.name)
        if reports.succeeded:
            return Outcome("exited", 0, cause="exit code 0", output_tail=lines)
        return Outcome("exited", cause=f"the MLflow plugin {self.name!r} reported {reports.status}", output_tail=lines)


def _plugin_request(name: str, request: _Request, command: Command) -> dict[str, Any]:
    options = request.run_options
    return {
        "path": sys.path,
        "plugin": name,
        "project": str(request.working_copy.directory),
        "entry_point": request.entry_point.name,
        "parameters": reveal_values(command.parameters),
        "experiment": [options.get("experiment_name"), options.get("experiment_id")],
        # The keys that MLflow adds (mlflow/projects/utils.py, PROJECT_*).
        "backend_config": {
            **reveal_all(dump_config(request.config)),
            "ENV_MANAGER": request.env_manager,
            "SYNCHRONOUS": False,
            "DOCKER_ARGS": reveal_all(request.docker_args or {}),
            "STORAGE_DIR": options.get("storage_dir"),
            "build_image": request.build_image,
            "docker_auth": reveal_all(request.docker_auth),
        },
    }


@contextmanager
def _report_pipe(reports: _Reports, request: _Request, events: ExecutionEvents) -> Iterator[int]:
    """Yields a descriptor for the child's reports, a JSON text a line, and reads them concurrently."""
    read_end, write_end = os.pipe()

    def read() -> None:
        with os.fdopen(read_end, "rb") as stream:
            for line in stream:
                known = reports.run_id
                # A killed child leaves an incomplete line.
                with suppress(ValueError):
                    vars(reports).update(json.loads(line))
                if reports.run_id is not None and known is None:
                    events.adopt_run(reports.run_id, request.tracking_uri)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield write_end
    finally:
        # Every other copy of the descriptor was closed with the child's process tree: the reader gets the end of file.
        os.close(write_end)
        thread.join()


# The child process.

_PROCESS = f"import sys; from {__name__} import run_plugin; sys.exit(run_plugin(int(sys.argv[1])))"


class _Stopped(BaseException):
    """Raised on SIGTERM."""


def _on_sigterm(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped


def run_plugin(descriptor: int) -> int:
    """Runs in the child process: calls the plugin that the request names, and returns the exit code.

    The request comes in a variable; reports go to `descriptor`, a JSON text a line.
    """
    os.set_inheritable(descriptor, False)
    request: dict[str, Any] = json.loads(os.environ.pop(REQUEST_VARIABLE))
    sys.path[:] = request["path"]

    def report(**values: Any) -> None:
        os.write(descriptor, json.dumps(values).encode() + b"\n")

    from prefect_mlprojects.tracking import Tracker

    submitted: Any = None
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        plugin, uri = plugin_entry_points()[request["plugin"]].load()(), os.environ["MLFLOW_TRACKING_URI"]
        experiment = Tracker().resolve_experiment(Secret(uri), *request["experiment"])
        project = [request[name] for name in ("project", "entry_point", "parameters")]
        submitted = plugin.run(*project, None, request["backend_config"], uri, experiment)
        report(run_id=str(submitted.run_id))
        succeeded = bool(submitted.wait())
    except _Stopped:
        if submitted is not None:
            submitted.cancel()
            report(cancelled=True)
        return 128 + signal.SIGTERM
    except Exception as error:
        report(error=f"{type(error).__name__}: {error}")
        raise
    status = submitted.get_status()
    report(succeeded=succeeded, status=_STATUS_NAMES.get(status, str(status)))
    return 0 if succeeded else 1


# mlflow.entities.RunStatus; plugins return its numbers or its names.
_STATUS_NAMES = {1: "RUNNING", 2: "SCHEDULED", 3: "FINISHED", 4: "FAILED", 5: "KILLED"}
