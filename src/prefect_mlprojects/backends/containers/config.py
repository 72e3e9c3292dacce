"""The configuration of the backend ``local``: for commands on this machine, and in containers of its Docker engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefect_mlprojects._support.secrets import Secret, reveal


class RegistryCredentials(BaseModel):
    """Credentials for an image registry.

    Attributes:
        username: The user's name.
        password: The password or access token.
        registry: The registry's host; None for Docker Hub.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    username: str
    password: Secret
    registry: str | None = None

    def auth_config(self) -> dict[str, str]:
        """Returns the ``auth_config`` of Docker's SDK, in clear."""
        auth = {"username": self.username, "password": reveal(self.password)}
        return auth | ({"serveraddress": self.registry} if self.registry else {})


class EngineConnection(BaseModel):
    """How to reach a Docker engine.

    Attributes:
        host: ``unix://…``, ``tcp://…`` or ``ssh://…``.
        ca_certificate: The authority that signed the engine's certificate, as PEM text.
        client_certificate: Our certificate, as PEM text.
        client_key: Its key, as PEM text.
    """

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
        grace_period: Seconds between SIGTERM and SIGKILL; None for the setting
            ``PREFECT_MLPROJECTS_GRACE_PERIOD``.
        docker_host: The Docker engine's address (``unix://…``, ``tcp://…``, ``ssh://…``); None for the one that the environment or
            the current Docker context names.
        docker_engine: The Docker engine, instead of ``docker_host``: the name of a block, or its fields.
        docker_tls: The folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` for a ``tcp://`` engine.
        project_files: ``copy`` puts the project's files into the container; ``mount`` mounts its folder there instead.
        container_user: ``caller`` runs as the calling user, so that files in mounted folders belong to it; ``image`` as the image's
            user.
        pull: When to pull the image: ``missing``, ``always`` or ``never``.
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
