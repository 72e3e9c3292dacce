"""The connection to a Docker engine, found as the ``docker`` command finds it."""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_mlprojects.backends.containers.config import EngineConnection, LocalConfig
from prefect_mlprojects.exceptions import BackendError, BackendUnavailableError

DEFAULT_ADDRESS = "unix:///var/run/docker.sock"


@dataclass(frozen=True)
class EngineAddress:
    """Where an engine is.

    Attributes:
        url: ``unix://…``, ``tcp://…`` or ``ssh://…``.
        named_by: Where the address came from, for messages.
        tls_folder: The folder with ``ca.pem``, ``cert.pem`` and ``key.pem``; None without TLS, or with the context's own.
        context_tls: The Docker context's ``docker.tls.TLSConfig``; None if it has none.
        connection: The engine's fields in a block or the configuration; None without them.
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

    Raises:
        BackendError: ``DOCKER_CONTEXT`` names a context that does not exist.
    """
    if isinstance(config.docker_engine, EngineConnection):
        return EngineAddress(
            config.docker_engine.host, "docker-engine in the backend configuration", connection=config.docker_engine
        )
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
        raise BackendError(
            f"There is no Docker context {chosen!r}, which DOCKER_CONTEXT names; `docker context ls` lists them.",
            backend="local",
        )
    return context if context is not None and context.name != "default" and context.Host else None


def connect(config: LocalConfig, *, backend: str = "local", timeout: float = 60) -> Any:
    """Returns Docker's low-level client, connected.

    Args:
        config: The configuration of the backend ``local``.
        backend: The backend that needs it, for the error.
        timeout: Seconds to wait for the engine to answer, or to continue an answer.

    Raises:
        BackendError: No engine answers; the message names its address and what to do.
    """
    from docker.errors import DockerException, TLSParameterError

    address = find_engine(config)
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
        raise BackendUnavailableError(
            f"No Docker engine answers at {address.url} ({address.named_by}): {_first_line(error)} {_advice(error)}",
            backend=backend,
        ) from None
    if files is not None:
        weakref.finalize(client, files.cleanup)
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


def _tls(address: EngineAddress) -> tuple[Any, tempfile.TemporaryDirectory[str] | None]:
    """Returns the TLS configuration, and a folder that must outlive the client: Docker's SDK takes files only."""
    from docker.tls import TLSConfig

    if address.context_tls is not None:
        return address.context_tls, None
    folder, files = address.tls_folder, None
    if address.connection is not None and (pems := address.connection.pem_files()):
        files = tempfile.TemporaryDirectory(prefix="docker-tls-")
        folder = Path(files.name)
        for name, text in pems.items():
            (folder / name).touch(0o600)
            (folder / name).write_text(text)
    if folder is None:
        return False, None
    certificate = (str(folder / "cert.pem"), str(folder / "key.pem"))
    own = (folder / "cert.pem").exists()
    authority = folder / "ca.pem"
    return (
        TLSConfig(
            client_cert=certificate if own else None,
            ca_cert=str(authority) if authority.exists() else None,
            verify=True,
        ),
        files,
    )


def _advice(error: Exception) -> str:
    if "Permission denied" in str(error):
        return "Join the group that owns the socket (usermod -aG docker USER), or use a rootless engine."
    return (
        "Start it (systemctl start docker), or name another with DOCKER_HOST, a Docker context, or docker-host or "
        "docker-engine in the backend configuration."
    )


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{text}."
