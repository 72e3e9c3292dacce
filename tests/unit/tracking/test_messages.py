from __future__ import annotations

import json
import pickle
from pathlib import Path

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import TrackedRun, TrackingRequest, display_uri
from prefect_mlprojects.tracking.process_tracker import from_json, to_json
from prefect_mlprojects.tracking.stores import UnreachableError

COPY = WorkingCopy(directory=Path("/p"), uri="/p", kind="local", source_name="file:///p", commit="c" * 40, dirty=True)


def test_to_json_request_round_trips() -> None:
    request = TrackingRequest(
        tracking_uri=Secret("http://me:pw@host"),
        working_copy=COPY,
        entry_point="main",
        parameters={"a": "1", "odd\udcff": "\u2028\n"},
        run_name="name",
    )

    assert from_json(json.loads(json.dumps(to_json(request)))) == request


def test_to_json_tracking_errors_keep_type_and_attributes() -> None:
    for error in (TrackingError("m", tracking_uri="u"), UnreachableError("m", tracking_uri="u")):
        copy = from_json(json.loads(json.dumps(to_json(error))))
        assert type(copy) is type(error)
        assert (copy.message, copy.tracking_uri) == ("m", "u")
        assert type(pickle.loads(pickle.dumps(error))) is type(error)


def test_to_json_other_error_becomes_tracking_error() -> None:
    copy = from_json(json.loads(json.dumps(to_json(KeyError("x")))))

    assert type(copy) is TrackingError
    assert copy.message == "KeyError: 'x'"
    assert copy.tracking_uri == ""


def test_repr_of_request_and_run_hides_passwords() -> None:
    request = TrackingRequest(tracking_uri=Secret("http://me:hunter2@host"), working_copy=COPY, entry_point="main")
    run = TrackedRun(run_id="r", experiment_id="0", tracking_uri=Secret("http://me:hunter2@host"))

    assert "hunter2" not in repr(request) + repr(run)
    assert display_uri(run.tracking_uri) == "http://me:***@host"
