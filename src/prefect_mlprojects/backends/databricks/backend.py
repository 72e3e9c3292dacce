"""The databricks backend: uploads a project, submits it as a one-time run, watches it, and ends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.backends.contract import BackendCall, ExecutionOutcome, ExecutionRequest, Preparation
from prefect_mlprojects.backends.databricks.config import NAME, NO_CLUSTER, DatabricksConfig, parse_databricks_config
from prefect_mlprojects.backends.databricks.connection import connect
from prefect_mlprojects.backends.databricks.environment import driver_environment
from prefect_mlprojects.backends.databricks.execution import Execution
from prefect_mlprojects.backends.databricks.network import insist
from prefect_mlprojects.backends.databricks.storage import FOLDER, storage_for
from prefect_mlprojects.backends.databricks.task import remote_variables, submission
from prefect_mlprojects.backends.databricks.upload import check_size, code_of, pack, upload
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.tracking.uris import is_on_this_machine
from prefect_mlprojects.types import BackendConfig, OutputSink, StopSignal


class DatabricksBackend:
    """Runs commands in a Databricks workspace; a ``PreparingBackend`` and a ``PlanningBackend``."""

    environment_kind = NAME
    downloads_paths = False

    def validate_config(self, config: BackendConfig) -> BackendConfig:
        """Checks a configuration without touching the network."""
        return parse_databricks_config(config).model_dump(by_alias=True)

    def check(self, call: BackendCall) -> None:
        """Checks a call before anything is uploaded: compute, docker, and whether the cluster can reach the store."""
        config = parse_databricks_config(call.config)
        if config.compute is None:
            raise BackendError(NO_CLUSTER, backend=NAME)
        if isinstance(call.project.environment, DockerEnvironment) or call.docker_args or call.build_image:
            raise BackendError(
                f"The project '{call.project.display_name}' wants a Docker container, which Databricks does not run: its runtime "
                "is the container. Give the project a python_env, or run it with the local or kubernetes backend.",
                backend=NAME,
            )
        _check_tracking(call.tracking_uri, config)
        if config.git_source and config.compute != "new":
            raise BackendError(
                "git-source needs a new_cluster: the run's variables get to the command by it. Leave git-source out, so that the "
                "code is uploaded.",
                backend=NAME,
            )
        driver_environment(call)

    def place_paths(self, call: BackendCall, values: Mapping[str, str]) -> Mapping[str, str]:
        """Gives ``path`` parameters the values that they have on the driver."""
        folder = call.working_copy.directory
        placed = {}
        for name, value in values.items():
            if value.startswith("dbfs:/Volumes/"):
                placed[name] = value.removeprefix("dbfs:")
            elif value.startswith("dbfs:/"):
                placed[name] = "/dbfs/" + value.removeprefix("dbfs:").lstrip("/")
            elif Path(value).is_absolute() and Path(value).is_relative_to(folder):
                placed[name] = str(Path(value).relative_to(folder))
            else:
                raise BackendError(
                    f"Parameter '{name}': {redact(value)} can't be reached from Databricks. Give a dbfs:/ path or a file of the "
                    "project, or declare the parameter as uri and let the project read it.",
                    backend=NAME,
                )
        return placed

    def plan(self, call: BackendCall, command: str) -> Mapping[str, str]:
        """Returns the submission as JSON, and what is uploaded and built; asks no network."""
        self.check(call)
        config = parse_databricks_config(call.config)
        root = _root(config, "<user>")
        environment = driver_environment(call)
        archive = pack(call, environment)
        token = "mlp-<flow run id>-0"  # noqa: S105 - an idempotency token
        code = code_of(root, archive.sha256, token if config.live_output else None)
        body = submission(call, config, command, code, remote_variables({}, call.tracking_uri), token)
        built = environment.description if environment is not None else "the driver's own Python"
        if config.git_source:
            return {"code": "checked out by Databricks", "submission": json.dumps(body, indent=2)}
        return {
            "code": f"{archive.count} files and folders, {len(archive.content)} bytes packed, to {code.archive}",
            "environment": built,
            "submission": json.dumps(body, indent=2),
        }

    def prepare(self, call: BackendCall, report: Callable[[str], None], stop: StopSignal) -> Preparation:
        """Uploads the project and the bootstrap, unless they are there."""
        config = parse_databricks_config(call.config)
        if is_on_this_machine(call.tracking_uri):
            report("Warning: the tracking URI names this machine; a cluster elsewhere can't reach it.")
        if call.entry_point.name != "main" and (call.project.databricks_spark_job or {}).get("python_file") is not None:
            report(
                "Warning: the MLproject's databricks_spark_job names a python_file and its parameters; the entry point "
                f"'{call.entry_point.name}' is ignored."
            )
        environment = driver_environment(call)
        for warning in environment.warnings if environment is not None else ():
            report(f"Warning: {warning}")
        client = connect(config, call.tracking_uri, stop)
        ask = partial(
            insist, seconds=config.network_timeout, stop=stop, what="The project can't be uploaded to Databricks"
        )
        user = str(ask(lambda: client.current_user.me().user_name))
        facts = {"root": _root(config, user), "user": user}
        if config.git_source:
            return Preparation("git commit checked out by Databricks", True, facts={**facts, "sha256": "", "size": "0"})
        archive = pack(call, environment)
        check_size(facts["root"], len(archive.content))
        code = code_of(facts["root"], archive.sha256)
        if stop.requested:
            raise BackendError("The upload to Databricks was stopped.", backend=NAME)
        reused = upload(storage_for(client, facts["root"]), code, archive, ask, report)
        return Preparation(
            f"archive of {len(archive.content)} bytes at {code.archive}",
            reused,
            facts={**facts, "sha256": archive.sha256, "size": str(len(archive.content))},
        )

    def execute(self, request: ExecutionRequest, output: OutputSink, stop: StopSignal) -> ExecutionOutcome:
        """Submits the run, or attaches to the one that was submitted for the same flow run, and watches it to its end."""
        if stop.requested:
            return ExecutionOutcome("stopped", cause=stop.reason or "it was cancelled")
        assert request.call is not None
        assert request.preparation is not None
        config = parse_databricks_config(request.config)
        client = connect(config, request.call.tracking_uri, stop)
        return Execution(client, config, request, TailedOutput(output), stop).run()


def _check_tracking(uri: str, config: DatabricksConfig) -> None:
    scheme = uri.partition(":")[0]
    if scheme in ("databricks", "databricks-uc"):
        return
    if scheme not in ("http", "https"):
        raise BackendError(
            "When running on Databricks, the MLflow tracking URI must be of the form 'databricks' or 'databricks://profile', or a "
            "remote HTTP URI accessible to both the current client and code running on Databricks. Got local tracking URI "
            f"{redact(uri)}. Please specify a valid tracking URI via mlflow.set_tracking_uri or by setting the "
            "MLFLOW_TRACKING_URI environment variable.",
            backend=NAME,
        )
    if urlsplit(uri).username and not {"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"} & set(config.secrets):
        raise BackendError(
            f"The tracking URI {redact(uri)} holds a password, which must not be in the submitted task. Put user and password "
            "into a Databricks secret scope and name them in the backend configuration: secrets: {MLFLOW_TRACKING_USERNAME: "
            "scope/key, MLFLOW_TRACKING_PASSWORD: scope/key}.",
            backend=NAME,
        )


def _root(config: DatabricksConfig, user: str) -> str:
    return config.code_path or f"/Workspace/Users/{user}/{FOLDER}"
