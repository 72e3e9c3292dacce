"""The configuration of the backend ``local``, and the Docker engine, found as the ``docker`` command finds it."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefect_mlprojects._support.files import write_private
from prefect_mlprojects._support.process_folders import create_private_folder, remove_private_folder
from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.exceptions import BackendError, BackendUnavailableError

DEFAULT_ADDRESS = "unix:///var/run/docker.sock"


class RegistryCredentials(BaseModel):
    """Credentials for an image registry; the password may be an access token, and `registry` None means Docker Hub."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    username: str
    password: Secret
    registry: str | None = None

    def auth_config(self) -> dict[str, str]:
        """Returns the ``auth_config`` of Docker's SDK, in clear."""
        auth = {"username": self.username, "password": reveal(self.password)}
        return auth | ({"serveraddress": self.registry} if self.registry else {})


class EngineConnection(BaseModel):
    """How to reach a Docker engine: ``unix://…``, ``tcp://…`` or ``ssh://…``; certificates and the key are PEM texts."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    host: str
    ca_certificate: str | None = None
    client_certificate: str | None = None
    client_key: Secret | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_prefect_docker(cls, values: Any) -> Any:
        """Accepts the fields of prefect-docker's ``DockerHost`` block, too."""
        return {"host": values["base_url"]} if isinstance(values, dict) and values.get("base_url") else values

    def pem_files(self) -> dict[str, str]:
        """Returns those of ``ca.pem``, ``cert.pem`` and ``key.pem`` that are set, in clear."""
        key = reveal(self.client_key) if self.client_key else None
        texts = {"ca.pem": self.ca_certificate, "cert.pem": self.client_certificate, "key.pem": key}
        return {name: text for name, text in texts.items() if text}


class LocalConfig(BaseModel):
    """The configuration of the backend ``local``.

    Attributes:
        grace_period: Seconds between SIGTERM and SIGKILL; None for the setting ``PREFECT_MLPROJECTS_GRACE_PERIOD``.
        docker_host: The Docker engine's address; None for the one that the environment or the current Docker context names.
        docker_engine: The Docker engine, instead of ``docker_host``: the name of a block, or its fields.
        docker_tls: The folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` for a ``tcp://`` engine.
        project_files: ``copy`` puts the project's files into the container; ``mount`` mounts its folder there instead.
        container_user: ``caller`` runs as the calling user, to whom files in mounted folders then belong; ``image`` as the image's.
        credentials: Registry credentials: the name of a block, or its fields.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    grace_period: float | None = Field(default=None, ge=0, allow_inf_nan=False, alias="grace-period")
    docker_host: str | None = Field(default=None, alias="docker-host")
    docker_tls: str | None = Field(default=None, alias="docker-tls")
    docker_engine: str | EngineConnection | None = Field(default=None, alias="docker-engine")
    project_files: Literal["copy", "mount"] = Field(default="copy", alias="project-files")
    container_user: Literal["caller", "image"] = Field(default="caller", alias="container-user")
    pull: Literal["missing", "always", "never"] = "missing"
    credentials: str | RegistryCredentials | None = None


@dataclass(frozen=True)
class EngineAddress:
    """Where an engine is; `named_by` says where the address came from.

    TLS is configured by a folder with ``ca.pem``, ``cert.pem`` and ``key.pem``, the Docker context's ``docker.tls.TLSConfig``, or
    the fields of a block or the configuration.
    """

    url: str
    named_by: str
    tls_folder: Path | None = None
    context_tls: Any = None
    connection: EngineConnection | None = None

    @property
    def is_here(self) -> bool:
        """True for an engine on this machine, whose containers can mount its folders and share its network."""
        return self.url.startswith("unix://")


def find_engine(config: LocalConfig) -> EngineAddress:
    """Finds the engine: the configured one, else as the ``docker`` command does, else the local socket.

    The command's order is ``DOCKER_CONTEXT``, ``DOCKER_HOST``, the current Docker context
    (https://docs.docker.com/reference/cli/docker/#environment-variables).

    Raises `BackendError` if ``DOCKER_CONTEXT`` names a context that does not exist.
    """
    connection = config.docker_engine
    if isinstance(connection, EngineConnection):
        return EngineAddress(connection.host, "docker-engine in the backend configuration", connection=connection)
    if config.docker_host:
        folder = Path(config.docker_tls).expanduser() if config.docker_tls else None
        return EngineAddress(config.docker_host, "docker-host in the backend configuration", folder)
    chosen = os.environ.get("DOCKER_CONTEXT")
    if not chosen and os.environ.get("DOCKER_HOST"):
        verified = os.environ.get("DOCKER_TLS_VERIFY")
        folder = Path(os.environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker") if verified else None
        return EngineAddress(os.environ["DOCKER_HOST"], "DOCKER_HOST", folder)
    context = _context(chosen)
    if context is None:
        return EngineAddress(DEFAULT_ADDRESS, "the default")
    how = "DOCKER_CONTEXT" if chosen else "the current Docker context"
    return EngineAddress(str(context.Host), f"{context.name}, {how}", context_tls=context.TLSConfig)


def _context(chosen: str | None) -> Any:
    """Returns the Docker context of a name, or the current one; None for Docker's default context."""
    from docker.context import ContextAPI

    try:
        context = ContextAPI.get_context(chosen) if chosen else ContextAPI.get_current_context()
    except Exception:  # noqa: BLE001 - a corrupt context file
        context = None
    if chosen and context is None:
        message = f"There is no Docker context {chosen!r}, which DOCKER_CONTEXT names; `docker context ls` lists them."
        raise BackendError(message, backend="local")
    return context if context is not None and context.name != "default" and context.Host else None


def connect(config: LocalConfig, *, backend: str = "local", timeout: float = 60) -> Any:
    """Returns Docker's low-level client, connected; `timeout` is the number of seconds for which the engine may be silent.

    Raises `BackendError` if no engine answers.
    """
    from docker.errors import DockerException, TLSParameterError

    address, files = find_engine(config), None
    try:
        tls, files = _tls(address)
        client = _client_class()(
            base_url=address.url,
            tls=tls,
            version="auto",
            timeout=timeout,
            # The user's own ssh, with its configuration, agent and known hosts, as the docker command does.
            use_ssh_client=address.url.startswith("ssh://"),
        )
        client.ping()
    except (DockerException, TLSParameterError, OSError) as error:
        if files is not None:
            remove_private_folder(files)
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        advice = _PERMISSION_ADVICE if "Permission denied" in str(error) else _START_ADVICE
        message = f"No Docker engine answers at {address.url} ({address.named_by}): {why}. {advice}"
        raise BackendUnavailableError(message, backend=backend) from None
    if files is not None:
        weakref.finalize(client, remove_private_folder, files)
    return client


def _client_class() -> Any:
    import docker

    class Client(docker.APIClient):  # type: ignore[misc]  # Docker's SDK has no types
        """Docker's client, which trusts the engine's authority even if ``REQUESTS_CA_BUNDLE`` is set.

        requests prefers that variable to the session's setting (https://github.com/psf/requests/issues/3829).
        """

        def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
            authority = self.verify if verify is None else verify
            return super().merge_environment_settings(url, proxies, stream, authority, cert)

    return Client


def _tls(address: EngineAddress) -> tuple[Any, Path | None]:
    """Returns the TLS configuration, and a folder that must outlive the client: Docker's SDK takes files only."""
    from docker.tls import TLSConfig

    if address.context_tls is not None:
        return address.context_tls, None
    folder, files = address.tls_folder, None
    if address.connection is not None and (pems := address.connection.pem_files()):
        folder = files = create_private_folder()
        for name, text in pems.items():
            write_private(folder / name, text)
    if folder is None:
        return False, None
    authority, certificate, key = (folder / f"{name}.pem" for name in ("ca", "cert", "key"))
    own = (str(certificate), str(key)) if certificate.exists() else None
    return TLSConfig(own, str(authority) if authority.exists() else None, verify=True), files


_PERMISSION_ADVICE = "Join the group that owns the socket (usermod -aG docker USER), or use a rootless engine."
_START_ADVICE = (
    "Start it (systemctl start docker), or name another with DOCKER_HOST, a Docker context, or docker-host or docker-engine in the "
    "backend configuration."
)
