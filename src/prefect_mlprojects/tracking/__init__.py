"""MLflow runs: stores, tags and parameters, final status, and the child's variables."""

from prefect_mlprojects.tracking._mlflow_internals import active_experiment_id
from prefect_mlprojects.tracking.metrics import main_metric
from prefect_mlprojects.tracking.process_tracker import ProcessTracker
from prefect_mlprojects.tracking.records import FinalStatus, TrackedRun, TrackingRequest, child_variables, failure_tags
from prefect_mlprojects.tracking.tracker import Tracker
from prefect_mlprojects.tracking.uris import active_run_id, display_uri, resolve_tracking_uri

__all__ = [
    "FinalStatus",
    "ProcessTracker",
    "TrackedRun",
    "Tracker",
    "TrackingRequest",
    "active_experiment_id",
    "active_run_id",
    "child_variables",
    "display_uri",
    "failure_tags",
    "main_metric",
    "resolve_tracking_uri",
]
