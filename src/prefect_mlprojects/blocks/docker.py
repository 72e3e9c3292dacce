"""Credentials for an image registry."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr


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
