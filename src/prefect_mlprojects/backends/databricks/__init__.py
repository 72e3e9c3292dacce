"""Runs projects as one-time runs of a Databricks workspace."""

from functools import partial

from prefect_mlprojects.exceptions import BackendError, BackendUnavailableError

NAME = "databricks"
failure = partial(BackendError, backend=NAME)
unavailable = partial(BackendUnavailableError, backend=NAME)
