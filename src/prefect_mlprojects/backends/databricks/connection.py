"""The connection to a workspace, by the SDK's unified authentication."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prefect_mlprojects._support.secrets import reveal_all
from prefect_mlprojects.backends.databricks.config import NAME, DatabricksConfig
from prefect_mlprojects.backends.databricks.network import insist
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient

_CALL_SECONDS = 60
# `insist` tries again, and listens to the stop signal between two calls; the SDK's own waiting does not.
_RETRY_SECONDS = 1


def profile_of(tracking_uri: str) -> str | None:
    """Returns the profile that a ``databricks://profile`` tracking URI names; None for any other."""
    parts = urlsplit(tracking_uri)
    # MLflow: "databricks://scope:prefix" names a secret scope, which exists inside a workspace only.
    return parts.netloc.partition(":")[0] or None if parts.scheme in ("databricks", "databricks-uc") else None


def connect(config: DatabricksConfig, tracking_uri: str, stop: StopSignal | None = None) -> WorkspaceClient:
    """Returns a client of the workspace; with a token it has not asked anything yet.

    Raises:
        BackendError: There are no usable credentials.
    """
    import logging

    if isinstance(config.credentials, str):
        raise BackendError(
            f"The credentials block {config.credentials!r} was not resolved: it is when the run goes through run().",
            backend=NAME,
        )
    values: dict[str, Any] = {
        key: value for key, value in reveal_all(config.credentials or {}).items() if value is not None
    }
    if values and "auth_type" not in values:
        # The environment may hold other credentials; the SDK would refuse to choose.
        kind = "oauth-m2m" if values.get("client_secret") else "pat" if values.get("token") else None
        values |= {"auth_type": kind} if kind else {}
    profile = config.profile or profile_of(tracking_uri)
    if not values and profile:
        values["profile"] = profile
    logging.getLogger("databricks.sdk").setLevel(logging.ERROR)
    return insist(partial(_client, values), config.network_timeout, stop, "The Databricks workspace can't be used")


def _client(values: dict[str, Any]) -> WorkspaceClient:
    from importlib.metadata import version

    from databricks.sdk import WorkspaceClient
    from databricks.sdk.config import Config

    unknown = sorted(set(values) - {each.name for each in Config.attributes()})
    if unknown:
        raise BackendError(f"The Databricks credentials have an unknown field: {', '.join(unknown)}.", backend=NAME)
    return WorkspaceClient(
        config=Config(
            **values,
            http_timeout_seconds=_CALL_SECONDS,
            retry_timeout_seconds=_RETRY_SECONDS,
            product="prefect-mlprojects",
            product_version=version("prefect-mlprojects"),
        )
    )
