from __future__ import annotations

import json
import pickle
from pathlib import Path

from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import TrackedRun, TrackingRequest
from prefect_mlprojects.tracking.stores import UnreachableError
from prefect_mlprojects.tracking.tracker_process import (
    error_from_json,
    error_to_json,
    request_from_json,
    request_to_json,
)

COPY = WorkingCopy(directory=Path("/p"), uri="/p", kind="local", source_name="file:///p", commit="c" * 40, dirty=True)


def test_a_request_survives_the_wire() -> None:
    request = TrackingRequest(
        tracking_uri="http://me:pw@host",
        working_copy=COPY,
        entry_point="main",
        parameters={"a": "1", "odd\udcff": "\u2028\n"},
        run_name="name",
        tags={"t": "v"},
    )

    assert request_from_json(json.loads(json.dumps(request_to_json(request)))) == request


def test_errors_keep_their_type_and_facts() -> None:
    for error in (TrackingError("m", tracking_uri="u"), UnreachableError("m", tracking_uri="u")):
        copy = error_from_json(json.loads(json.dumps(error_to_json(error, "other"))))
        assert type(copy) is type(error)
        assert (copy.message, copy.tracking_uri) == ("m", "u")
        assert type(pickle.loads(pickle.dumps(error))) is type(error)


def test_any_other_error_becomes_a_tracking_error() -> None:
    copy = error_from_json(error_to_json(KeyError("x"), "u"))

    assert type(copy) is TrackingError
    assert copy.message == "KeyError: 'x'"
    assert copy.tracking_uri == "u"


def test_passwords_do_not_show_in_a_repr() -> None:
    request = TrackingRequest(tracking_uri="http://me:hunter2@host", working_copy=COPY, entry_point="main")
    run = TrackedRun(run_id="r", experiment_id="0", tracking_uri="http://me:hunter2@host")

    assert "hunter2" not in repr(request) + repr(run)
    assert run.masked_tracking_uri == "http://me:***@host"
