"""The backend ``local`` for projects that run in a container."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.secrets import reveal_all, reveal_values
from prefect_mlprojects.backends.containers.archive import iterate_archive, project_files
from prefect_mlprojects.backends.containers.engine import LocalConfig, RegistryCredentials, connect, find_engine
from prefect_mlprojects.backends.containers.image import CODE_FOLDER, EngineImages
from prefect_mlprojects.backends.containers.prelude import shell_command
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
from prefect_mlprojects.backends.docker.arguments import ContainerOptions, parse_arguments, privileges, read_files
from prefect_mlprojects.backends.docker.container_env import container_env
from prefect_mlprojects.backends.docker.containers import (
    PROBE_LABELS,
    ContainerRun,
    explain_start_failure,
    find_running,
    guarded,
    labels,
    remove_old_probes,
)
from prefect_mlprojects.backends.outcome import Outcome, stopped_outcome
from prefect_mlprojects.exceptions import BackendError, ParameterError, Problem
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.spec.project import DockerEnvironment, expand_volume
from prefect_mlprojects.types import StopSignal

BACKEND = "local"
DATA_FOLDER = "/mlflow/projects/data"
"""Where files and folders of ``path`` parameters from outside the project are mounted."""


@dataclass(frozen=True)
class DockerImage:
    """The image that a command runs in; `carries_project` is True if its working directory holds the project."""

    image_id: str
    carries_project: bool


_Request: TypeAlias = BackendRequest[LocalConfig]
_Prepared: TypeAlias = Prepared[LocalConfig, DockerImage]


class DockerBackend(Backend[LocalConfig, DockerImage]):
    """Runs commands in containers of a Docker engine: the backend ``local`` for a project or request that names an image."""

    name = BACKEND
    config_model = LocalConfig

    def environment_kind(self, request: _Request) -> str:
        """Returns ``docker``."""
        del request
        return "docker"

    def check(self, request: _Request) -> None:
        """Raises `ParameterError` for a wrong argument, a variable that is not set, or an environment manager."""
        _options(request)
        if request.env_manager not in (None, "local"):
            message = f"env_manager {request.env_manager!r} can't be used in a container: its image is the environment"
            raise ParameterError(
                f"The run options of project '{request.project.display_name}' contradict each other",
                [Problem(message, parameter="env_manager", fix="leave it out")],
            )

    def demands(self, request: _Request) -> Demands:
        """Returns the image, the mounted paths with those of ``path`` parameters, and what weakens the container's isolation."""
        options, config = _options(request), request.config
        mounts = [str(each["Source"]) for each in options.host.get("mounts", ()) if each.get("Type") == "bind"]
        volumes = [source for each in options.volumes if "/" in (source := each.partition(":")[0])]
        declared, parameters = request.entry_point.parameters, request.parameters.declared
        given = [text for name, text in parameters.items() if declared[name].type == "path" and "://" not in text]
        inside = request.working_copy.directory
        outside = [text for text in given if not Path(text).resolve().is_relative_to(inside.resolve())]
        engine = [name for name in ("docker-host", "docker-engine") if getattr(config, name.replace("-", "_"), None)]
        return Demands(
            images=(str(request.image),),
            host_paths=(*mounts, *volumes, *outside, *read_files(request.docker_args or {})),
            privileges=(*privileges(options), *engine),
        )

    def map_paths(self, request: _Request, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Maps files of the project to its folder in the container, and each other one to a folder that it is mounted in.

        Raises `BackendError` for a file outside the project if the engine is on another machine.
        """
        mapped: dict[str, str] = {}
        root = request.working_copy.directory
        for name, text in paths.items():
            path = Path(text)
            if path.is_relative_to(root):
                mapped[name] = str(PurePosixPath(CODE_FOLDER) / path.relative_to(root).as_posix())
            elif find_engine(request.config).is_here:
                mapped[name] = f"{DATA_FOLDER}/{len(mapped)}/{path.name}"
            else:
                raise BackendError(
                    f"Parameter '{name}': the Docker engine can't mount {text}, since it is on another machine. "
                    "Put the file into the project, or pass a URI.",
                    backend=BACKEND,
                )
        return mapped

    def plan(self, request: _Request, command: str) -> BackendPlan:
        """Returns the image, how the project's files get into its container, and its command."""
        files = "built into an image" if request.build_image else f"{request.config.project_files} into {CODE_FOLDER}"
        sections = {
            "image": str(request.image),
            "project files": files,
            "container command": " ".join(shell_command(command)[:3]),
        }
        return BackendPlan("docker", sections=sections)

    def prepare(self, request: _Request, report: Report, stop: StopSignal) -> _Prepared:
        """Pulls the image if it is missing, and builds one with the project's files if requested.

        Raises `BackendError` if the engine can't be reached, the image can't be pulled or built, or a stop is requested.
        """
        config, image, options = request.config, str(request.image), _options(request)
        with contextlib.closing(connect(config)) as engine:
            images = EngineImages(engine, BACKEND, report, stop)
            image_id, reused = images.ensure(image, config.pull, _registry_auth(request))
            if request.build_image:
                mounted = [_target(volume) for volume in options.volumes]
                built = images.build(image, image_id, request.working_copy, request.project.name, mounted)
                image, image_id, reused = built.name, built.image_id, built.reused
            carries = request.build_image or _carries_project(engine, image_id, options.create.get("working_dir"))
        tags = {"mlflow.docker.image.uri": image, "mlflow.docker.image.id": image_id}
        description = f"image {image} ({image_id.removeprefix('sha256:')[:12]})"
        return Prepared(request, DockerImage(image_id, carries), description, reused, image, tags)

    def execute(self, prepared: _Prepared, command: Command, events: ExecutionEvents, stop: StopSignal) -> Outcome:
        """Runs the command in a container; returns once it has exited and was removed.

        Raises `BackendError` if the engine can't be reached, or the artifacts would be lost.
        """
        if stop.requested:
            return stopped_outcome(stop)
        with contextlib.closing(connect(prepared.request.config)) as engine:
            return _run(engine, prepared, command, events, stop)


def _run(engine: Any, prepared: _Prepared, command: Command, events: ExecutionEvents, stop: StopSignal) -> Outcome:
    from docker.errors import APIError

    config = prepared.request.config
    grace = grace_period() if config.grace_period is None else config.grace_period
    options, here = _options(prepared.request), find_engine(config).is_here
    running = find_running(engine, command.identity)
    execution = running[1] if running else uuid.uuid4().hex
    # The guard starts first: a process killed while it creates the container must not leave it.
    with guarded(execution, config, grace):
        try:
            create = partial(_create, engine, prepared, command, options, here=here)
            container = running[0] if running else create(labels(command.identity, execution))
        except APIError as error:
            return _not_started(error)
        run = ContainerRun(engine, container, TailedOutput(events), tty=bool(options.create.get("tty")))
        try:
            if running is not None:
                events.report(f"continuing with container {container[:12]}, which is already running")
                run.resume()
            else:
                run.start(attach=here)
                events.report(f"container {container[:12]} of {prepared.image}")
            return run.wait(stop, command.timeout, grace)
        except APIError as error:
            return _not_started(error)
        finally:
            run.remove()


def _options(request: _Request) -> ContainerOptions:
    """Merges the container options of the project and of `docker_args`, which take precedence."""
    options = parse_arguments(request.docker_args or {}, os.environ)
    environment = request.project.environment
    if not isinstance(environment, DockerEnvironment):
        return options
    copied = {name for name, value in environment.environment if value is None}
    if missing := sorted(copied - os.environ.keys() - options.environment.keys()):
        message = "its docker_env copies the variable {0}, which is not set"
        raise ParameterError(
            f"Project '{request.project.display_name}' can't run",
            [Problem(message.format(name), fix=f"set {name}") for name in missing],
        )
    variables = {name: os.environ.get(name, "") if value is None else value for name, value in environment.environment}
    options.environment = {**variables, **options.environment}
    named = [expand_volume(volume, request.working_copy.directory) for volume in environment.volumes]
    options.volumes = [*_not_mounted(named, options.volumes), *options.volumes]
    return options


def _not_mounted(volumes: Iterable[str], others: Iterable[str]) -> list[str]:
    """Returns the volumes whose folder in the container is not that of one of the others, which Docker would refuse."""
    taken = {_target(volume) for volume in others}
    return [volume for volume in volumes if _target(volume) and _target(volume) not in taken]


def _target(volume: str) -> str:
    return volume.split(":")[1] if ":" in volume else ""


def _registry_auth(request: _Request) -> dict[str, str] | None:
    if request.docker_auth:
        return {str(key): str(value) for key, value in reveal_all(request.docker_auth).items()}
    credentials = request.config.credentials
    return credentials.auth_config() if isinstance(credentials, RegistryCredentials) else None


def _create(
    engine: Any,
    prepared: _Prepared,
    command: Command,
    options: ContainerOptions,
    own_labels: Mapping[str, str],
    *,
    here: bool,
) -> str:
    request, config = prepared.request, prepared.request.config
    directory = request.working_copy.directory
    own = container_env(
        reveal_values(command.child_env),
        os.environ,
        artifact_uri=command.artifact_uri,
        engine_is_here=here,
        network=options.host.get("network_mode"),
    )
    carried = prepared.value.carries_project
    volumes = [*_not_mounted(own.volumes, options.volumes), *options.volumes, *_mounted_paths(command)]
    if not carried and config.project_files == "mount":
        volumes.append(f"{directory}:{CODE_FOLDER}")
    host: dict[str, Any] = {"init": True, **options.host}
    if own.host_network:
        host["network_mode"] = "host"
    if own.extra_hosts:
        host["extra_hosts"] = {**own.extra_hosts, **host.get("extra_hosts", {})}
    create: dict[str, Any] = dict(options.create)
    if not carried:
        create["working_dir"] = CODE_FOLDER
    user = _caller() if config.container_user == "caller" and here else None
    if user is not None:
        create.setdefault("user", f"{user[0]}:{user[1]}")
    create |= {
        "command": shell_command(command.line),
        # Docker's init forwards signals to the process group, so that the shell's child gets them too.
        "environment": {"TINI_KILL_PROCESS_GROUP": "1", **own.variables, **options.environment},
        "labels": {**create.get("labels", {}), **own_labels},
        "host_config": engine.create_host_config(binds=_resolved(volumes), **host),
    }
    container = str(engine.create_container(prepared.value.image_id, **create)["Id"])
    if not carried and config.project_files == "copy":
        try:
            files = project_files(request.working_copy, mounted=[_target(volume) for volume in volumes])
            engine.put_archive(container, "/", iterate_archive(files, prefix=CODE_FOLDER, owner=user or (0, 0)))
        except BaseException:
            engine.remove_container(container, force=True, v=True)
            raise
    return container


def _caller() -> tuple[int, int] | None:
    """Returns the calling user's ids; None for root, and where users have no ids."""
    if not hasattr(os, "getuid") or os.getuid() == 0:
        return None
    return os.getuid(), os.getgid()


def _carries_project(engine: Any, image: str, working_directory: str | None) -> bool:
    """Returns whether an image's working directory holds an MLproject file; looks into a container that never starts."""
    from docker.errors import APIError, NotFound

    folder = working_directory or engine.inspect_image(image)["Config"].get("WorkingDir") or "/"
    try:
        remove_old_probes(engine)
        probe = engine.create_container(image, command=["true"], entrypoint=[], labels=dict(PROBE_LABELS))["Id"]
    except APIError:
        # Creating the run's container will report the cause.
        return False
    try:
        for name in ("MLproject", "mlproject", "MLPROJECT", "MLProject"):
            with contextlib.suppress(NotFound):
                engine.get_archive(probe, str(PurePosixPath(folder) / name))[0].close()
                return True
        return False
    except APIError:
        return False
    finally:
        engine.remove_container(probe, force=True)


def _mounted_paths(command: Command) -> list[str]:
    return [f"{here}:{there}:ro" for here, there in command.paths.items() if there.startswith(f"{DATA_FOLDER}/")]


def _resolved(volumes: list[str]) -> list[str]:
    """Makes relative host folders absolute, as ``docker run`` does since its version 23."""
    return [
        f"{Path(volume.partition(':')[0]).expanduser().absolute()}:{volume.partition(':')[2]}"
        if volume.startswith((".", "~"))
        else volume
        for volume in dict.fromkeys(volumes)
    ]


def _not_started(error: Exception) -> Outcome:
    failure = explain_start_failure(str(getattr(error, "explanation", None) or error))
    return replace(failure, cause=f"the container could not be started: {failure.cause}")
