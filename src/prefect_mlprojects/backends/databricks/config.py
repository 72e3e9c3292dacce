"""The configuration of the databricks backend, in MLflow's forms and ours, and the connection to its workspace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from prefect_mlprojects._support.redaction import SECRET_NAME, is_secret, mark_variable, redact
from prefect_mlprojects._support.retry import Backoff, retry
from prefect_mlprojects._support.secrets import Secret, Withheld, disclose, has_secret, reveal_all, secrets_in
from prefect_mlprojects._support.text import nearest, split_url
from prefect_mlprojects.backends.configuration import parse_config
from prefect_mlprojects.backends.contract import BackendRequest
from prefect_mlprojects.backends.databricks import NAME, failure, unavailable
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient

_FREE_FORM = ("spark_env_vars", "spark_conf")


def _marked(value: Any, name: str = "", *, free_form: bool = False) -> Any:
    """Returns a part of a specification with its literal secrets as `Secret`; ``{{secrets/scope/key}}`` references stay.

    Secret are values whose name says so, and URLs with a password or token; of variables and Spark properties also opaque texts,
    and `Withheld` is what may be secret (`mark_variable`).
    """
    if isinstance(value, Mapping):
        return {key: _marked(each, str(key), free_form=free_form or name in _FREE_FORM) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(each, name, free_form=free_form) for each in value]
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    text = str(value)
    if free_form:
        marked = mark_variable(name, text)
        return marked if isinstance(marked, Secret) else value
    return Secret(text) if is_secret(name, text) else value


def secret_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the keys of a configuration whose values contain a literal secret; ``secrets`` only names some."""
    nested = {key: value for key, value in config.items() if isinstance(value, Mapping | list) and key != "secrets"}
    return tuple(key for key, value in nested.items() if has_secret(disclose(_marked(value, key))))


# Fields that are passed on to the API -> the SDK's modules and classes of them.
_API_PARTS = {
    "new_cluster": ("compute", "ClusterSpec"),
    "environment": ("compute", "Environment"),
    "libraries": ("compute", "Library"),
    "access_control": ("jobs", "JobAccessControlRequest"),
}


@cache
def _known_keys() -> Mapping[str, frozenset[str]]:
    known = {
        name: frozenset(each.name for each in fields(getattr(import_module(f"databricks.sdk.service.{module}"), model)))
        for name, (module, model) in _API_PARTS.items()
    }
    # Older SDKs of the supported range lack some keys of an environment.
    return known | {"environment": known["environment"] | {"environment_version", "base_environment"}}


def _underscored(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {name.replace("_", "-"): name for name in ("cluster_spec", "job_cluster", "new_cluster")}
    return {names.get(key, key): value for key, value in config.items()}


Compute: TypeAlias = Literal["new", "existing", "serverless"]


class DatabricksConfig(BaseModel):
    """What users write as ``backend_config``; keys may have hyphens or underscores.

    Attributes:
        credentials: A block's name, or fields of the SDK's ``Config``: host, token, client_id, client_secret …
        profile: A profile of ``~/.databrickscfg``; wins over the one of a ``databricks://profile`` tracking URI.
        new_cluster: The cluster to create for the run, as in the Clusters API. Literal secrets in it are not stored.
        timeout: Seconds after which Databricks itself ends the run.
        git_source: Whether Databricks checks out a git project, instead of an upload.
        secrets: Variable of the command -> ``scope/key`` of a Databricks secret, which the driver reads.
        live_output: Whether output is written to the workspace and read during the run.
        poll_interval: Seconds between two polls of the run; grows to ``max_poll_interval`` without news.
        network_timeout: Seconds for which an unreachable workspace is retried.
    """

    model_config = ConfigDict(
        extra="forbid",
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
        hide_input_in_errors=True,
    )

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

    @model_validator(mode="before")
    @classmethod
    def _accept_mlflow_forms(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Accepts a bare cluster specification, a ``job_cluster``, and either (or a ``new_cluster``) under ``cluster_spec``."""
        values = _underscored(given)
        spec = values.pop("cluster_spec", None)
        if not isinstance(spec, Mapping | None):
            raise PydanticCustomError("cluster_spec", "cluster_spec: must be a mapping")
        values = {**_underscored(spec or {}), **values}
        if "job_cluster" in values:
            # An entry of a job's job_clusters, or the specification itself.
            cluster = values.pop("job_cluster")
            values["new_cluster"] = cluster.get("new_cluster", cluster) if isinstance(cluster, Mapping) else cluster
        cluster_keys = _known_keys()["new_cluster"] - cls.model_fields.keys()
        bare = {key: values.pop(key) for key in list(values) if key in cluster_keys}
        return {**values, "new_cluster": {**(values.get("new_cluster") or {}), **bare}} if bare else values

    @field_validator(*_API_PARTS)
    @classmethod
    def _check_keys(cls, value: Any, info: ValidationInfo) -> Any:
        known = _known_keys()[str(info.field_name)]
        for key in (key for part in (value if isinstance(value, list) else [value or {}]) for key in part):
            if key not in known:
                near = nearest(key, known)
                hint = f" (did you mean {near!r}?)" if near else ""
                raise PydanticCustomError("unknown_key", "unknown key {key}{hint}", {"key": repr(key), "hint": hint})
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
        if [self.new_cluster, self.existing_cluster_id, self.environment].count(None) < 2:
            raise ValueError("new_cluster, existing-cluster-id and environment exclude each other: name one")
        if self.environment is not None and self.libraries:
            raise ValueError("a serverless environment takes no libraries: name them under environment.dependencies")
        return self

    def redact(self, text: str) -> str:
        """Redacts this configuration's secrets, which Databricks may quote in a message."""
        login = self.credentials if isinstance(self.credentials, dict) else {}
        hidden = [value for name, value in login.items() if SECRET_NAME.search(name)]
        given = secrets_in([hidden, self.new_cluster, self.environment, self.libraries])
        return redact(text, *(each for each in given if not isinstance(each, Withheld)))

    @property
    def compute(self) -> Compute | None:
        """The kind of compute; None if none is named."""
        given = {"new": self.new_cluster, "existing": self.existing_cluster_id, "serverless": self.environment}
        return next((kind for kind in get_args(Compute) if given[kind] is not None), None)


DatabricksRequest: TypeAlias = BackendRequest[DatabricksConfig]
parse_databricks_config = partial(parse_config, DatabricksConfig, backend=NAME)


def connect(config: DatabricksConfig, tracking_uri: str, stop: StopSignal | None = None) -> WorkspaceClient:
    """Returns a client of the workspace; with a token it sends no request yet."""
    if isinstance(config.credentials, str):
        raise failure(
            f"The credentials block {config.credentials!r} was not resolved. Blocks are resolved by run() and by deployments."
        )
    given = reveal_all(config.credentials or {})
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if values and "auth_type" not in values:
        # The environment may hold other credentials, and the SDK refuses several methods at once.
        kind = "oauth-m2m" if values.get("client_secret") else "pat" if values.get("token") else None
        values |= {"auth_type": kind} if kind else {}
    parts = split_url(tracking_uri)
    # MLflow: "databricks://scope:prefix" names a secret scope, which exists inside a workspace only.
    named = parts.netloc.partition(":")[0] if parts.scheme in ("databricks", "databricks-uc") else ""
    if not values and (profile := config.profile or named):
        values["profile"] = profile
    logging.getLogger("databricks.sdk").setLevel(logging.ERROR)
    return insist(partial(_client, values), config, stop, "The Databricks workspace can't be used")


def _client(values: dict[str, Any]) -> WorkspaceClient:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.config import Config

    unknown = sorted(set(values) - {each.name for each in Config.attributes()})
    if unknown:
        raise failure(f"The Databricks credentials have an unknown field: {', '.join(unknown)}.")
    values |= {"product": "prefect-mlprojects", "product_version": version("prefect-mlprojects")}
    # `insist` retries instead, since the SDK's own retries ignore the stop signal.
    return WorkspaceClient(config=Config(**values, http_timeout_seconds=60, retry_timeout_seconds=1))


_Answer = TypeVar("_Answer")
_NOT_FOUND = "Check the ids and paths in the backend configuration."
_ADVICE = {
    "Unauthenticated": "The token is wrong or has expired: put a new one into the block, profile or DATABRICKS_TOKEN.",
    "PermissionDenied": "Give the user or service principal the permission that the message names.",
    "ValueError": "Name credentials: a databricks-workspace block, a profile, or DATABRICKS_HOST and DATABRICKS_TOKEN.",
    "NotFound": _NOT_FOUND,
    "ResourceDoesNotExist": _NOT_FOUND,
    "TimeoutError": "The workspace could not be reached: check the host and the network, or raise network-timeout.",
}
# Errors of the SDK about something that the configuration names.
_MISTAKES = ("ValueError", "NotFound", "ResourceDoesNotExist", "InvalidParameterValue")


def _is_transient(error: BaseException) -> bool:
    """Returns whether an error is transient: a rate limit, a server error, a lost connection."""
    import requests
    from databricks.sdk import errors
    from databricks.sdk.core import DatabricksError

    transient = (errors.TooManyRequests, errors.InternalError, errors.TemporarilyUnavailable, errors.DeadlineExceeded)
    if isinstance(error, (*transient, requests.exceptions.RequestException, ConnectionError, TimeoutError)):
        return True
    # The SDK has no class for a gateway's errors.
    text = f"{error.error_code} {error}".lower() if type(error) is DatabricksError else ""
    return any(sign in text for sign in ("502", "bad gateway", "bad_gateway"))


def insist(call: Callable[[], _Answer], config: DatabricksConfig, stop: StopSignal | None, what: str) -> _Answer:
    """Returns the result of an idempotent call, which it retries on transient errors for the ``network-timeout``.

    `stop` ends the retries; it is None for a call that must outlast a stop request. `what` begins the error's message.

    Raises:
        BackendError: The workspace refused it, or was unreachable for too long.
    """
    try:
        backoff = Backoff(0.5, 20)
        return retry(call, is_transient=_is_transient, seconds=config.network_timeout, stop=stop, backoff=backoff)
    except BackendError:
        raise
    except Exception as error:  # noqa: BLE001 - the SDK raises many kinds
        raise refused(what, error, config) from None


def refused(what: str, error: BaseException, config: DatabricksConfig) -> BackendError:
    """Returns the error of a failed call, with advice and without the configuration's secrets."""
    advice = _ADVICE.get(type(error).__name__, "")
    if "invalid_client" in str(error):
        failed = "Authentication failed for the service principal: its client_secret is wrong or expired."
        advice = f"{failed} Create a new one in the account console."
    if isinstance(error, TimeoutError) and error.__cause__ is not None:
        # The error that the SDK retried; its own message names only the time.
        error = error.__cause__
    # The SDK appends its configuration, with names of files and variables.
    text = config.redact(str(error).partition(". Config:")[0].strip()) or type(error).__name__
    kind = failure if type(error).__name__ in _MISTAKES else unavailable
    return kind(f"{what}: {text.rstrip('.')}. {advice}".rstrip())
