"""Finds backends by name: built-in ones, and those of installed packages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from typing_extensions import assert_never

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.backends.contract import AnyBackend, Backend, named_image
from prefect_mlprojects.backends.mlflow_plugins import MlflowPluginBackend, plugin_entry_points
from prefect_mlprojects.exceptions import BackendError, BackendUnavailableError
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import DockerArgs

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

BuiltinBackendName: TypeAlias = Literal["local", "kubernetes", "databricks"]
ENTRY_POINT_GROUP = "prefect_mlprojects.backends"


def available_backends() -> tuple[str, ...]:
    """Returns the names of all backends, built-in ones first; MLflow's backend plugins are among the others."""
    builtin = get_args(BuiltinBackendName)
    added = {each.name for each in _entry_points()} | set(plugin_entry_points())
    return (*builtin, *sorted(added - set(builtin)))


def get_backend(name: str) -> AnyBackend:
    """Returns a backend; raises `BackendError` if no backend has that name, or the package that adds it is broken."""
    for builtin in get_args(BuiltinBackendName):
        if name == builtin:
            return _make_builtin(builtin)
    for entry_point in _entry_points():
        if entry_point.name == name:
            return _load(entry_point)
    if name in plugin_entry_points():
        return MlflowPluginBackend(name)
    known = available_backends()
    near = nearest(name, known)
    hint = f" Did you mean '{near}'?" if near else ""
    raise BackendError(f"There is no backend '{name}'; available: {', '.join(known)}.{hint}", backend=name)


def select_backend(name: str, project: Project, docker_args: DockerArgs | None) -> AnyBackend:
    """Returns the backend called `name`; for ``local``, Docker's if the project or the request names an image."""
    if name == "local" and named_image(project, docker_args) is not None:
        from prefect_mlprojects.backends.docker.backend import DockerBackend

        return DockerBackend()
    return get_backend(name)


def _entry_points() -> EntryPoints:
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINT_GROUP)


def _make_builtin(name: BuiltinBackendName) -> AnyBackend:
    match name:
        case "local":
            from prefect_mlprojects.backends.local import LocalBackend

            return LocalBackend()
        case "kubernetes":
            from prefect_mlprojects.backends.kubernetes import KubernetesBackend

            return KubernetesBackend()
        case "databricks":
            from prefect_mlprojects.backends.databricks.backend import DatabricksBackend

            return DatabricksBackend()
        case _:
            assert_never(name)


def _load(entry_point: EntryPoint) -> AnyBackend:
    package = entry_point.dist.name if entry_point.dist is not None else entry_point.value
    subject = f"The backend '{entry_point.name}' of the package {package}"
    try:
        backend = entry_point.load()()
    except Exception as error:
        message = f"{subject} can't be loaded: {type(error).__name__}: {error}"
        raise BackendUnavailableError(message, backend=entry_point.name) from error
    if not isinstance(backend, Backend):
        message = f"{subject} is a {type(backend).__name__}, which is not a subclass of prefect_mlprojects.Backend."
        raise BackendUnavailableError(message, backend=entry_point.name)
    return backend
