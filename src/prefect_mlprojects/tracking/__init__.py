"""MLflow runs: stores, tags and parameters, final status, and the child's variables."""

from prefect_mlprojects.tracking.base import FinalStatus, TrackedRun, Tracker, TrackingRequest
from prefect_mlprojects.tracking.in_process import InProcessTracker
from prefect_mlprojects.tracking.process_tracker import ProcessTracker
from prefect_mlprojects.tracking.tags import failure_tags
from prefect_mlprojects.tracking.uris import active_experiment_id, active_run_id, child_variables, resolve_tracking_uri

__all__ = [
    "FinalStatus",
    "InProcessTracker",
    "ProcessTracker",
    "TrackedRun",
    "Tracker",
    "TrackingRequest",
    "active_experiment_id",
    "active_run_id",
    "child_variables",
    "failure_tags",
    "resolve_tracking_uri",
]
