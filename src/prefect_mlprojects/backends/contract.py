"""What a backend is: the place where a project's command runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from prefect_mlprojects.environments.base import PreparedEnvironment
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.sources.git.credentials import GitCredentialsLookup
from prefect_mlprojects.spec import CheckedParameters, EntryPoint, Project
from prefect_mlprojects.spec.project import DockerEnvironment
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


def named_image(project: Project, docker_args: Mapping[str, Any] | None) -> str | None:
    """Returns the image that a call's arguments for the container name, else that of the project's ``docker_env``.

    Args:
        project: The project.
        docker_args: The call's arguments for the container.

    Returns:
        The image; None when neither names one.
    """
    image = (docker_args or {}).get("image")
    if image:
        return str(image)
    environment = project.environment
    return environment.image if isinstance(environment, DockerEnvironment) else None


@dataclass(frozen=True)
class BackendCall:
    """A call of a project, as far as it is known before anything is built: what a backend checks and prepares for.

    Attributes:
        project: The project.
        entry_point: The entry point.
        parameters: The checked values.
        working_copy: The project's files.
        config: The backend's configuration, validated by ``Backend.validate_config``; what it names in blocks is in it.
        tracking_uri: The absolute tracking URI; it may hold a password.
        docker_args: Arguments for the container, as the caller wrote them.
        docker_auth: Credentials for the image registry, given to ``run()``.
        build_image: Whether an image is to be built for the project.
        env_manager: The environment manager that the caller asked for.
        version: The branch, tag or commit that the caller asked for.
        git_credentials: Finds the credentials that the project itself was fetched with, for a backend that clones it elsewhere;
            to be asked from a thread other than the event loop's.
    """

    project: Project
    entry_point: EntryPoint
    parameters: CheckedParameters
    working_copy: WorkingCopy
    config: BackendConfig = field(default_factory=dict, repr=False)
    tracking_uri: str = field(default="", repr=False)
    docker_args: Mapping[str, Any] | None = None
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    build_image: bool = False
    env_manager: str | None = None
    version: str | None = None
    git_credentials: GitCredentialsLookup | None = field(default=None, repr=False, compare=False)

    @property
    def image(self) -> str | None:
        """The image that the call names, else the project's ``docker_env``; None when neither does."""
        return named_image(self.project, self.docker_args)


@dataclass(frozen=True)
class Preparation:
    """What a ``PreparingBackend`` made ready for a command.

    Attributes:
        description: For people to read ("image busybox:1.36", "archive of 12 files, 8 kB").
        reused: Whether it was there already.
        image: The image that the command runs in, when it runs in a container: a name, tag or digest.
        tags: Tags for the MLflow run, such as ``mlflow.docker.image.uri``.
        facts: What the backend noted for its own ``execute``; plain text, no secrets.
    """

    description: str
    reused: bool = False
    image: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


class ExecutionEvents(Protocol):
    """Takes what a backend has to tell while it executes; from any thread, and never raises."""

    def report(self, line: str) -> None:
        """Takes a line about the progress, for the flow run's log: what was started where, what is waited for."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Takes tags for the MLflow run, such as the remote run's id and page."""

    def link(self, title: str, url: str) -> None:
        """Takes the page of the remote run; it is logged and kept with the flow run."""


class NoEvents:
    """Ignores what happens; an ``ExecutionEvents``."""

    def report(self, line: str) -> None:
        """Ignores it."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Ignores them."""

    def link(self, title: str, url: str) -> None:
        """Ignores it."""


@dataclass(frozen=True)
class ExecutionRequest:
    """One command to run.

    Attributes:
        command: The shell command line; every value in it is quoted already, once.
        working_directory: The project's folder (with the ``#subdirectory`` applied), absolute.
        environment: The environment that the command sees as activated; None for a ``PreparingBackend``.
        variables: What the run adds to the child's environment: ``MLFLOW_RUN_ID``, ``MLFLOW_TRACKING_URI`` … They may be
            secret.
        identity: Who the run is.
        config: The backend's configuration, validated by ``Backend.validate_config``.
        timeout: Seconds after which the run is ended; None for no limit.
        call: The call; None only where a test makes a request by hand.
        preparation: What ``PreparingBackend.prepare`` returned.
        paths: What the command's ``path`` parameters name here -> what the command calls it, as
            ``PreparingBackend.place_paths`` decided.
        events: Takes what the backend has to tell.
    """

    command: str
    working_directory: Path
    environment: PreparedEnvironment | None
    variables: Mapping[str, str] = field(repr=False)
    identity: RunIdentity
    config: BackendConfig = field(default_factory=dict, repr=False)
    timeout: float | None = None
    call: BackendCall | None = None
    preparation: Preparation | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    events: ExecutionEvents = field(default_factory=NoEvents, repr=False)


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


@runtime_checkable
class PreparingBackend(Backend, Protocol):
    """A backend that makes ready itself what the command needs to run; no environment manager is asked.

    The optional ability of backends whose commands run elsewhere: in a container, on a cluster.

    """

    @property
    def environment_kind(self) -> str:
        """The kind of the environment for MLflow's tag ``mlflow.project.env``, such as ``docker``."""

    @property
    def downloads_paths(self) -> bool:
        """Whether remote ``path`` parameters are downloaded here first; else ``place_paths`` gets their URIs."""

    def check(self, call: BackendCall) -> None:
        """Checks a call before anything is built or asked of a network: contradicting options, a store out of reach.

        Raises:
            ExecutionException: It can't work; the message says why and what to do.
        """

    def place_paths(self, call: BackendCall, values: Mapping[str, str]) -> Mapping[str, str]:
        """Decides what the command calls the files and folders that its ``path`` parameters name; changes nothing.

        Args:
            call: The call.
            values: Values by parameter name: absolute local paths, and remote URIs when they are not downloaded here.

        Returns:
            The values that the command gets, by parameter name.

        Raises:
            BackendError: A value can't be reached from where the command runs.
        """

    def prepare(self, call: BackendCall, report: Callable[[str], None], stop: StopSignal) -> Preparation:
        """Makes ready what the command needs: pulls or builds an image, uploads the project.

        It runs beside the downloads and the start of tracking; a call that turns out wrong may never be executed, so what
        it makes is either kept for the next run (content-addressed) or cleaned up by ``execute``.

        Args:
            call: The call.
            report: Takes progress, a line each (without its newline), from any thread.
            stop: Asks for the end.

        Raises:
            BackendError: It failed or was stopped.
        """


@runtime_checkable
class PlanningBackend(Protocol):
    """A backend that can say what it would do; the optional ability that ``mlprojects plan`` shows."""

    def plan(self, call: BackendCall, command: str) -> Mapping[str, str]:
        """Returns what would be used and submitted, texts by title ("image", "manifest"); asks no network, shows no secret.

        Args:
            call: The call.
            command: The shell command line.

        Raises:
            BackendError: It could not work.
        """
