"""A container's environment: variables for access to data, mounts of a local tracking store, and its network."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlunsplit

from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.backends.containers.image import CODE_FOLDER
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.tracking.uris import RUN_ID_VARIABLE, TRACKING_URI_VARIABLE, is_on_this_machine, sqlite_path

# The variables that MLflow passes on (mlflow/projects/backend/local.py and docker.py) for S3, Azure, HDFS and Databricks, and
# others by which MLflow in the container reaches the same stores.
PASSED_ON = tuple(
    name
    for group in (
        "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_DEFAULT_REGION AWS_REGION",
        "MLFLOW_S3_ENDPOINT_URL MLFLOW_S3_IGNORE_TLS MLFLOW_S3_UPLOAD_EXTRA_ARGS MLFLOW_EXPERIMENTAL_S3_SIGNATURE_VERSION",
        "AZURE_STORAGE_CONNECTION_STRING AZURE_STORAGE_ACCESS_KEY AZURE_STORAGE_SAS_TOKEN",
        "MLFLOW_KERBEROS_TICKET_CACHE MLFLOW_KERBEROS_USER MLFLOW_PYARROW_EXTRA_CONF MLFLOW_ALLOW_FILE_STORE",
        "DATABRICKS_HOST DATABRICKS_USERNAME DATABRICKS_PASSWORD DATABRICKS_TOKEN DATABRICKS_INSECURE",
        "DATABRICKS_CLIENT_ID DATABRICKS_CLIENT_SECRET",
        "MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN MLFLOW_TRACKING_INSECURE_TLS",
    )
    for name in group.split()
)
# The variables that name a file with credentials, which is mounted.
CREDENTIAL_FILES = ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "GOOGLE_APPLICATION_CREDENTIALS")
KERBEROS_TICKET = "MLFLOW_KERBEROS_TICKET_CACHE"
HOST_NAME = "host.docker.internal"

_URL_VARIABLES = (TRACKING_URI_VARIABLE, "PREFECT_API_URL", "MLFLOW_S3_ENDPOINT_URL")
_SYSTEM_FOLDERS = (
    "/",
    *map("/{}".format, ("bin", "dev", "etc", "lib", "lib64", "opt", "proc", "run", "sbin", "sys", "usr", "var")),
)


@dataclass(frozen=True)
class ContainerEnv:
    """What a container gets from this machine; volumes are ``host:container[:mode]``, and extra hosts map names to addresses."""

    variables: Mapping[str, str] = field(repr=False)
    volumes: tuple[str, ...] = ()
    host_network: bool = False
    extra_hosts: Mapping[str, str] = field(default_factory=dict)


def container_env(
    variables: Mapping[str, str],
    environ: Mapping[str, str],
    *,
    artifact_uri: str = "",
    engine_is_here: bool,
    network: str | None,
) -> ContainerEnv:
    """Returns the environment of a container, from the run's `variables` and this process's `environ`.

    The folder of a SQLite or file store and that of the experiment's artifacts are mounted under their own paths, so that the
    tracking URI and the artifact locations in the store mean the same inside.

    Raises `BackendError` if the store or the artifacts are local and the engine is remote, or the store's folder can't be mounted.
    """
    result = {name: environ[name] for name in PASSED_ON if environ.get(name)}
    volumes = [
        *_store_volumes(variables.get(TRACKING_URI_VARIABLE, ""), engine_is_here),
        *_artifact_volumes(artifact_uri, variables.get(RUN_ID_VARIABLE, ""), engine_is_here),
    ]
    if engine_is_here:
        files, files_volumes = _credentials(environ, artifact_uri)
        result |= files
        volumes += files_volumes
    result |= variables
    local = [name for name in _URL_VARIABLES if _is_loopback(result.get(name, ""))]
    if not local or network not in (None, "bridge"):
        return ContainerEnv(result, tuple(volumes))
    if network is None and engine_is_here and os.uname().sysname == "Linux":
        # Only the host's network reaches a server that listens on 127.0.0.1.
        return ContainerEnv(result, tuple(volumes), host_network=True)
    result |= {name: _on_host(result[name]) for name in local}
    return ContainerEnv(result, tuple(volumes), extra_hosts={HOST_NAME: "host-gateway"})


def _store_volumes(uri: str, engine_is_here: bool) -> list[str]:
    folders = _store_folders(uri)
    if folders and not engine_is_here:
        raise BackendError(
            f"The tracking store {folders[0]} is on this machine, but the Docker engine is remote: its containers can't reach the "
            "store. Set MLFLOW_TRACKING_URI to a tracking server.",
            backend="local",
        )
    if system := [folder for folder in folders if str(folder) in _SYSTEM_FOLDERS]:
        raise BackendError(
            f"The tracking store is in {system[0]}, which can't be mounted into a container. Set MLFLOW_TRACKING_URI to a store in "
            "another folder.",
            backend="local",
        )
    return [f"{folder}:{folder}" for folder in folders]


def _store_folders(uri: str) -> list[Path]:
    database = sqlite_path(uri)
    if database is not None:
        folder = database.absolute().parent
        # With a SQLite store MLflow keeps artifacts in ./mlruns of the folder where the experiment was created.
        artifacts = Path.cwd() / "mlruns"
        return [folder] if artifacts.is_relative_to(folder) or not artifacts.is_dir() else [folder, artifacts]
    parts = split_url(uri)
    if parts.scheme == "file":
        return [_created(Path(unquote(parts.path)))]
    return []


def _artifact_volumes(artifact_uri: str, run_id: str, engine_is_here: bool) -> list[str]:
    """Returns the volume of a local artifact folder: the experiment's, which holds its models and nested runs too."""
    parts = split_url(artifact_uri)
    if not artifact_uri or parts.scheme not in ("", "file"):
        return []
    path = Path(unquote(parts.path) if parts.scheme else artifact_uri)
    if path.parts[-2:] == (run_id, "artifacts") and str(path.parents[1]) not in (*_SYSTEM_FOLDERS, "."):
        path = path.parents[1]
    if not engine_is_here:
        raise BackendError(
            f"The run's artifacts are stored in the folder {path} of this machine, but the Docker engine is remote: they would "
            "be lost. Use an experiment whose artifacts are stored by the tracking server or in an object store.",
            backend="local",
        )
    # MLflow takes a relative path from the working directory, which is the project's folder in a container.
    return [f"{_created(path.absolute())}:{PurePosixPath(CODE_FOLDER) / path}"]


def _credentials(environ: Mapping[str, str], artifact_uri: str) -> tuple[dict[str, str], list[str]]:
    """Returns the variables and volumes of files with credentials: those that variables name, ``~/.aws``, Kerberos tickets."""
    variables, volumes = dict[str, str](), list[str]()
    scheme, aws = split_url(artifact_uri).scheme, Path(environ.get("HOME") or "~").expanduser() / ".aws"
    if scheme == "s3" and aws.is_dir():
        # The folder that MLflow uses; boto3 looks there only if the home directory is "/".
        volumes.append(f"{aws}:/.aws")
        variables |= {"AWS_SHARED_CREDENTIALS_FILE": "/.aws/credentials", "AWS_CONFIG_FILE": "/.aws/config"}
    for name in CREDENTIAL_FILES:
        if environ.get(name) and Path(environ[name]).is_file():
            target = f"/mlflow/credentials/{Path(environ[name]).name}"
            volumes.append(f"{Path(environ[name]).absolute()}:{target}:ro")
            variables[name] = target
    if environ.get("AWS_PROFILE") and variables.keys() & {"AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"}:
        # Without a file that defines it, boto3 refuses the name of a profile.
        variables["AWS_PROFILE"] = environ["AWS_PROFILE"]
    ticket = environ.get(KERBEROS_TICKET, "").removeprefix("FILE:")
    if scheme in ("hdfs", "viewfs") and Path(ticket).is_file():
        volumes.append(f"{Path(ticket).absolute()}:{Path(ticket).absolute()}")
    return variables, volumes


def _created(folder: Path) -> Path:
    # The engine would create a missing folder owned by root; it has to where this user may not.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_loopback(url: str) -> bool:
    return url.startswith(("http://", "https://")) and is_on_this_machine(url)


def _on_host(url: str) -> str:
    parts = split_url(url)
    user, at, _ = parts.netloc.rpartition("@")
    port = f":{parts.port}" if parts.port else ""
    return urlunsplit(parts._replace(netloc=f"{user}{at}{HOST_NAME}{port}"))
