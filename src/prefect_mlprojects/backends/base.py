"""What a backend is: the place where a project's command runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from prefect_mlprojects.environments.base import PreparedEnvironment
from prefect_mlprojects.types import BackendConfig, OutputSink, StopSignal

Ending: TypeAlias = Literal["exited", "stopped", "timed-out", "not-started"]


@dataclass(frozen=True)
class RunIdentity:
    """Who a run is, for names, labels and messages.

    Attributes:
        flow_run_id: The Prefect flow run's id.
        mlflow_run_id: The MLflow run's id.
        project: The project's name, or the name of its folder when it has none.
        entry_point: The entry point's name.
    """

    flow_run_id: str
    mlflow_run_id: str
    project: str
    entry_point: str


@dataclass(frozen=True)
class ExecutionRequest:
    """One command to run.

    Attributes:
        command: The shell command line; every value in it is quoted already, once.
        working_directory: The project's folder (with the ``#subdirectory`` applied), absolute.
        environment: The environment that the command sees as activated.
        variables: What the run adds to the child's environment: ``MLFLOW_RUN_ID``, ``MLFLOW_TRACKING_URI`` …
        identity: Who the run is.
        config: The backend's configuration, validated by ``Backend.validate_config``.
        timeout: Seconds after which the run is ended; None for no limit.
    """

    command: str
    working_directory: Path
    environment: PreparedEnvironment
    variables: Mapping[str, str]
    identity: RunIdentity
    config: BackendConfig = field(default_factory=dict)
    timeout: float | None = None


@dataclass(frozen=True)
class ExecutionOutcome:
    """How an execution ended, and why.

    Attributes:
        ending: ``exited`` by itself, ``stopped`` by the stop signal, ``timed-out``, or ``not-started``.
        exit_code: The command's exit code, when it exited by itself.
        signal: The number of the signal that ended it, when one did.
        cause: Why it ended, in words ("exit code 3", "killed by SIGKILL (the machine may have run out of memory)").
        advice: What to do about it; empty when there is nothing to say.
        output_tail: The last lines of both streams in the order they came.
    """

    ending: Ending
    exit_code: int | None = None
    signal: int | None = None
    cause: str = ""
    advice: str = ""
    output_tail: tuple[str, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Whether the command exited by itself with code 0."""
        return self.ending == "exited" and self.exit_code == 0


class Backend(Protocol):
    """Runs a project's command somewhere, and ends it.

    Third parties add a backend by an entry point of the group ``prefect_mlprojects.backends`` whose name is the backend's
    and whose object is a class (or function) that returns a ``Backend`` when called without arguments.
    """

    def validate_config(self, config: BackendConfig) -> BackendConfig:
        """Checks a configuration without touching the network.

        Args:
            config: What the user wrote: the keys of this backend.

        Returns:
            The configuration with its defaults, plain JSON.

        Raises:
            BackendError: A key is unknown (the nearest is named) or a value is not of its kind.
        """

    def execute(self, request: ExecutionRequest, output: OutputSink, stop: StopSignal) -> ExecutionOutcome:
        """Runs the command and returns when it, and every process it left, has ended and all its output was written.

        When ``stop`` is requested or the timeout passes, it ends the command (asks, waits a grace period, kills). Called
        with a stop already requested it starts nothing. It returns then, and never raises for what the command does.

        Args:
            request: What to run.
            output: Takes what the command prints, while it prints it.
            stop: Asks for the end.

        Returns:
            How it ended.

        Raises:
            BackendError: The backend itself failed (it can't be reached, it refused the run).
        """
