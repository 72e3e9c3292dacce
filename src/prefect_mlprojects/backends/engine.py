"""The connection to a Docker engine, found as the ``docker`` command finds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect_mlprojects.backends.local_config import LocalConfig
from prefect_mlprojects.exceptions import BackendError


def connect(config: LocalConfig, *, backend: str = "local", timeout: float = 60) -> Any:
    """Returns Docker's low-level client, connected.

    The engine is the configured one, else that of ``DOCKER_HOST``, else that of the current Docker context, else the local
    socket.

    Args:
        config: What of the configuration of the backend ``local`` is about the engine.
        backend: The backend that needs it, for the error.
        timeout: Seconds that the engine may take to answer, or to go on with an answer.

    Raises:
        BackendError: No engine answers; the message says where it was looked for.
    """
    import docker
    from docker.errors import DockerException, TLSParameterError

    address, how = engine_address(config)
    try:
        tls: Any = False
        if config.docker_tls:
            folder = Path(config.docker_tls).expanduser()
            tls = docker.tls.TLSConfig(
                ca_cert=str(folder / "ca.pem"),
                client_cert=(str(folder / "cert.pem"), str(folder / "key.pem")),
                verify=True,
            )
        if config.docker_host is None and os.environ.get("DOCKER_HOST"):
            client = docker.from_env(timeout=timeout).api
        else:
            client = docker.APIClient(base_url=address, tls=tls, version="auto", timeout=timeout)
        client.ping()
    except (DockerException, TLSParameterError, OSError) as error:
        raise BackendError(
            f"No Docker engine answers at {address} ({how}): {_first_line(error)} Start it (systemctl start docker), or name "
            "another with DOCKER_HOST, a Docker context, or docker-host in the backend configuration.",
            backend=backend,
        ) from None
    return client


def engine_address(config: LocalConfig) -> tuple[str, str]:
    """Returns the engine's address, and who named it.

    Args:
        config: The backend's configuration.
    """
    if config.docker_host:
        return config.docker_host, "docker-host in the backend configuration"
    if os.environ.get("DOCKER_HOST"):
        return os.environ["DOCKER_HOST"], "DOCKER_HOST"
    from docker.context import ContextAPI

    try:
        context = ContextAPI.get_current_context()
    except Exception:  # noqa: BLE001 - a broken file of another program's
        context = None
    if context is not None and context.name != "default" and context.Host:
        return str(context.Host), f"the Docker context {context.name}"
    return "unix:///var/run/docker.sock", "the default"


def is_here(config: LocalConfig) -> bool:
    """Tells whether the engine is on this machine, so that its containers can have this machine's folders and ports.

    Args:
        config: The backend's configuration.
    """
    return engine_address(config)[0].startswith("unix://")


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{text}."
