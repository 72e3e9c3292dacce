"""The backend ``local`` for projects that run in a container."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects.backends.config_models import parse_config
from prefect_mlprojects.backends.containers.archive import iterate_archive, project_files
from prefect_mlprojects.backends.containers.config import LocalConfig, RegistryCredentials
from prefect_mlprojects.backends.containers.engine import connect, find_engine
from prefect_mlprojects.backends.containers.image import CODE_FOLDER, build_project_image, ensure_image, shell_command
from prefect_mlprojects.backends.contract import BackendCall, ExecutionOutcome, ExecutionRequest, Preparation
from prefect_mlprojects.backends.docker.arguments import ContainerOptions, parse_arguments
from prefect_mlprojects.backends.docker.containers import ContainerRun, find_running, labels
from prefect_mlprojects.backends.docker.diagnosis import explain_start_failure
from prefect_mlprojects.backends.docker.guard import guarded
from prefect_mlprojects.backends.docker.surroundings import surroundings
from prefect_mlprojects.exceptions import BackendError, ParameterError, Problem
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.types import BackendConfig, OutputSink, StopSignal

BACKEND = "local"
DATA_FOLDER = "/mlflow/projects/data"
"""Where files and folders of ``path`` parameters are mounted that are not in the project."""

_CARRIED = "carried"


class DockerBackend:
    """Runs commands in containers of a Docker engine; a ``PreparingBackend`` and a ``PlanningBackend``."""

    @property
    def environment_kind(self) -> str:
        """``docker``, as MLflow's tag says."""
        return "docker"

    @property
    def downloads_paths(self) -> bool:
        """Remote ``path`` parameters are downloaded here, and mounted."""
        return True

    def validate_config(self, config: BackendConfig) -> BackendConfig:
        """Checks the configuration; see ``LocalConfig``."""
        return parse_config(LocalConfig, config, backend=BACKEND).plain()

    def check(self, call: BackendCall) -> None:
        """Checks the arguments for the container, and that the variables to copy are set; see ``PreparingBackend``."""
        _options(call)
        if call.env_manager not in (None, "local"):
            raise ParameterError(
                f"The call of project '{call.project.display_name}' does not fit",
                [
                    Problem(
                        f"env_manager {call.env_manager!r} can't be used in a container, whose image is the environment",
                        parameter="env_manager",
                        fix="leave it out",
                    )
                ],
            )

    def place_paths(self, call: BackendCall, values: Mapping[str, str]) -> Mapping[str, str]:
        """Files of the project keep their place in it; others are mounted, each in a folder of its own."""
        config = _config(call)
        placed = {}
        for name, text in values.items():
            path = Path(text)
            root = call.working_copy.directory
            if path.is_relative_to(root):
                placed[name] = str(PurePosixPath(CODE_FOLDER) / path.relative_to(root).as_posix())
            elif find_engine(config).is_here:
                placed[name] = f"{DATA_FOLDER}/{len(placed)}/{path.name}"
            else:
                raise BackendError(
                    f"The parameter '{name}' names {text}, which the Docker engine can't mount, since it is on another machine. "
                    "Put the file into the project, or pass a URI.",
                    backend=BACKEND,
                )
        return placed

    def plan(self, call: BackendCall, command: str) -> Mapping[str, str]:
        """Says which image would run, and how the project's files get into its container."""
        config = _config(call)
        files = "built into an image" if call.build_image else f"{config.project_files} into {CODE_FOLDER}"
        return {
            "image": _image_of(call),
            "project files": files,
            "container command": " ".join(shell_command(command)[:3]),
        }

    def prepare(self, call: BackendCall, report: Callable[[str], None], stop: StopSignal) -> Preparation:
        """Has the image on the engine: pulled when it is missing, and built with the project's files when that is asked for."""
        config, image = _config(call), _image_of(call)
        engine = connect(config)
        auth = _registry_auth(call)
        image_id, reused = ensure_image(
            engine, image, pull=config.pull, auth=auth, backend=BACKEND, report=report, stop=stop
        )
        if call.build_image:
            built = build_project_image(
                engine,
                image,
                image_id,
                call.working_copy,
                call.project.name,
                backend=BACKEND,
                report=report,
                stop=stop,
            )
            image, image_id, reused = built.name, built.image_id, built.reused
        carried = call.build_image or _carries_project(engine, image_id, _options(call).create.get("working_dir"))
        return Preparation(
            description=f"image {image} ({image_id.removeprefix('sha256:')[:12]})",
            reused=reused,
            image=image,
            tags={"mlflow.docker.image.uri": image, "mlflow.docker.image.id": image_id},
            facts={"image-id": image_id, _CARRIED: "yes" if carried else ""},
        )

    def execute(self, request: ExecutionRequest, output: OutputSink, stop: StopSignal) -> ExecutionOutcome:
        """Runs the command in a container and returns when that has ended and is gone; see ``Backend``."""
        call, preparation = request.call, request.preparation
        assert call is not None
        assert preparation is not None
        if stop.requested:
            return ExecutionOutcome("stopped", cause=str(stop.reason))
        config = LocalConfig.model_validate(dict(request.config))
        grace = grace_period() if config.grace_period is None else config.grace_period
        engine = connect(config)
        options = _options(call)
        tailed = TailedOutput(output)
        tty = bool(options.create.get("tty"))
        running = find_running(engine, request.identity)
        here = find_engine(config).is_here
        from docker.errors import APIError

        try:
            container = running or _create(engine, request, call, preparation, options, config, here=here)
        except APIError as error:
            return _not_started(error)
        run = ContainerRun(engine, container, tailed, tty=tty)
        # The guard comes first: a process that is killed right after the start must not leave its container.
        with guarded(container, config, grace):
            try:
                if running is not None:
                    request.events.report(f"going on with the container {container[:12]}, which runs already")
                    run.go_on()
                else:
                    run.start(attach=here)
                    request.events.report(f"container {container[:12]} of {preparation.image}")
                return run.wait(stop, request.timeout, grace)
            except APIError as error:
                return _not_started(error)
            finally:
                run.remove()


def _config(call: BackendCall) -> LocalConfig:
    return LocalConfig.model_validate(dict(call.config))


def _image_of(call: BackendCall) -> str:
    # Without an image the registry would not have chosen this backend.
    assert call.image is not None
    return call.image


def _options(call: BackendCall) -> ContainerOptions:
    """What the project and the call ask for; the call wins."""
    options = parse_arguments(call.docker_args or {}, os.environ)
    environment = call.project.environment
    if not isinstance(environment, DockerEnvironment):
        return options
    missing = [name for name, value in environment.environment if value is None and name not in os.environ]
    missing = [name for name in missing if name not in options.environment]
    if missing:
        raise ParameterError(
            f"Project '{call.project.display_name}' can't run",
            [
                Problem(f"its docker_env copies the variable {name}, which is not set here", fix=f"set {name}")
                for name in missing
            ],
        )
    variables = {name: os.environ.get(name, "") if value is None else value for name, value in environment.environment}
    options.environment = {**variables, **options.environment}
    taken = {volume.split(":")[1] for volume in options.volumes if ":" in volume}
    options.volumes = [
        *(volume for volume in environment.volumes if volume.split(":")[1:2] and volume.split(":")[1] not in taken),
        *options.volumes,
    ]
    return options


def _registry_auth(call: BackendCall) -> dict[str, str] | None:
    if call.docker_auth:
        return {str(key): str(value) for key, value in call.docker_auth.items()}
    credentials = _config(call).credentials
    return credentials.auth_config() if isinstance(credentials, RegistryCredentials) else None


def _create(
    engine: Any,
    request: ExecutionRequest,
    call: BackendCall,
    preparation: Preparation,
    options: ContainerOptions,
    config: LocalConfig,
    *,
    here: bool,
) -> str:
    image = preparation.facts["image-id"]
    around = surroundings(request.variables, os.environ, engine_is_here=here, network=options.host.get("network_mode"))
    carried = bool(preparation.facts[_CARRIED])
    volumes = [*around.volumes, *options.volumes, *_mounted_paths(request)]
    if not carried and config.project_files == "mount":
        volumes.append(f"{request.working_directory}:{CODE_FOLDER}")
    host: dict[str, Any] = {"init": True, **options.host}
    if around.host_network:
        host["network_mode"] = "host"
    if around.extra_hosts:
        host["extra_hosts"] = {**around.extra_hosts, **host.get("extra_hosts", {})}
    create: dict[str, Any] = dict(options.create)
    if not carried:
        create["working_dir"] = CODE_FOLDER
    user = _caller() if config.container_user == "caller" and here else None
    if user is not None:
        create.setdefault("user", f"{user[0]}:{user[1]}")
    made = engine.create_container(
        image,
        **{
            **create,
            "command": shell_command(request.command),
            "environment": {
                # Docker's init passes a signal on to the whole group, so that the program behind the shell gets it.
                "TINI_KILL_PROCESS_GROUP": "1",
                **around.variables,
                **options.environment,
            },
            "labels": {**create.get("labels", {}), **labels(request.identity)},
            "host_config": engine.create_host_config(binds=_resolved(volumes), **host),
        },
    )
    container = str(made["Id"])
    if not carried and config.project_files == "copy":
        try:
            files = iterate_archive(
                project_files(call.working_copy.directory), prefix=CODE_FOLDER, owner=user or (0, 0)
            )
            engine.put_archive(container, "/", files)
        except BaseException:
            engine.remove_container(container, force=True, v=True)
            raise
    return container


def _caller() -> tuple[int, int] | None:
    """The calling user, where there are such and it is not root already."""
    if not hasattr(os, "getuid") or os.getuid() == 0:
        return None
    return os.getuid(), os.getgid()


def _carries_project(engine: Any, image: str, working_directory: str | None) -> bool:
    """Tells whether an image's working directory holds an MLproject file: a container that never starts is asked."""
    from docker.errors import APIError, NotFound

    folder = working_directory or engine.inspect_image(image)["Config"].get("WorkingDir") or "/"
    try:
        probe = engine.create_container(image, command=["true"], entrypoint=[])["Id"]
    except APIError:
        # The run's own container will tell why there can be none.
        return False
    try:
        for name in ("MLproject", "mlproject", "MLPROJECT", "MLProject"):
            try:
                stream, _ = engine.get_archive(probe, str(PurePosixPath(folder) / name))
            except NotFound:
                continue
            stream.close()
            return True
        return False
    except APIError:
        return False
    finally:
        engine.remove_container(probe, force=True)


def _mounted_paths(request: ExecutionRequest) -> list[str]:
    return [f"{here}:{there}:ro" for here, there in request.paths.items() if there.startswith(f"{DATA_FOLDER}/")]


def _resolved(volumes: list[str]) -> list[str]:
    """Makes relative host folders absolute, as ``docker run`` does since its version 23."""
    return [
        f"{Path(volume.partition(':')[0]).expanduser().absolute()}:{volume.partition(':')[2]}"
        if volume.startswith((".", "~"))
        else volume
        for volume in dict.fromkeys(volumes)
    ]


def _not_started(error: Exception) -> ExecutionOutcome:
    cause, advice = explain_start_failure(str(getattr(error, "explanation", None) or error))
    return ExecutionOutcome("not-started", cause=f"the container could not be started: {cause}", advice=advice)
