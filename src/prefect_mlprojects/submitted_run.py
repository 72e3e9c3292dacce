"""The handles of runs, where users of `mlflow.projects.submitted_run` look for them."""

from prefect_mlprojects.runs.handles import LocalSubmittedRun, SubmittedRun

__all__ = ["LocalSubmittedRun", "SubmittedRun"]
