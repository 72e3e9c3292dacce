"""What a tracker and its companion process say to each other: one JSON object a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.tracking.base import TrackingRequest
from prefect_mlprojects.tracking.failures import UnreachableError

_ERRORS: Mapping[str, type[TrackingError]] = {"failed": TrackingError, "unreachable": UnreachableError}


def request_to_json(request: TrackingRequest) -> dict[str, Any]:
    """Returns a request as plain JSON."""
    fields = asdict(request)
    fields["working_copy"]["directory"] = str(request.working_copy.directory)
    return fields


def request_from_json(fields: Mapping[str, Any]) -> TrackingRequest:
    """Returns the request that ``request_to_json`` made plain."""
    copy = dict(fields["working_copy"])
    copy["directory"] = Path(copy["directory"])
    return TrackingRequest(**{**fields, "working_copy": WorkingCopy(**copy)})


def error_to_json(error: BaseException, masked_uri: str) -> dict[str, str]:
    """Returns an error as plain JSON.

    Args:
        error: The error; one that is no ``TrackingError`` becomes one.
        masked_uri: The tracking URI, passwords masked, for an error that names none.
    """
    if isinstance(error, TrackingError):
        kind = "unreachable" if isinstance(error, UnreachableError) else "failed"
        return {"kind": kind, "message": error.message, "tracking_uri": error.tracking_uri}
    return {"kind": "failed", "message": f"{type(error).__name__}: {error}", "tracking_uri": masked_uri}


def error_from_json(fields: Mapping[str, str]) -> TrackingError:
    """Returns the error that ``error_to_json`` made plain."""
    return _ERRORS[fields["kind"]](fields["message"], tracking_uri=fields["tracking_uri"])
