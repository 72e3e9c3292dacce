"""Docker engines, and credentials for image registries."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from prefect_mlprojects.blocks import logos


class DockerRegistry(Block):
    """A user name and password for an image registry.

    Example:
        Pull a project's image with them::

            from prefect_mlprojects.blocks import DockerRegistry

            DockerRegistry(username="ci", password="…", registry="registry.example.com").save("prod")
            run("project", backend_config={"credentials": "prod"})
    """

    _block_type_name = "Docker Registry (MLproject)"
    _block_type_slug = "docker-registry"
    _logo_url = logos.DOCKER
    _description = "A user name and password for an image registry, for projects that run in containers."

    username: str = Field(description="The user's name.")
    password: SecretStr = Field(description="The password or access token.")
    registry: str | None = Field(default=None, description="The registry's host; Docker Hub when left out.")

    def get_credentials(self) -> dict[str, Any]:
        """Returns the credentials with their secret, for use in memory."""
        values = {"username": self.username, "password": self.password.get_secret_value(), "registry": self.registry}
        return {name: value for name, value in values.items() if value is not None}

    def test_connection(self) -> None:
        """Logs in at the registry, by the Docker engine.

        Raises:
            docker.errors.DockerException: It refused, or there is no engine.
        """
        import docker

        docker.from_env().login(self.username, self.password.get_secret_value(), registry=self.registry)


class DockerEngine(Block):
    """The address of a Docker engine, and what it takes to be let in.

    Example:
        Run a project on an engine that is reached by TCP with TLS::

            from prefect_mlprojects.blocks import DockerEngine

            DockerEngine(
                host="tcp://gpu-box:2376",
                ca_certificate=Path("ca.pem").read_text(),
                client_certificate=Path("cert.pem").read_text(),
                client_key=Path("key.pem").read_text(),
            ).save("gpu-box")
            run("project", backend_config={"docker-engine": "gpu-box"})
    """

    _block_type_name = "Docker Engine (MLproject)"
    _block_type_slug = "docker-engine"
    _logo_url = logos.DOCKER
    _description = "The address of a Docker engine with its TLS certificates, for projects that run in containers."

    host: str = Field(
        description="unix:///path, tcp://host:port or ssh://user@host. For ssh, the worker's own keys are used."
    )
    ca_certificate: str | None = Field(
        default=None, description="The authority that signed the engine's certificate (PEM)."
    )
    client_certificate: str | None = Field(default=None, description="The certificate to be let in with (PEM).")
    client_key: SecretStr | None = Field(default=None, description="The key of that certificate (PEM).")

    def get_credentials(self) -> dict[str, Any]:
        """Returns the address and the certificates with their key, for use in memory."""
        key = self.client_key.get_secret_value() if self.client_key else None
        values = {
            "host": self.host,
            "ca_certificate": self.ca_certificate,
            "client_certificate": self.client_certificate,
            "client_key": key,
        }
        return {name: value for name, value in values.items() if value is not None}

    def test_connection(self) -> None:
        """Asks the engine whether it is there.

        Raises:
            BackendError: It does not answer.
        """
        from prefect_mlprojects.backends.containers.config import LocalConfig
        from prefect_mlprojects.backends.containers.engine import connect

        connect(LocalConfig.model_validate({"docker-engine": self.get_credentials()})).close()
