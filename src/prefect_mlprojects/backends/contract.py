"""The backend contract: what a class that runs projects' commands implements, and the values that it gets and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from pydantic import BaseModel

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.configuration import parse_config
from prefect_mlprojects.backends.outcome import Outcome
from prefect_mlprojects.environments import EnvironmentPlan
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.spec import CheckedParameters, EntryPoint, Project
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.types import BackendConfig, StopSignal, StreamName

if TYPE_CHECKING:
    from prefect_mlprojects.sources.git import GitCredentialsLookup

ConfigT = TypeVar("ConfigT", bound=BaseModel)
ValueT = TypeVar("ValueT")

Report: TypeAlias = Callable[[str], None]
"""Takes a line about the progress (without its newline), from any thread."""


@dataclass(frozen=True)
class RunIdentity:
    """The ids and names of a run, for names, labels and messages.

    Attributes:
        flow_run_id: The Prefect flow run's id.
        mlflow_run_id: The MLflow run's id; empty when the backend creates it itself (`Backend.tracks_runs`).
        project: The project's name, or its folder's name if it has none.
        entry_point: The entry point's name.
    """

    flow_run_id: str
    mlflow_run_id: str
    project: str
    entry_point: str


@dataclass(frozen=True)
class BackendRequest(Generic[ConfigT]):
    """What a backend knows of a run before anything is built.

    Attributes:
        config: The backend's configuration, with its secrets.
        tracking_uri: The absolute tracking URI.
        docker_args: Arguments for the container, as the caller wrote them, with secret ones as `Secret`.
        docker_auth: Credentials for the image registry, given to ``run()``.
        env_manager: The environment manager that the caller chose; None: by the project's files.
        rebuild_environment: True to build the environment even if it is cached.
        version: The branch, tag or commit that the caller asked for.
        git_credentials: Finds the credentials that the project was fetched with, for a backend that clones it elsewhere. It
            blocks: not to be called on the event loop's thread.
        run_options: Further run options by name, for backends that pass them on (MLflow's plugins).
    """

    project: Project
    entry_point: EntryPoint
    parameters: CheckedParameters
    working_copy: WorkingCopy
    config: ConfigT
    tracking_uri: Secret = field(default=Secret(""), repr=False)
    docker_args: Mapping[str, Any] | None = field(default=None, repr=False)
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    build_image: bool = False
    env_manager: str | None = None
    rebuild_environment: bool = False
    version: str | None = None
    git_credentials: GitCredentialsLookup | None = field(default=None, repr=False, compare=False)
    run_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def image(self) -> str | None:
        """The image that the request names, else the one of the project's ``docker_env``; None if neither does."""
        return named_image(self.project, self.docker_args)


def named_image(project: Project, docker_args: Mapping[str, Any] | None) -> str | None:
    """Returns the image that `docker_args` name, else the one of the project's ``docker_env``."""
    image = (docker_args or {}).get("image")
    if image:
        return str(image)
    environment = project.environment
    return environment.image if isinstance(environment, DockerEnvironment) else None


@dataclass(frozen=True)
class Prepared(Generic[ConfigT, ValueT]):
    """What `Backend.prepare` made ready for a command.

    Attributes:
        request: What it was prepared for.
        value: The backend's own value: a prepared environment, an image, an upload.
        description: For people to read ("image busybox:1.36", "archive of 12 files, 8 kB").
        reused: Whether it existed before.
        image: The image that the command runs in, if it runs in a container: a name, tag or digest.
        tags: Tags for the MLflow run, such as ``mlflow.docker.image.uri``.
    """

    request: BackendRequest[ConfigT]
    value: ValueT
    description: str
    reused: bool = False
    image: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """The command of one run.

    Attributes:
        line: The shell command line; every value in it is quoted already, once.
        child_env: Variables that the run adds to the child's environment: ``MLFLOW_RUN_ID``, ``MLFLOW_TRACKING_URI`` ...
        identity: The run's ids and names.
        parameters: The values in it as text, unquoted, for backends that don't run `line`; secret ones as `Secret`.
        timeout: Seconds after which the command is ended; None: no limit.
        paths: By each local file or folder that the command needs, what the command calls it (`Backend.map_paths`).
        artifact_uri: Where the MLflow run's artifacts are stored; empty if the backend creates the run itself.
    """

    line: str
    child_env: Mapping[str, Secret | str]
    identity: RunIdentity
    timeout: float | None = None
    parameters: Mapping[str, Secret | str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    artifact_uri: str = field(default="", repr=False)


@dataclass(frozen=True)
class BackendPlan:
    """What a backend would do with a request, for ``mlprojects plan``; no secret in it.

    Attributes:
        environment: For people to read ("uv, Python 3.11.7, 3 requirements", "docker").
        environment_plan: The environment that would be built on this machine; None if none would be.
        sections: What would be used or submitted, texts by title ("image", "manifest").
    """

    environment: str
    environment_plan: EnvironmentPlan | None = None
    sections: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demands:
    """What a run would use that a worker's policy may refuse.

    Attributes:
        images: The images of its containers.
        host_paths: The files and folders of the machine that they mount or read.
        privileges: What gives them more rights than usual, for people to read ("privileged", "pid host").
        unknown: True if the backend does not tell.
    """

    images: tuple[str, ...] = ()
    host_paths: tuple[str, ...] = ()
    privileges: tuple[str, ...] = ()
    unknown: bool = False


class ExecutionEvents(Protocol):
    """Receives the events of an execution, from any thread; never raises."""

    def write(self, stream: StreamName, data: bytes) -> None:
        """Takes the next bytes of the command's output, unchanged; may block to slow the command down."""

    def report(self, line: str) -> None:
        """Takes a line about the progress, for the flow run's log."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Takes tags for the MLflow run, such as the remote job's id and page."""

    def link(self, title: str, url: str) -> None:
        """Takes the page of the remote job; it is logged and kept with the flow run."""

    def adopt_run(self, run_id: str, tracking_uri: Secret) -> None:
        """Takes the MLflow run that the backend created itself (`Backend.tracks_runs`)."""


class Backend(ABC, Generic[ConfigT, ValueT]):
    """Runs a project's command somewhere, and ends it.

    A package adds a backend by an entry point of the group ``prefect_mlprojects.backends``: its name is the backend's, its
    object a `Backend` class, or a function that returns a `Backend`, called without arguments.

    Methods are called in the order `check`, `map_paths`, `prepare`, `execute`, `release`, each from a worker thread;
    `prepare` may run beside `map_paths`. A backend keeps no state of a run in itself: `Prepared.value` holds it.

    Attributes:
        name: The backend's name, as ``--backend`` takes it.
        config_model: The pydantic model of its configuration. Fields of type `Secret` are never stored with a flow run; set
            ``extra="forbid"`` and ``hide_input_in_errors=True``.
        downloads_paths: Whether remote ``path`` parameters are downloaded to this machine first; otherwise `map_paths` gets
            their URIs.
        runs_here: Whether commands run with this process's account and files; others get files of this machine only as sent.
        tracks_runs: Whether the backend creates the MLflow run itself, and reports it by `ExecutionEvents.adopt_run`.
    """

    name: ClassVar[str]
    config_model: type[ConfigT]
    downloads_paths: ClassVar[bool] = True
    runs_here: ClassVar[bool] = False
    tracks_runs: ClassVar[bool] = False

    def parse_config(self, config: BackendConfig) -> ConfigT:
        """Returns a configuration, with the keys that the user wrote, as its model; reads no file and no network.

        Raises:
            BackendError: A key is unknown (the nearest is named) or a value is of the wrong type; all at once.
        """
        return parse_config(self.config_model, config, backend=self.name)

    @abstractmethod
    def environment_kind(self, request: BackendRequest[ConfigT]) -> str:
        """Returns the value of MLflow's tag ``mlflow.project.env``: ``virtualenv``, ``conda``, ``docker`` ..."""

    def check(self, request: BackendRequest[ConfigT]) -> None:
        """Checks a request before anything is built or sent: contradicting options, a store out of reach.

        Raises:
            ExecutionException: The request can't work; the message says why and what to do.
        """

    def map_paths(self, request: BackendRequest[ConfigT], paths: Mapping[str, str]) -> Mapping[str, str]:
        """Returns what the command calls the files and folders that its ``path`` parameters name; changes nothing.

        `paths` has absolute local paths by parameter name, and remote URIs if `downloads_paths` is False.

        Raises:
            BackendError: A path can't be reached from where the command runs.
        """
        del request
        return paths

    def demands(self, request: BackendRequest[ConfigT]) -> Demands:
        """Returns what a checked request would use, for a worker's policy, which refuses a backend that does not tell."""
        del request
        return Demands(unknown=True)

    @abstractmethod
    def plan(self, request: BackendRequest[ConfigT], command: str) -> BackendPlan:
        """Returns what the backend would do with a shell command line; sends nothing.

        Raises:
            ExecutionException: The run could not work.
        """

    @abstractmethod
    def prepare(self, request: BackendRequest[ConfigT], report: Report, stop: StopSignal) -> Prepared[ConfigT, ValueT]:
        """Prepares what the command needs: builds an environment, pulls an image, uploads the project.

        It runs concurrently with the downloads and the start of tracking. The run may fail before `execute` is called, so
        results are either kept for the next run (content-addressed) or removed by `release`.

        Raises:
            ExecutionException: The preparation failed or was stopped.
        """

    @abstractmethod
    def execute(
        self, prepared: Prepared[ConfigT, ValueT], command: Command, events: ExecutionEvents, stop: StopSignal
    ) -> Outcome:
        """Runs the command; returns once it and everything it started has exited and its output was written to `events`.

        On a stop request or time-out it ends the command: SIGTERM, grace period, SIGKILL. If a stop was requested before, it
        starts nothing. Whatever the command does is an `Outcome`, never an exception.

        Raises:
            BackendUnavailableError: The backend itself failed: it can't be reached, it refused the job.
        """

    def release(self, prepared: Prepared[ConfigT, ValueT]) -> None:
        """Frees what `prepare` holds for the run; idempotent, called however the run ended, and never raises."""


AnyBackend: TypeAlias = Backend[Any, Any]
AnyRequest: TypeAlias = BackendRequest[Any]
AnyPrepared: TypeAlias = Prepared[Any, Any]
