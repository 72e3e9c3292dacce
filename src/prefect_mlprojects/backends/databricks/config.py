"""The configuration of the databricks backend, in MLflow's forms and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prefect_mlprojects._support.redaction import holds_secret
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.backends.configuration import parse_config
from prefect_mlprojects.backends.contract import BackendRequest
from prefect_mlprojects.exceptions import BackendError

NAME = "databricks"
NO_CLUSTER = (
    "Backend spec must be provided when launching MLflow project runs on Databricks: name a new_cluster, an "
    "existing-cluster-id or a (serverless) environment in the backend configuration."
)


_REFERENCE = re.compile(r"\{\{secrets/[^/}]+/[^}]+\}\}")
# Names of environment variables, Spark properties and fields of a specification: PASSWORD, api-key, account.key, primary_key …
_SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)|secret|token|credential|(^|[._-])(pass|pwd|pw|auth|sas)($|[._-])"
    r"|(^|(api|access|account|primary|secondary|private|shared|encryption|signing)?[._-])key($|[._-])|apikey",
    re.IGNORECASE,
)
_FREE_FORM = ("spark_env_vars", "spark_conf")
# A long text of letters and digits, as tokens are: dapi…, base64, or the three parts of a JSON Web Token.
_OPAQUE = re.compile(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])(?!/)[\w+/=~-]{20,}|eyJ[\w-]+\.[\w-]+\.[\w-]*")


def _marked(value: Any, name: str = "", *, free_form: bool = False) -> Any:
    """Returns a part of a specification with its literal secrets as `Secret`; ``{{secrets/scope/key}}`` references stay.

    Secret are values whose name says so, URLs with a password or token, and opaque texts in variables and Spark properties.
    """
    if isinstance(value, Mapping):
        return {key: _marked(each, str(key), free_form=free_form or name in _FREE_FORM) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(each, name, free_form=free_form) for each in value]
    if isinstance(value, bool) or not isinstance(value, str | int) or _REFERENCE.fullmatch(str(value)):
        return value
    text = str(value)
    secret = text and (_SECRET_NAME.search(name) or holds_secret(text) or (free_form and _OPAQUE.fullmatch(text)))
    return Secret(text) if secret else value


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class DatabricksConfig(BaseModel):
    """What users write as ``backend_config``; keys may have hyphens or underscores.

    Attributes:
        credentials: A block's name, or fields of the SDK's ``Config``: host, token, client_id, client_secret …
        profile: A profile of ``~/.databrickscfg``; wins over the one of a ``databricks://profile`` tracking URI.
        new_cluster: The cluster to create for the run, as in the Clusters API. Literal secrets in it are not stored.
        existing_cluster_id: An existing cluster's id.
        environment: A serverless environment: ``environment_version``, ``dependencies``.
        libraries: Libraries of the Jobs API for the cluster.
        timeout: Seconds after which Databricks itself ends the run.
        run_name: The run's name in the workspace.
        access_control: Permissions on the run (the Jobs API's ``access_control_list``).
        code_path: The folder for uploads: ``/Workspace/…``, ``/Volumes/…`` or ``dbfs:/…``.
        git_source: Whether Databricks checks out a git project, instead of an upload.
        secrets: Variable of the command -> ``scope/key`` of a Databricks secret, which the driver reads.
        live_output: Whether output is written to the workspace and read during the run.
        poll_interval: Seconds between two polls of the run; grows to ``max_poll_interval`` without news.
        max_poll_interval: The longest such time, in seconds.
        network_timeout: Seconds for which an unreachable workspace is retried.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True, alias_generator=_kebab, hide_input_in_errors=True)

    credentials: str | dict[str, Secret | bool | int | None] | None = Field(default=None, repr=False)
    profile: str | None = None
    new_cluster: dict[str, Any] | None = None
    existing_cluster_id: str | None = None
    environment: dict[str, Any] | None = None
    libraries: list[dict[str, Any]] = Field(default_factory=list)
    timeout: int | None = Field(default=None, gt=0)
    run_name: str | None = None
    access_control: list[dict[str, Any]] = Field(default_factory=list)
    code_path: str | None = None
    git_source: bool = False
    secrets: dict[str, str] = Field(default_factory=dict)
    live_output: bool = True
    poll_interval: float = Field(default=2.0, gt=0)
    max_poll_interval: float = Field(default=20.0, gt=0)
    network_timeout: float = Field(default=900.0, ge=0)

    @field_validator("new_cluster", "environment", "libraries")
    @classmethod
    def _mark_secrets(cls, value: Any) -> Any:
        return _marked(value)

    @field_validator("code_path")
    @classmethod
    def _check_code_path(cls, value: str | None) -> str | None:
        if value is None:
            return None
        value = value.rstrip("/")
        if ".." in value.split("/") or not value.startswith(("/Workspace/", "/Volumes/", "dbfs:/")):
            raise ValueError("must be an absolute path that begins with /Workspace/, /Volumes/ or dbfs:/")
        if value.startswith("/Volumes/") and len(value.split("/")) < 5:
            raise ValueError("must name a volume: /Volumes/CATALOG/SCHEMA/VOLUME[/FOLDER]")
        return value

    @field_validator("secrets")
    @classmethod
    def _scope_and_key(cls, value: dict[str, str]) -> dict[str, str]:
        for name, place in value.items():
            if place.count("/") != 1 or not all(place.split("/")):
                raise ValueError(f"{name} must name a Databricks secret as scope/key")
        return value

    @model_validator(mode="after")
    def _one_compute(self) -> DatabricksConfig:
        given = [self.new_cluster, self.existing_cluster_id, self.environment]
        if sum(each is not None for each in given) > 1:
            raise ValueError("new_cluster, existing-cluster-id and environment exclude each other: name one")
        if self.environment is not None and self.libraries:
            raise ValueError("a serverless environment takes no libraries: name them under environment.dependencies")
        return self

    @property
    def compute(self) -> Literal["new", "existing", "serverless"] | None:
        """The kind of compute; None if none is named."""
        if self.new_cluster is not None:
            return "new"
        if self.existing_cluster_id is not None:
            return "existing"
        return "serverless" if self.environment is not None else None


DatabricksRequest: TypeAlias = BackendRequest[DatabricksConfig]


@cache
def _fields(kind: Literal["cluster", "library", "environment", "access"]) -> frozenset[str]:
    """Returns the SDK's keys for a part of a submission."""
    from dataclasses import fields

    from databricks.sdk.service.compute import ClusterSpec, Environment, Library
    from databricks.sdk.service.jobs import JobAccessControlRequest

    classes = {
        "cluster": ClusterSpec,
        "library": Library,
        "environment": Environment,
        "access": JobAccessControlRequest,
    }
    # Older SDKs of the supported range lack some keys of an environment.
    newer = {"environment_version", "base_environment"} if kind == "environment" else set()
    return frozenset(each.name for each in fields(classes[kind])) | newer


def parse_databricks_config(config: Mapping[str, Any]) -> DatabricksConfig:
    """Parses a configuration in any of its forms.

    MLflow's forms are a bare cluster specification, ``new_cluster`` with ``libraries``, and either under ``cluster_spec``;
    ``job_cluster`` is another name for ``new_cluster``.

    Raises:
        BackendError: A key is unknown (the nearest is named) or a value is of the wrong type.
    """
    values = dict(config)
    for key in ("cluster_spec", "cluster-spec"):
        spec = values.pop(key, None)
        if spec is None:
            continue
        if not isinstance(spec, Mapping):
            raise BackendError(
                f"The configuration of the {NAME} backend does not fit: {key}: must be a mapping", backend=NAME
            )
        values = {**spec, **values}
    for key in ("job_cluster", "job-cluster"):
        if key in values:
            # An entry of a job's job_clusters, or the specification itself.
            cluster = values.pop(key)
            values["new_cluster"] = cluster.get("new_cluster", cluster) if isinstance(cluster, Mapping) else cluster
    own = {name for field in DatabricksConfig.model_fields for name in (field, _kebab(field))}
    bare = {key: values.pop(key) for key in list(values) if key not in own and key in _fields("cluster")}
    if bare:
        values["new_cluster"] = {**(values.pop("new_cluster", None) or values.pop("new-cluster", None) or {}), **bare}
    parsed = parse_config(DatabricksConfig, values, backend=NAME)
    _check_keys("new_cluster", parsed.new_cluster or {}, _fields("cluster"))
    _check_keys("environment", parsed.environment or {}, _fields("environment"))
    for library in parsed.libraries:
        _check_keys("libraries", library, _fields("library"))
    for entry in parsed.access_control:
        _check_keys("access-control", entry, _fields("access"))
    return parsed


def _check_keys(where: str, value: Mapping[str, Any], known: frozenset[str]) -> None:
    for key in value:
        if key in known:
            continue
        near = nearest(key, known)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise BackendError(
            f"The configuration of the {NAME} backend does not fit: {where}: unknown key {key!r}{hint}", backend=NAME
        )
