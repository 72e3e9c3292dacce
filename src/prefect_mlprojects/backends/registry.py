"""The family of backends: our own, and those that installed packages add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from typing_extensions import assert_never

from prefect_mlprojects.backends.contract import Backend, named_image
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import DockerArgs

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

BuiltinBackendName: TypeAlias = Literal["local", "kubernetes", "databricks"]
ENTRY_POINT_GROUP = "prefect_mlprojects.backends"


def available_backends() -> tuple[str, ...]:
    """Returns the names of all backends, our own first."""
    builtin = get_args(BuiltinBackendName)
    return (*builtin, *sorted({each.name for each in _entry_points()} - set(builtin)))


def get_backend(name: str) -> Backend:
    """Returns the backend of a name.

    Args:
        name: One of ``available_backends()``.

    Raises:
        BackendError: There is none of that name, or the package that adds it is broken.
    """
    for builtin in get_args(BuiltinBackendName):
        if name == builtin:
            return _make_builtin(builtin)
    for entry_point in _entry_points():
        if entry_point.name == name:
            return _load(entry_point)
    from prefect_mlprojects._support.text import nearest

    known = available_backends()
    near = nearest(name, known)
    hint = f" Did you mean '{near}'?" if near else ""
    raise BackendError(f"There is no backend '{name}'; available: {', '.join(known)}.{hint}", backend=name)


def select_backend(name: str, project: Project, docker_args: DockerArgs | None) -> Backend:
    """Returns the backend that runs a project: the named one, or for ``local`` what this machine has for it.

    Args:
        name: One of ``available_backends()``.
        project: The project.
        docker_args: The call's arguments for the container.

    Raises:
        BackendError: There is none of that name, or it can't run this project.
    """
    if name == "local" and named_image(project, docker_args) is not None:
        from prefect_mlprojects.backends.docker.backend import DockerBackend

        return DockerBackend()
    return get_backend(name)


def _entry_points() -> EntryPoints:
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINT_GROUP)


def _make_builtin(name: BuiltinBackendName) -> Backend:
    match name:
        case "local":
            from prefect_mlprojects.backends.local.backend import LocalBackend

            return LocalBackend()
        case "kubernetes":
            from prefect_mlprojects.backends.kubernetes.backend import KubernetesBackend

            return KubernetesBackend()
        case "databricks":
            from prefect_mlprojects.backends.databricks.backend import DatabricksBackend

            return DatabricksBackend()
        case _:
            assert_never(name)


def _load(entry_point: EntryPoint) -> Backend:
    package = entry_point.dist.name if entry_point.dist is not None else entry_point.value
    try:
        backend: Backend = entry_point.load()()
    except Exception as error:
        raise BackendError(
            f"The backend '{entry_point.name}' of the package {package} can't be loaded: {type(error).__name__}: {error}",
            backend=entry_point.name,
        ) from error
    missing = [method for method in ("validate_config", "execute") if not callable(getattr(backend, method, None))]
    if missing:
        raise BackendError(
            f"The backend '{entry_point.name}' of the package {package} has no method {' and no method '.join(missing)}.",
            backend=entry_point.name,
        )
    return backend
