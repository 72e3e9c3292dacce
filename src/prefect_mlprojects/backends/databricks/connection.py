"""The connection to a workspace, by the SDK's unified authentication."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prefect_mlprojects.backends.databricks.config import NAME, DatabricksConfig
from prefect_mlprojects.exceptions import BackendError

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient

_CALL_SECONDS = 60
_RETRY_SECONDS = 120


def profile_of(tracking_uri: str) -> str | None:
    """Returns the profile that a ``databricks://profile`` tracking URI names; None for any other.

    Args:
        tracking_uri: The tracking URI.
    """
    parts = urlsplit(tracking_uri)
    # MLflow: "databricks://scope:prefix" names a secret scope, which exists inside a workspace only.
    return parts.netloc.partition(":")[0] or None if parts.scheme in ("databricks", "databricks-uc") else None


def connect(config: DatabricksConfig, tracking_uri: str) -> WorkspaceClient:
    """Returns a client of the workspace; it has not been asked anything yet.

    Args:
        config: The configuration; its credentials win, then its profile, then the tracking URI's, then the environment.
        tracking_uri: The tracking URI.

    Raises:
        BackendError: There are no usable credentials.
    """
    import logging

    from databricks.sdk import WorkspaceClient
    from databricks.sdk.config import Config

    if isinstance(config.credentials, str):
        raise BackendError(
            f"The credentials block {config.credentials!r} was not resolved: it is when the run goes through run().",
            backend=NAME,
        )
    values: dict[str, Any] = {key: value for key, value in (config.credentials or {}).items() if value is not None}
    unknown = sorted(set(values) - {each.name for each in Config.attributes()})
    if unknown:
        raise BackendError(f"The Databricks credentials have an unknown field: {', '.join(unknown)}.", backend=NAME)
    if values and "auth_type" not in values:
        # The environment may hold other credentials; the SDK would refuse to choose.
        kind = "oauth-m2m" if values.get("client_secret") else "pat" if values.get("token") else None
        values |= {"auth_type": kind} if kind else {}
    profile = config.profile or profile_of(tracking_uri)
    if not values and profile:
        values["profile"] = profile
    logging.getLogger("databricks.sdk").setLevel(logging.ERROR)
    try:
        return WorkspaceClient(
            config=Config(
                **values,
                http_timeout_seconds=_CALL_SECONDS,
                retry_timeout_seconds=_RETRY_SECONDS,
                product="prefect-mlprojects",
                product_version="0.1.0",
            )
        )
    except Exception as error:  # noqa: BLE001 - the SDK raises many kinds
        raise refused("The Databricks workspace can't be used", error) from None


def refused(what: str, error: BaseException) -> BackendError:
    """Returns the error of a call that the workspace refused, with what to do.

    Args:
        what: What could not be done.
        error: What the SDK raised.
    """
    kind = type(error).__name__
    advice = {
        "Unauthenticated": "The token is wrong or has expired: put a new one into the block, profile or DATABRICKS_TOKEN.",
        "PermissionDenied": "Give the user or service principal the permission that the message names.",
        "ValueError": "Name credentials: a databricks-workspace block, a profile, or DATABRICKS_HOST and DATABRICKS_TOKEN.",
        "NotFound": "Check the ids and paths in the backend configuration.",
    }.get(kind, "")
    text = str(error).partition(". Config:")[0].strip() or kind
    return BackendError(f"{what}: {text.rstrip('.')}. {advice}".rstrip(), backend=NAME)
