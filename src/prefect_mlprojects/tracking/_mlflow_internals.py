"""The private and semi-private parts of MLflow that this package relies on; `test_mlflow_internals` has a test for each.

Runs are kept with MLflow's ``AbstractStore``: its client reads a run back before each change, and prints to stdout when
it ends one. MLflow is imported inside the functions, since its import takes seconds.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Container, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, cast

from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.types import RunStatus

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run

# Limits from mlflow/utils/validation.py, 3.7 to 3.17.
MAX_KEY_LENGTH: Final = 250
MAX_PARAMETER_LENGTH: Final = 6000
MAX_TAG_LENGTH: Final = 8000
MAX_BATCH_ENTRIES: Final = 100
# A request may have a million bytes; the other half is room for the frame around the entries.
MAX_BATCH_BYTES: Final = 500_000

# Without the limits MLflow retries a server that is down for minutes.
HTTP_LIMITS: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
NO_TELEMETRY: Final = {"MLFLOW_DISABLE_TELEMETRY": "true"}

# Loggers whose records during our calls are of no interest, or repeat the error that we raise.
NOISY_LOGGERS: Final = (
    "mlflow.store.db.utils",
    "alembic.runtime.migration",
    "alembic.runtime.plugins",
    "urllib3.connectionpool",
)
# How mlflow/utils/rest_utils.py says that it got no answer, after all its retries.
NETWORK_FAILURE: Final = re.compile(
    r"(?s)API request to \S+ failed with (?:timeout )?exception (?!.*too many \d+ error)"
)
# Error codes of stores for an unknown ID; the second for IDs of the wrong form.
_NOT_FOUND: Final = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")

# mlflow-skinny works without these, and where they are installed they take more than half of the time of its import.
_OPTIONAL_IMPORTS: Final = ("pandas", "numpy", "scipy", "sklearn", "pyarrow")
_BUILT_IN_SCHEMES: Final = ("", "file", "http", "https", "sqlite", "postgresql", "mysql", "mssql")


class MlflowStore:
    """One of MLflow's tracking stores, from MLflow's registry, which keeps one per URI.

    Every method raises what MLflow and its drivers raise.
    """

    def __init__(self, uri: str) -> None:
        from mlflow.tracking._tracking_service import utils

        get_store: Any = utils._get_store
        self._uri = uri
        self._store = get_store(uri)

    def create_run(
        self, experiment_id: str, user: str, start_time: int, tags: Mapping[str, str], name: str | None
    ) -> Run:
        """Creates a run in one transaction with its tags; `start_time` in milliseconds since 1970."""
        from mlflow import entities

        run_tags = [entities.RunTag(*entry) for entry in tags.items()]
        run = self._store.create_run(experiment_id, user, start_time=start_time, tags=run_tags, run_name=name)
        return cast("Run", run)

    def get_run(self, run_id: str) -> Run | None:
        """Returns a run, deleted ones too; None if no such ID exists."""
        return cast("Run | None", _unless(_NOT_FOUND, self._store.get_run, run_id))

    def set_status(self, run_id: str, status: RunStatus, end_time: int | None, name: str | None = None) -> None:
        """Sets a run's status and end time (milliseconds since 1970), and its name unless that is None."""
        from mlflow import entities

        self._store.update_run_info(run_id, getattr(entities.RunStatus, status), end_time=end_time, run_name=name)

    def running_below(self, run_id: str) -> list[str]:
        """Returns the IDs of the RUNNING runs that are nested in a run, at any depth, whatever their experiments."""
        from mlflow.entities import ViewType
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        experiments = [each.experiment_id for each in self._store.search_experiments(max_results=1000)]
        found: list[str] = []
        parents = [run_id]
        while parents:
            wanted = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parents.pop()}'"
            runs = self._store.search_runs(experiments, wanted, ViewType.ACTIVE_ONLY, max_results=1000)
            parents += [run.info.run_id for run in runs]
            found += [run.info.run_id for run in runs if run.info.status == "RUNNING"]
        return found

    def log(self, run_id: str, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Logs parameters, then tags, in requests that MLflow accepts."""
        from mlflow import entities

        for batch in batches(parameters):
            self._store.log_batch(run_id, [], [entities.Param(*entry) for entry in batch.items()], [])
        for batch in batches(tags):
            self._store.log_batch(run_id, [], [], [entities.RunTag(*entry) for entry in batch.items()])

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """Stores a text as an artifact of a run, by MLflow's client, which knows where artifacts go."""
        from mlflow import MlflowClient

        client: Any = MlflowClient(tracking_uri=self._uri)
        client.log_text(run_id, text, name)

    def experiment(self, experiment_id: str) -> Experiment | None:
        """Returns an experiment, deleted ones too; None if no such ID exists."""
        return cast("Experiment | None", _unless(_NOT_FOUND, self._store.get_experiment, experiment_id))

    def experiment_by_name(self, name: str) -> Experiment | None:
        """Returns an experiment, deleted ones too; None if no such name exists."""
        return cast("Experiment | None", self._store.get_experiment_by_name(name))

    def create_experiment(self, name: str) -> str | None:
        """Creates an experiment and returns its ID; None if the name exists."""
        created = _unless(("RESOURCE_ALREADY_EXISTS",), self._store.create_experiment, name, None, [])
        return None if created is None else str(created)

    def default_experiment_id(self) -> str | None:
        """Returns the experiment that MLflow uses when none is chosen; Databricks has none outside of notebooks and jobs."""
        if not self._uri.startswith("databricks"):
            return "0"
        from mlflow.tracking.default_experiment.registry import get_experiment_id

        return get_experiment_id()

    def disconnect(self) -> None:
        """Closes the connections of a database store."""
        self._store.engine.dispose()


def _unless(codes: Container[str], function: Any, *arguments: Any) -> Any:
    """Calls a function of MLflow; returns None if it fails with one of the error codes."""
    from mlflow.exceptions import MlflowException

    try:
        return function(*arguments)
    except MlflowException as error:
        if error.error_code in codes:
            return None
        raise


def batches(entries: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Splits tags or parameters into batches that MLflow accepts in one request."""
    batch: dict[str, str] = {}
    size = 0
    for name, value in entries.items():
        cost = len(json.dumps(name)) + len(json.dumps(value))
        if batch and (len(batch) == MAX_BATCH_ENTRIES or size + cost > MAX_BATCH_BYTES):
            yield batch
            batch, size = {}, 0
        batch[name] = value
        size += cost
    if batch:
        yield batch


def ask_server(uri: str, timeout: float) -> None:
    """Sends one small request to an MLflow server; raises ``MlflowException`` if nothing answers in `timeout` seconds."""
    from mlflow.utils import credentials, rest_utils

    host_credentials: Any = credentials.get_default_host_creds
    http_request: Any = rest_utils.http_request
    http_request(
        host_credentials(uri), "/health", "GET", max_retries=0, timeout=timeout, raise_on_status=False, retry_codes=()
    )


def databricks_variables(uri: str) -> dict[str, str]:
    """Returns the variables with the credentials of a Databricks store; raises ``MlflowException`` if it finds none."""
    from mlflow.utils import databricks_utils

    credentials_of: Any = databricks_utils.get_databricks_env_vars
    return dict(credentials_of(uri))


def model_location(uri: str, tracking_uri: str, registry_uri: str) -> str:
    """Resolves a ``models:/`` URI to the location of its files; other URIs are returned as they are.

    MLflow's own download would ask the registry of this process, whatever registry it is given.
    """
    if not _is_plain_model(uri, registry_uri):
        return uri
    from mlflow import MlflowClient
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    split_models_uri: Any = ModelsArtifactRepository.split_models_uri
    name_and_version: Any = get_model_name_and_version
    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=registry_uri)
    # A version's files may be those of a logged model, which is a separate model.
    while _is_plain_model(uri, registry_uri):
        model, path = split_models_uri(uri)
        found = name_and_version(client, model)
        if len(found) == 1:
            location = client.get_logged_model(found[0]).artifact_location
        else:
            location = client.get_model_version_download_uri(*found)
        uri = f"{location.rstrip('/')}/{path}" if path else location
    return uri


def _is_plain_model(uri: str, registry_uri: str) -> bool:
    parts = split_url(uri)
    return parts.scheme == "models" and not parts.netloc and not registry_uri.startswith(("databricks", "uc:"))


def tracking_uri_in_use() -> str | None:
    """Returns the tracking URI set in this process; None if none is, or MLflow is not imported."""
    utils = _imported("mlflow.tracking._tracking_service.utils")
    return str(utils.get_tracking_uri()) if utils is not None and utils.is_tracking_uri_set() else None


def run_in_use() -> str | None:
    """Returns the ID of the run that ``mlflow.start_run()`` began in this thread, without importing MLflow."""
    fluent = _imported("mlflow.tracking.fluent")
    run = fluent.active_run() if fluent is not None else None
    return None if run is None else str(run.info.run_id)


def active_experiment_id() -> str | None:
    """Returns the experiment ID that ``mlflow.set_experiment()`` chose in this process, without importing MLflow."""
    chosen = getattr(_imported("mlflow.tracking.fluent"), "_active_experiment_id", None)
    return None if chosen is None else str(chosen)


def _imported(name: str) -> ModuleType | None:
    """A module that is completely imported: another thread may be importing it at this moment."""
    module = sys.modules.get(name)
    if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    return module


def import_mlflow(tracking_uri: str) -> None:
    """Imports MLflow without the packages that only its full variant uses, and with them if that fails."""
    if split_url(tracking_uri).scheme.partition("+")[0] not in _BUILT_IN_SCHEMES:
        # A plugin's store may use anything.
        return
    blocked = [name for name in _OPTIONAL_IMPORTS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # None is Python's way to refuse an import
    try:
        importlib.import_module("mlflow")
    except Exception:  # noqa: BLE001 - any failure may come from the blocked packages
        for name in [name for name in sys.modules if name in blocked or name.partition(".")[0] == "mlflow"]:
            del sys.modules[name]
