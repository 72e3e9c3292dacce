"""Why a store failed, in words: from any exception of MLflow or its drivers to a ``TrackingError``."""

from __future__ import annotations

import re

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import TrackingError

_ADVICE: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"database is locked", re.IGNORECASE),
        "Another process kept the database locked for long; run again, or use an MLflow server for many runs at once.",
    ),
    (
        re.compile(r"disk is full|No space left|disk I/O error", re.IGNORECASE),
        "Free some space on the disk that holds the database.",
    ),
    (
        re.compile(r"readonly database|unable to open database file|Permission denied|Read-only file", re.IGNORECASE),
        "Make the file and its folder writable, or set MLFLOW_TRACKING_URI to another place.",
    ),
    (
        re.compile(r"file is not a database|malformed|file is encrypted", re.IGNORECASE),
        "The file is damaged or no MLflow database: restore or move it, or set MLFLOW_TRACKING_URI to another place.",
    ),
    (
        re.compile(r"Can't locate revision", re.IGNORECASE),
        "The database was made by a newer MLflow than the one installed here; upgrade MLflow here.",
    ),
    (
        re.compile(r"No module named '(?:psycopg2|MySQLdb|pymysql|pyodbc)", re.IGNORECASE),
        "Install the database's driver in this environment.",
    ),
    (
        re.compile(r"\b(?:401|403)\b|UNAUTHENTICATED|PERMISSION_DENIED", re.IGNORECASE),
        "Give the server's credentials in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
        "or in MLFLOW_TRACKING_TOKEN.",
    ),
)

_ROLLED_BACK = re.compile(r"database is locked|deadlock", re.IGNORECASE)
_BROKEN_OFF = re.compile(r"server closed the connection|connection (?:reset|refused|timed out)", re.IGNORECASE)

# How mlflow/utils/rest_utils.py says that it got no answer, after all its retries.
_NETWORK_FAILURE = re.compile(
    r"API request to \S+ failed with (?:timeout )?exception (?!.*too many \d+ error)", re.DOTALL
)

_NETWORK_REASONS = (
    "Connection refused",
    "Name or service not known",
    "Temporary failure in name resolution",
    "No route to host",
    "Network is unreachable",
    "Connection reset by peer",
    "certificate verify failed",
    "timed out",
)

# What SQLAlchemy adds to a driver's message: how it came to the statement, the statement with its values, a link.
_SQLALCHEMY_NOTES = re.compile(
    r"\(raised as a result of Query-invoked autoflush;[^)]*\)\s*|\s*(?:\[SQL: |\(Background on this error).*", re.DOTALL
)


class UnreachableError(TrackingError):
    """The store did not answer at all, so asking again later may help."""


def tracking_error(error: BaseException, uri: str, what: str) -> TrackingError:
    """Says in one error what failed, at which store, why, and what to do.

    Args:
        error: What MLflow, SQLAlchemy or the system raised.
        uri: The tracking URI.
        what: What was being done, after "could not": ``"create the run"``.
    """
    if isinstance(error, TrackingError):
        return error
    if _NETWORK_FAILURE.search(str(error)):
        return unreachable(uri, str(error))
    shown = redact(uri)
    reason = _reason(error)
    advice = next((text for pattern, text in _ADVICE if pattern.search(reason)), "")
    message = f"MLflow could not {what} at {shown}: {reason}" + (f" {advice}" if advice else "")
    return TrackingError(message, tracking_uri=shown)


def did_nothing(error: TrackingError) -> bool:
    """Tells whether a call certainly changed nothing and may succeed in a moment: another one was in its way."""
    return _ROLLED_BACK.search(str(error)) is not None


def may_pass(error: TrackingError) -> bool:
    """Tells whether a call may succeed in a moment, although it may have been done this time."""
    return isinstance(error, UnreachableError) or _BROKEN_OFF.search(str(error)) is not None


def unreachable(uri: str, reason: str) -> UnreachableError:
    """Makes the error for a store that does not answer."""
    shown = redact(uri)
    reason = next((known for known in _NETWORK_REASONS if known.lower() in reason.lower()), redact(reason))
    return UnreachableError(
        f"The MLflow tracking store {shown} can't be reached: {reason}. "
        "Start it, or set MLFLOW_TRACKING_URI to another.",
        tracking_uri=shown,
    )


def _reason(error: BaseException) -> str:
    text = " ".join(_SQLALCHEMY_NOTES.sub("", redact(str(error))).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
