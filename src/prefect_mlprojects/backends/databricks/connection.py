"""The connection to a workspace, by the SDK's unified authentication."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.retry import Backoff
from prefect_mlprojects._support.secrets import reveal_all
from prefect_mlprojects.backends.databricks.config import NAME, DatabricksConfig
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient


_CALL_SECONDS = 60
# `insist` retries instead, since the SDK's own retries ignore the stop signal.
_RETRY_SECONDS = 1


def profile_of(tracking_uri: str) -> str | None:
    """Returns the profile that a ``databricks://profile`` tracking URI names; None for any other."""
    parts = urlsplit(tracking_uri)
    # MLflow: "databricks://scope:prefix" names a secret scope, which exists inside a workspace only.
    return parts.netloc.partition(":")[0] or None if parts.scheme in ("databricks", "databricks-uc") else None


def connect(config: DatabricksConfig, tracking_uri: str, stop: StopSignal | None = None) -> WorkspaceClient:
    """Returns a client of the workspace; with a token it sends no request yet.

    Raises:
        BackendError: No usable credentials were found.
    """
    import logging

    if isinstance(config.credentials, str):
        raise BackendError(
            f"The credentials block {config.credentials!r} was not resolved. Blocks are resolved by run() and by deployments.",
            backend=NAME,
        )
    values: dict[str, Any] = {
        key: value for key, value in reveal_all(config.credentials or {}).items() if value is not None
    }
    if values and "auth_type" not in values:
        # The environment may hold other credentials, and the SDK refuses several methods at once.
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
_BAD_GATEWAY = ("502", "bad gateway", "BAD_GATEWAY")

_ADVICE = MappingProxyType(
    {
        "Unauthenticated": "The token is wrong or has expired: put a new one into the block, profile or DATABRICKS_TOKEN.",
        "PermissionDenied": "Give the user or service principal the permission that the message names.",
        "ValueError": "Name credentials: a databricks-workspace block, a profile, or DATABRICKS_HOST and DATABRICKS_TOKEN.",
        "NotFound": "Check the ids and paths in the backend configuration.",
        "ResourceDoesNotExist": "Check the ids and paths in the backend configuration.",
        "TimeoutError": "The workspace could not be reached: check the host and the network, or raise network-timeout.",
    }
)


def is_transient(error: BaseException) -> bool:
    """Returns whether an error is transient: a rate limit, a server error, a lost connection."""
    import requests
    from databricks.sdk import errors
    from databricks.sdk.core import DatabricksError

    transient = (
        errors.TooManyRequests,
        errors.InternalError,
        errors.TemporarilyUnavailable,
        errors.DeadlineExceeded,
        requests.exceptions.RequestException,
        ConnectionError,
        TimeoutError,
    )
    if isinstance(error, transient):
        return True
    # The SDK has no class for a gateway's errors.
    return type(error) is DatabricksError and any(
        sign in f"{error.error_code} {error}".lower() for sign in map(str.lower, _BAD_GATEWAY)
    )


def insist(call: Callable[[], _Answer], seconds: float, stop: StopSignal | None, what: str) -> _Answer:
    """Returns the result of an idempotent call, which it retries for `seconds` on transient errors.

    Args:
        call: The call.
        seconds: The time limit of retries; 0 for a single call.
        stop: Ends the retries; None for a call that must outlast a stop request.
        what: The failed operation, for the message.

    Raises:
        BackendError: The workspace refused it, or was unreachable for too long.
    """
    deadline, backoff, waiter = time.monotonic() + seconds, Backoff(0.5, 20), stop or StopSignal()
    while True:
        try:
            return call()
        except BackendError:
            raise
        except Exception as error:  # noqa: BLE001 - classified below
            pause = backoff.next()
            if not is_transient(error) or time.monotonic() + pause > deadline or waiter.requested:
                raise refused(what, error) from None
        waiter.wait(pause)


def refused(what: str, error: BaseException) -> BackendError:
    """Returns the error of a failed call, with advice."""
    advice = _ADVICE.get(type(error).__name__, "")
    if "invalid_client" in str(error):
        advice = (
            "Authentication failed for the service principal: its client_secret is wrong or expired. Create a new one in the "
            "account console."
        )
    if isinstance(error, TimeoutError) and error.__cause__ is not None:
        # The error that the SDK retried; its own message names only the time.
        error = error.__cause__
    # The SDK appends its configuration, with names of files and variables.
    text = redact(str(error).partition(". Config:")[0].strip()) or type(error).__name__
    return BackendError(f"{what}: {text.rstrip('.')}. {advice}".rstrip(), backend=NAME)
