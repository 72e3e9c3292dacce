"""The local backend: the command runs on this machine, in a process group of its own."""

from __future__ import annotations

import errno
import shutil

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.process.run import ProcessResult, run_process
from prefect_mlprojects.backends.config_models import parse_config
from prefect_mlprojects.backends.containers.config import LocalConfig
from prefect_mlprojects.backends.contract import ExecutionOutcome, ExecutionRequest
from prefect_mlprojects.backends.outcome import find_cause
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import BackendConfig, OutputSink, StopSignal


class LocalBackend:
    """Runs commands with ``bash -c`` in the project's folder."""

    def validate_config(self, config: BackendConfig) -> BackendConfig:
        """Checks the configuration; see ``LocalConfig``.

        Raises:
            BackendError: A key is unknown or a value is not of its kind.
        """
        return parse_config(LocalConfig, config, backend="local").plain()

    def execute(self, request: ExecutionRequest, output: OutputSink, stop: StopSignal) -> ExecutionOutcome:
        """Runs the command and returns when it, and every process it left, has ended and all its output was written.

        Raises:
            BackendError: There is no bash on this machine.
        """
        if stop.requested:
            return ExecutionOutcome("stopped", cause=str(stop.reason))
        if not request.working_directory.is_dir():
            return ExecutionOutcome(
                "not-started", cause=f"the working directory {request.working_directory} does not exist"
            )
        environment = request.environment
        if environment is None:
            raise BackendError("The local backend was given no environment to run the command in.", backend="local")
        bash = shutil.which("bash")
        if bash is None:
            raise BackendError("The local backend needs bash, which is not on PATH.", backend="local")
        tail = TailedOutput(output)
        config = LocalConfig.model_validate(dict(request.config))
        try:
            result = run_process(
                [*environment.command_prefix, bash, "-c", request.command],
                cwd=request.working_directory,
                env={**environment.variables, **request.variables},
                write=tail.write,
                stop=stop,
                timeout=request.timeout,
                grace=config.grace_period,
            )
        except (OSError, ValueError) as error:
            return ExecutionOutcome("not-started", cause=_why_not_started(error))
        return _outcome(result, request, stop, tail.close())


def _why_not_started(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return f"the command line or the environment holds what no program can be given: {error}"
    if error.errno == errno.E2BIG:
        return "the command line or the environment is too long for the system"
    place = f": {error.filename}" if error.filename else ""
    return f"the command could not be started: {error.strerror or error}{place}"


def _outcome(
    result: ProcessResult, request: ExecutionRequest, stop: StopSignal, tail: tuple[str, ...]
) -> ExecutionOutcome:
    if result.ending == "stopped":
        return ExecutionOutcome("stopped", cause=str(stop.reason), output_tail=tail)
    if result.ending == "timed-out":
        return ExecutionOutcome(
            "timed-out", cause=f"it took longer than its timeout of {request.timeout:g} s", output_tail=tail
        )
    cause = find_cause(result.return_code)
    text, advice = cause.text, cause.advice
    if result.return_code != 0 and not request.working_directory.is_dir():
        advice = f"Its working directory {request.working_directory} vanished while it ran."
    return ExecutionOutcome("exited", cause.exit_code, cause.signal, text, advice, tail)
