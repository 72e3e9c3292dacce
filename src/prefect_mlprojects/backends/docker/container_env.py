"""A container's environment: variables for access to data, mounts of a local tracking store, and its network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.tracking.uris import TRACKING_URI_VARIABLE, is_on_this_machine, sqlite_path

# The variables that MLflow passes on (mlflow/projects/backend/local.py and docker.py), for S3, Azure and Databricks.
PASSED_ON = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_S3_IGNORE_TLS",
    "MLFLOW_S3_UPLOAD_EXTRA_ARGS",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ACCESS_KEY",
    "DATABRICKS_HOST",
    "DATABRICKS_USERNAME",
    "DATABRICKS_PASSWORD",
    "DATABRICKS_TOKEN",
    "DATABRICKS_INSECURE",
    "DATABRICKS_CLIENT_ID",
    "DATABRICKS_CLIENT_SECRET",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
)
GOOGLE_CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"
HOST_NAME = "host.docker.internal"

_URL_VARIABLES = (TRACKING_URI_VARIABLE, "PREFECT_API_URL", "MLFLOW_S3_ENDPOINT_URL")
_SYSTEM_FOLDERS = (
    "/",
    "/bin",
    "/dev",
    "/etc",
    "/lib",
    "/lib64",
    "/opt",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/usr",
    "/var",
)


@dataclass(frozen=True)
class ContainerEnv:
    """What a container gets from this machine.

    Attributes:
        variables: Variables of its environment.
        volumes: Folders, as ``host:container[:mode]``.
        host_network: Whether it shares this machine's network, to reach servers on localhost.
        extra_hosts: Additional host names and their addresses.
    """

    variables: Mapping[str, str] = field(repr=False)
    volumes: tuple[str, ...] = ()
    host_network: bool = False
    extra_hosts: Mapping[str, str] = field(default_factory=dict)


def container_env(
    variables: Mapping[str, str], environ: Mapping[str, str], *, engine_is_here: bool, network: str | None
) -> ContainerEnv:
    """Returns the environment of a container.

    A SQLite or file store's folder is mounted under its own path, so that the tracking URI and the artifact locations in the
    store mean the same inside.

    Args:
        variables: The run's variables: ``MLFLOW_TRACKING_URI`` …
        environ: This process's variables.
        engine_is_here: Whether the engine can mount this machine's folders and share its network.
        network: The network that the caller asked for.

    Raises:
        BackendError: The store is local and the engine is remote, or its folder can't be mounted.
    """
    result = {name: environ[name] for name in PASSED_ON if environ.get(name)}
    result |= variables
    volumes: list[str] = []
    uri = variables.get(TRACKING_URI_VARIABLE, "")
    for folder in _store_folders(uri):
        if not engine_is_here:
            raise BackendError(
                f"The tracking store {folder} is on this machine, but the Docker engine is remote: its containers can't reach the "
                "store. Set MLFLOW_TRACKING_URI to a tracking server.",
                backend="local",
            )
        if str(folder) in _SYSTEM_FOLDERS:
            raise BackendError(
                f"The tracking store is in {folder}, which can't be mounted into a container. Set MLFLOW_TRACKING_URI to a "
                "store in another folder.",
                backend="local",
            )
        volumes.append(f"{folder}:{folder}")
    credentials = environ.get(GOOGLE_CREDENTIALS)
    if credentials and engine_is_here and Path(credentials).is_file():
        place = f"/mlflow/credentials/{Path(credentials).name}"
        volumes.append(f"{Path(credentials).absolute()}:{place}:ro")
        result[GOOGLE_CREDENTIALS] = place
    local = [name for name in _URL_VARIABLES if _is_loopback(result.get(name, ""))]
    if not local or network not in (None, "bridge"):
        return ContainerEnv(result, tuple(volumes))
    if network is None and engine_is_here and os.uname().sysname == "Linux":
        # Only the host's network reaches a server that listens on 127.0.0.1.
        return ContainerEnv(result, tuple(volumes), host_network=True)
    result |= {name: _on_host(result[name]) for name in local}
    return ContainerEnv(result, tuple(volumes), extra_hosts={HOST_NAME: "host-gateway"})


def _store_folders(uri: str) -> list[Path]:
    database = sqlite_path(uri)
    if database is not None:
        folder = database.absolute().parent
        # With a SQLite store MLflow keeps artifacts in ./mlruns of the folder where the experiment was created.
        artifacts = Path.cwd() / "mlruns"
        return [folder] if artifacts.is_relative_to(folder) else [folder, _created(artifacts)]
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return [_created(Path(unquote(parts.path)))]
    return []


def _created(folder: Path) -> Path:
    # The engine would create a missing folder owned by root.
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_loopback(url: str) -> bool:
    return url.startswith(("http://", "https://")) and is_on_this_machine(url)


def _on_host(url: str) -> str:
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    port = f":{parts.port}" if parts.port else ""
    return urlunsplit(parts._replace(netloc=f"{user}{at}{HOST_NAME}{port}"))
