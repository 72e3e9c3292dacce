"""Calls of the workspace: made again while what goes wrong goes away by itself, and explained when they are refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MappingProxyType
from typing import TypeVar

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.backends.databricks.config import NAME
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

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
