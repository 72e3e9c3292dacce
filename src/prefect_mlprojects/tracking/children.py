"""What a project's own process must know of its MLflow run."""

from __future__ import annotations

from typing import Any

from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.tracking.base import TrackedRun
from prefect_mlprojects.tracking.uris import EXPERIMENT_ID_VARIABLE, RUN_ID_VARIABLE, TRACKING_URI_VARIABLE


def child_variables(run: TrackedRun) -> dict[str, str]:
    """Returns the variables with which MLflow in the project's process finds the run, as ``mlflow run`` sets them.

    For a Databricks store that includes the credentials of the profile in use, so the values may be secret.

    Raises:
        TrackingError: The credentials of a Databricks store can't be found or handed on.
    """
    variables = {
        RUN_ID_VARIABLE: run.run_id,
        TRACKING_URI_VARIABLE: run.tracking_uri,
        EXPERIMENT_ID_VARIABLE: run.experiment_id,
    }
    if run.tracking_uri.partition(":")[0] == "databricks":
        from mlflow.exceptions import MlflowException
        from mlflow.utils import databricks_utils

        credentials_of: Any = databricks_utils.get_databricks_env_vars
        try:
            variables |= credentials_of(run.tracking_uri)
        except MlflowException as error:
            raise TrackingError(str(error), tracking_uri=run.masked_tracking_uri) from None
    return variables
