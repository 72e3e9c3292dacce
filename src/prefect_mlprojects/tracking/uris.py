"""Where runs are tracked: MLflow's rules for the tracking URI, followed without importing MLflow."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

from prefect_mlprojects._support.redaction import redact_url, strip_user_info
from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.tracking._mlflow_internals import run_in_use, tracking_uri_in_use

TRACKING_URI_VARIABLE = "MLFLOW_TRACKING_URI"
RUN_ID_VARIABLE = "MLFLOW_RUN_ID"
EXPERIMENT_ID_VARIABLE = "MLFLOW_EXPERIMENT_ID"
EXPERIMENT_NAME_VARIABLE = "MLFLOW_EXPERIMENT_NAME"

UI_HOST, UI_PORT = "127.0.0.1", 5000
"""Where ``mlprojects ui`` serves MLflow's UI unless told otherwise; links to runs in stores without a server lead there."""

_SQLITE = re.compile(r"^(?P<scheme>sqlite(?:\+\w+)?):///(?P<path>[^?]*)(?P<query>\?.*)?$")


def resolve_tracking_uri(directory: Path | None = None) -> Secret:
    """Returns the tracking URI of this process, absolute, so that it means the same in every working directory.

    The order is MLflow's: ``mlflow.set_tracking_uri`` (if MLflow is imported), the variable ``MLFLOW_TRACKING_URI``,
    ``mlruns`` in `directory` (default: the working directory) if it holds experiments, else ``mlflow.db`` there.
    """
    directory = Path.cwd() if directory is None else directory
    configured = _configured_uri()
    return Secret(absolute_tracking_uri(configured, directory) if configured else _default_tracking_uri(directory))


def _configured_uri() -> str | None:
    return tracking_uri_in_use() or os.environ.get(TRACKING_URI_VARIABLE)


def display_uri(uri: Secret) -> str:
    """Returns the tracking URI with its secrets redacted, for messages and records."""
    return redact_url(reveal(uri))


def short_lived_default() -> str:
    """Returns why the default store of this process is soon removed; empty if it stays, or if one is set.

    Prefect's process worker runs each flow run in a temporary folder, other workers in a container.
    """
    if _configured_uri():
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


def scheme_of(uri: str) -> str:
    """Returns the scheme without a driver's name: ``postgresql`` for ``postgresql+psycopg://…``."""
    return split_url(uri).scheme.partition("+")[0]


def sqlite_path(uri: str) -> Path | None:
    """Returns the file of an absolute SQLite URI as SQLAlchemy reads it; None for other URIs and databases in memory."""
    if not _SQLITE.match(uri):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" and not database.startswith("file:") else None


def is_on_this_machine(uri: str) -> bool:
    """Returns whether an absolute URI is valid on this machine only: a file, a SQLite database, a loopback address."""
    if scheme_of(uri).lower() in ("file", "sqlite") or uri.startswith("/"):
        return True
    host = (split_url(uri).hostname or "").lower()
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


def run_page(tracking_uri: Secret, experiment_id: str, run_id: str) -> tuple[str | None, str | None]:
    """Returns the link of a run's page, and the command that starts MLflow's UI there if no MLflow server does.

    Both are None for Databricks and stores of plugins.
    """
    uri = reveal(tracking_uri)
    page = f"/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"
    scheme = scheme_of(uri)
    if scheme in ("http", "https"):
        workspace = os.environ.get("MLFLOW_WORKSPACE")
        query = f"?workspace={quote(workspace, safe='')}" if workspace else ""
        return strip_user_info(uri).rstrip("/") + page + query, None
    if scheme in ("sqlite", "file", "postgresql", "mysql", "mssql"):
        chosen = "" if reveal(resolve_tracking_uri()) == uri else f"MLFLOW_TRACKING_URI='{redact_url(uri)}' "
        return f"http://{UI_HOST}:{UI_PORT}{page}", f"{chosen}mlprojects ui"
    return None, None


def ui_command_line() -> list[str]:
    """Returns the command that starts MLflow's UI: MLflow's own, or uv's where only mlflow-skinny is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("mlflow")
    except PackageNotFoundError:
        from uv import find_uv_bin

        return [find_uv_bin(), "tool", "run", "--from", f"mlflow=={version('mlflow-skinny')}", "mlflow", "ui"]
    return [sys.executable, "-m", "mlflow", "ui"]


def active_run_id() -> str | None:
    """Returns the MLflow run that this thread's code is part of, without importing MLflow.

    That is the run that ``mlflow.start_run()`` began in this thread, else the one that this process was started for
    (``MLFLOW_RUN_ID``) if its store is the one in use: a project that runs another project is its parent.
    """
    run_id, store = os.environ.get(RUN_ID_VARIABLE), os.environ.get(TRACKING_URI_VARIABLE)
    active = run_in_use()
    if active is not None or not run_id or not store:
        return active
    return run_id if absolute_tracking_uri(store, Path.cwd()) == reveal(resolve_tracking_uri()) else None


def _default_tracking_uri(directory: Path) -> str:
    """MLflow's rule: ``mlflow.tracking._tracking_service.utils._get_default_tracking_uri``."""
    runs = directory / "mlruns"
    return runs.absolute().as_uri() if _holds_experiments(runs) else sqlite_uri(directory / "mlflow.db")


def _holds_experiments(folder: Path) -> bool:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(
            entry.is_dir() and entry.name.isdigit() and os.path.lexists(Path(entry.path) / "meta.yaml")
            for entry in entries
        )
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
    # abspath, as MLflow does: it removes ".." from the text, whatever symlinks say.
    return Path(os.path.abspath(directory / path))  # noqa: PTH100
