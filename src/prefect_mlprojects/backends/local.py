"""The local backend: the command runs on this machine, in its own process group."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.process.run import ProcessResult, run_process
from prefect_mlprojects._support.secrets import reveal_values
from prefect_mlprojects.backends.containers.engine import LocalConfig
from prefect_mlprojects.backends.contract import (
    Backend,
    BackendPlan,
    BackendRequest,
    Command,
    Demands,
    ExecutionEvents,
    Prepared,
    Report,
)
from prefect_mlprojects.backends.outcome import Outcome, explain_exit, stopped_outcome, timed_out_outcome
from prefect_mlprojects.environments import EnvironmentManager, PreparedEnvironment
from prefect_mlprojects.environments.managers import choose_manager, environment_manager, release_environment
from prefect_mlprojects.exceptions import BackendUnavailableError
from prefect_mlprojects.settings import OWN_VARIABLES
from prefect_mlprojects.types import StopSignal

_Request: TypeAlias = BackendRequest[LocalConfig]
_Prepared: TypeAlias = Prepared[LocalConfig, PreparedEnvironment]


class LocalBackend(Backend[LocalConfig, PreparedEnvironment]):
    """Runs commands with ``bash -c`` in the working copy, in the environment that the project asks for."""

    name = "local"
    config_model = LocalConfig
    runs_here = True

    def environment_kind(self, request: _Request) -> str:
        """Returns the environment manager's name; raises `EnvironmentBuildError` if it is unknown or does not fit."""
        return choose_manager(request.project, request.env_manager)

    def demands(self, request: _Request) -> Demands:
        """Returns nothing: the command runs as this user, without a container."""
        del request
        return Demands()

    def check(self, request: _Request) -> None:
        """Raises `EnvironmentBuildError` if the environment manager is unknown or does not fit the project."""
        choose_manager(request.project, request.env_manager)

    def plan(self, request: _Request, command: str) -> BackendPlan:  # noqa: ARG002 - runs as it is
        """Returns the environment that would be built."""
        plan = _manager(request).plan(request.project)
        return BackendPlan(plan.description, plan)

    def prepare(self, request: _Request, report: Report, stop: StopSignal) -> _Prepared:
        """Builds the environment unless it is cached; raises `EnvironmentBuildError` if the build fails or is stopped."""
        manager = _manager(request)
        plan = manager.plan(request.project)
        for warning in plan.warnings:
            report(f"Warning: {warning}")
        environment = manager.prepare(request.project, plan, report, stop, rebuild=request.rebuild_environment)
        return Prepared(request, environment, plan.description, environment.reused)

    def execute(self, prepared: _Prepared, command: Command, events: ExecutionEvents, stop: StopSignal) -> Outcome:
        """Runs the command; returns once its whole process tree has exited. Raises `BackendError` if bash is missing."""
        if stop.requested:
            return stopped_outcome(stop)
        environment, directory = prepared.value, prepared.request.working_copy.directory
        if not directory.is_dir():
            return Outcome("not-started", cause=f"the working directory {directory} does not exist")
        bash = shutil.which("bash")
        if bash is None:
            raise BackendUnavailableError("The local backend needs bash, which is not on PATH.", backend=self.name)
        tail = TailedOutput(events)
        try:
            result = run_process(
                [*environment.command_prefix, bash, "-c", command.line],
                cwd=directory,
                env=_child_env(environment.variables, reveal_values(command.child_env)),
                write=tail.write,
                stop=stop,
                timeout=command.timeout,
                grace=prepared.request.config.grace_period,
            )
        except (OSError, ValueError) as error:
            return Outcome("not-started", cause=_explain_start_failure(error))
        outcome = _outcome(result, command, stop, tail.close())
        if outcome.exit_code and not directory.is_dir():
            return replace(outcome, advice=f"Its working directory {directory} vanished while it ran.")
        return outcome

    def release(self, prepared: _Prepared) -> None:
        """Lets ``mlprojects env prune`` remove the environment."""
        release_environment(prepared.value)


def _manager(request: _Request) -> EnvironmentManager:
    return environment_manager(choose_manager(request.project, request.env_manager))


def _explain_start_failure(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return f"the command line or the environment can't be passed to a program: {error}"
    if error.errno == errno.E2BIG:
        return "the command line or the environment is too long for the system"
    file = f": {error.filename}" if error.filename else ""
    return f"the command could not be started: {error.strerror or error}{file}"


def _child_env(base: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Returns the command's environment: without our own variables, and without another experiment than the run's."""
    hidden = {OWN_VARIABLES, *base.get(OWN_VARIABLES, "").split()}
    if "MLFLOW_EXPERIMENT_ID" in added:
        # MLflow lets the name win over the id.
        hidden.add("MLFLOW_EXPERIMENT_NAME")
    return {**{name: value for name, value in base.items() if name not in hidden}, **added}


def _outcome(result: ProcessResult, command: Command, stop: StopSignal, tail: tuple[str, ...]) -> Outcome:
    if result.ending == "stopped":
        return stopped_outcome(stop, tail)
    if result.ending == "timed-out":
        return timed_out_outcome(command.timeout, tail)
    return explain_exit(result.return_code, tail)
