"""The connection to a workspace, by the SDK's unified authentication."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import reveal_all
from prefect_mlprojects.backends.databricks.config import NAME, DatabricksConfig
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


_Answer = TypeVar("_Answer")
_GROWTH = 1.5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
_BAD_GATEWAY = ("502", "bad gateway", "BAD_GATEWAY")

_ADVICE = MappingProxyType(
    {
        "Unauthenticated": "The token is wrong or has expired: put a new one into the block, profile or DATABRICKS_TOKEN.",
        "PermissionDenied": "Give the user or service principal the permission that the message names.",
        "ValueError": "Name credentials: a databricks-workspace block, a profile, or DATABRICKS_HOST and DATABRICKS_TOKEN.",
        "NotFound": "Check the ids and paths in the backend configuration.",
        "ResourceDoesNotExist": "Check the ids and paths in the backend configuration.",
        "TimeoutError": "The workspace was out of reach: check the host and the network, or raise network-timeout.",
    }
)


def is_passing(error: BaseException) -> bool:
    """Whether an error of a call goes away by itself: a rate limit, a server's error, a lost connection."""
    import requests
    from databricks.sdk import errors
    from databricks.sdk.core import DatabricksError

    passing = (
        errors.TooManyRequests,
        errors.InternalError,
        errors.TemporarilyUnavailable,
        errors.DeadlineExceeded,
        requests.exceptions.RequestException,
        ConnectionError,
        TimeoutError,
    )
    if isinstance(error, passing):
        return True
    # The SDK knows no class for a gateway's errors.
    return type(error) is DatabricksError and any(
        sign in f"{error.error_code} {error}".lower() for sign in map(str.lower, _BAD_GATEWAY)
    )


def insist(call: Callable[[], _Answer], seconds: float, stop: StopSignal | None, what: str) -> _Answer:
    """Makes an idempotent call, again and again while what goes wrong goes away by itself.

    Args:
        call: The call.
        seconds: For how long; one call is made in any case.
        stop: Gives up when requested; None for a call that must be made although it is.
        what: What could not be done, for the message.

    Raises:
        BackendError: The workspace refused it, or was out of reach for too long.
    """
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            return call()
        except BackendError:
            raise
        except Exception as error:  # noqa: BLE001 - what passes is told apart below
            if not is_passing(error) or time.monotonic() + pause > deadline or (stop is not None and stop.requested):
                raise refused(what, error) from None
        if stop is None:
            time.sleep(pause)
        else:
            stop.wait(pause)
        pause = min(pause * _GROWTH, _LONGEST_PAUSE)


def refused(what: str, error: BaseException) -> BackendError:
    """Returns the error of a call that the workspace refused, with what to do."""
    advice = _ADVICE.get(type(error).__name__, "")
    if "invalid_client" in str(error):
        advice = "The service principal's client_id and client_secret do not fit: make a new secret for it."
    if isinstance(error, TimeoutError) and error.__cause__ is not None:
        # What the SDK itself tried again; its own words say only how long.
        error = error.__cause__
    # The SDK adds its configuration, with the names of files and variables.
    text = redact(str(error).partition(". Config:")[0].strip()) or type(error).__name__
    return BackendError(f"{what}: {text.rstrip('.')}. {advice}".rstrip(), backend=NAME)
