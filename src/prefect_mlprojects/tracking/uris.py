"""Where runs are tracked: MLflow's rules for the tracking URI, followed without importing MLflow."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from prefect_mlprojects._support.redaction import redact, strip_user_info
from prefect_mlprojects.exceptions import TrackingError
from prefect_mlprojects.tracking.base import TrackedRun

TRACKING_URI_VARIABLE = "MLFLOW_TRACKING_URI"
RUN_ID_VARIABLE = "MLFLOW_RUN_ID"
EXPERIMENT_ID_VARIABLE = "MLFLOW_EXPERIMENT_ID"
EXPERIMENT_NAME_VARIABLE = "MLFLOW_EXPERIMENT_NAME"

_SQLITE = re.compile(r"^(?P<scheme>sqlite(?:\+\w+)?):///(?P<path>[^?]*)(?P<query>\?.*)?$")


def resolve_tracking_uri(directory: Path | None = None) -> str:
    """Returns the tracking URI of this process, absolute, so that it means the same in every working directory.

    The order is MLflow's: what ``mlflow.set_tracking_uri`` set (when MLflow is imported), the variable
    ``MLFLOW_TRACKING_URI``, else ``mlruns`` in the working directory when it holds experiments already, else
    ``mlflow.db`` there.

    Args:
        directory: What relative paths are relative to; by default the working directory.
    """
    directory = Path.cwd() if directory is None else directory
    configured = _set_in_process() or os.environ.get(TRACKING_URI_VARIABLE)
    return absolute_tracking_uri(configured, directory) if configured else _default_tracking_uri(directory)


def short_lived_default() -> str:
    """Returns why the default store of this process is soon removed; empty if it stays, or if one is set.

    Prefect's process worker runs each flow run in a temporary folder, other workers in a container.
    """
    if _set_in_process() or os.environ.get(TRACKING_URI_VARIABLE):
        return ""
    if Path.cwd().resolve().is_relative_to(Path(tempfile.gettempdir()).resolve()):
        return "is in a temporary folder"
    if "KUBERNETES_SERVICE_HOST" in os.environ or any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))):
        return "is in a container"
    return ""


def absolute_tracking_uri(uri: str, directory: Path) -> str:
    """Makes the path in a tracking URI absolute; URIs without a relative path are returned as they are."""
    sqlite = _SQLITE.match(uri)
    if sqlite:
        path = sqlite["path"]
        if not path or path == ":memory:" or path.startswith(("/", "file:")):
            return uri
        return f"{sqlite['scheme']}:///{_absolute(_encoded(directory), path)}{sqlite['query'] or ''}"
    if uri in ("databricks", "databricks-uc", "uc"):
        return uri
    scheme, colon, rest = uri.partition(":")
    if not colon or "/" in scheme or len(scheme) == 1:
        return _absolute(directory, uri).as_uri()
    if scheme == "file" and not rest.startswith("/"):
        return _absolute(directory, unquote(rest)).as_uri()
    return uri


def sqlite_path(uri: str) -> Path | None:
    """Returns the file of a SQLite tracking URI as SQLAlchemy reads it; None for any other URI and for one in memory.

    Args:
        uri: An absolute tracking URI.
    """
    if not _SQLITE.match(uri):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" and not database.startswith("file:") else None


def is_on_this_machine(uri: str) -> bool:
    """Returns whether a URI means something only on this machine: a file, a SQLite database, a loopback address.

    Args:
        uri: An absolute URI.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0].lower()
    if scheme in ("file", "sqlite") or uri.startswith("/"):
        return True
    host = (parts.hostname or "").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def sqlite_uri(path: Path) -> str:
    """Returns the tracking URI of a SQLite file."""
    return f"sqlite:///{_encoded(path.absolute())}"


def run_page(uri: str, experiment_id: str, run_id: str) -> tuple[str | None, str | None]:
    """Returns where people can see a run: a link, or else what to do.

    Args:
        uri: The absolute tracking URI.
        experiment_id: The experiment's id.
        run_id: The run's id.

    Returns:
        The link of the run's page when the store is an MLflow server, and a command to start MLflow's UI when it is
        a database or a folder; both are None for stores of other kinds.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        page = f"{strip_user_info(uri).rstrip('/')}/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"
        workspace = os.environ.get("MLFLOW_WORKSPACE")
        return (f"{page}?workspace={quote(workspace, safe='')}" if workspace else page), None
    if scheme in ("sqlite", "file", "postgresql", "mysql", "mssql"):
        return None, f"mlflow ui --backend-store-uri '{redact(uri)}'"
    return None, None


def active_run_id() -> str | None:
    """Returns the MLflow run that this thread's code is part of, without importing MLflow.

    That is the run that ``mlflow.start_run()`` began in this thread, else the run that this process was started for
    (the variable ``MLFLOW_RUN_ID``), as long as that run's store is the one in use: a project that runs another project
    is its parent.
    """
    fluent = _imported("mlflow.tracking.fluent")
    run = fluent.active_run() if fluent is not None else None
    if run is not None:
        return str(run.info.run_id)
    run_id = os.environ.get(RUN_ID_VARIABLE)
    store = os.environ.get(TRACKING_URI_VARIABLE)
    if not run_id or not store:
        return None
    return run_id if absolute_tracking_uri(store, Path.cwd()) == resolve_tracking_uri() else None


def active_experiment_id() -> str | None:
    """Returns the experiment that ``mlflow.set_experiment()`` chose in this process, without importing MLflow."""
    fluent = _imported("mlflow.tracking.fluent")
    chosen = getattr(fluent, "_active_experiment_id", None)
    return None if chosen is None else str(chosen)


def _set_in_process() -> str | None:
    utils = _imported("mlflow.tracking._tracking_service.utils")
    if utils is None or not utils.is_tracking_uri_set():
        return None
    return str(utils.get_tracking_uri())


def _imported(name: str) -> ModuleType | None:
    """A module of MLflow if it is there and whole: another thread may be importing it at this moment."""
    module = sys.modules.get(name)
    if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    return module


def _default_tracking_uri(directory: Path) -> str:
    """MLflow's rule: ``mlflow.tracking._tracking_service.utils._get_default_tracking_uri``."""
    runs = directory / "mlruns"
    if _holds_experiments(runs):
        return runs.absolute().as_uri()
    return sqlite_uri(directory / "mlflow.db")


def _holds_experiments(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(
                entry.is_dir() and entry.name.isdigit() and os.path.lexists(Path(entry.path) / "meta.yaml")
                for entry in entries
            )
    except OSError:
        return False


def _encoded(path: Path) -> Path:
    text = str(path)
    if "%" not in text and "?" not in text:
        return path
    from importlib.metadata import version

    # SQLAlchemy 2.1 decodes the path of a URL, 2.0 takes it as it is.
    major, minor = version("sqlalchemy").split(".")[:2]
    return Path(text.replace("%", "%25").replace("?", "%3F")) if (int(major), int(minor)) >= (2, 1) else path


def _absolute(directory: Path, path: str) -> Path:
    # abspath, as MLflow: ".." is taken off the text.
    return Path(os.path.abspath(directory / path))  # noqa: PTH100


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
