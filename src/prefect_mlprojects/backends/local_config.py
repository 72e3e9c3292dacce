"""The configuration of the backend ``local``: for commands on this machine, and in containers of its Docker engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class RegistryCredentials(BaseModel):
    """How to get into an image registry.

    Attributes:
        username: The user's name.
        password: The password or access token.
        registry: The registry's host; None for Docker Hub.
    """

    model_config = ConfigDict(extra="forbid")

    username: str
    password: SecretStr
    registry: str | None = None

    def auth_config(self) -> dict[str, str]:
        """Returns them as Docker's SDK takes them, for use in memory."""
        auth = {"username": self.username, "password": self.password.get_secret_value()}
        return auth | ({"serveraddress": self.registry} if self.registry else {})


class LocalConfig(BaseModel):
    """The configuration of the backend ``local``.

    Attributes:
        grace_period: Seconds between asking the command to end and killing it; None for the setting
            ``PREFECT_MLPROJECTS_GRACE_PERIOD``.
        docker_host: The Docker engine's address (``unix://…``, ``tcp://…``, ``ssh://…``); None for the one that the environment or
            the current Docker context names.
        docker_tls: The folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` for a ``tcp://`` engine.
        project_files: ``copy`` puts the project's files into the container; ``mount`` mounts its folder there instead.
        container_user: ``caller`` runs as the calling user, so that files in mounted folders belong to it; ``image`` as the image
            says.
        pull: When the image is pulled: ``missing``, ``always`` or ``never``.
        credentials: Registry credentials: the name of a block, or what it holds.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    grace_period: float | None = Field(default=None, ge=0, allow_inf_nan=False, alias="grace-period")
    docker_host: str | None = Field(default=None, alias="docker-host")
    docker_tls: str | None = Field(default=None, alias="docker-tls")
    project_files: Literal["copy", "mount"] = Field(default="copy", alias="project-files")
    container_user: Literal["caller", "image"] = Field(default="caller", alias="container-user")
    pull: Literal["missing", "always", "never"] = "missing"
    credentials: str | RegistryCredentials | None = None

    def plain(self) -> dict[str, Any]:
        """Returns what was set, by the names that users write, with secrets in it."""
        values = self.model_dump(by_alias=True, exclude_unset=True, exclude_none=True)
        if isinstance(self.credentials, RegistryCredentials):
            values["credentials"] = {
                **self.credentials.model_dump(exclude_none=True),
                "password": self.credentials.password.get_secret_value(),
            }
        return values
