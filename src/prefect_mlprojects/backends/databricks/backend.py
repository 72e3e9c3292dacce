"""The databricks backend: uploads a project, submits it as a one-time run, watches it, and ends it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prefect_mlprojects._support.redaction import redact, redact_url
from prefect_mlprojects._support.secrets import disclose, reveal, without_secrets
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.backends.contract import (
    Backend,
    BackendPlan,
    Command,
    Demands,
    ExecutionEvents,
    Prepared,
    Report,
)
from prefect_mlprojects.backends.databricks import NAME, failure, storage, unavailable
from prefect_mlprojects.backends.databricks.config import DatabricksConfig, DatabricksRequest, connect, insist
from prefect_mlprojects.backends.databricks.execution import Execution
from prefect_mlprojects.backends.databricks.storage import DatabricksPrepared, Upload
from prefect_mlprojects.backends.databricks.task import driver_environment, secret_places, submission
from prefect_mlprojects.backends.outcome import Outcome, stopped_outcome
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.tracking.uris import is_on_this_machine
from prefect_mlprojects.types import StopSignal


class DatabricksBackend(Backend[DatabricksConfig, Upload]):
    """Runs commands in a Databricks workspace."""

    name = NAME
    config_model = DatabricksConfig
    downloads_paths = False

    def environment_kind(self, request: DatabricksRequest) -> str:
        """Returns ``databricks``."""
        del request
        return NAME

    def demands(self, request: DatabricksRequest) -> Demands:
        """Returns the images of the compute."""
        return Demands(images=tuple(_images(request.config.model_dump())))

    def check(self, request: DatabricksRequest) -> None:
        """Checks the compute, the absence of Docker options, and that the cluster can reach the tracking store."""
        config = request.config
        if config.compute is None:
            raise failure(
                "Backend spec must be provided when launching MLflow project runs on Databricks: name a new_cluster, an "
                "existing-cluster-id or a (serverless) environment in the backend configuration."
            )
        if isinstance(request.project.environment, DockerEnvironment) or request.docker_args or request.build_image:
            raise failure(
                f"The project '{request.project.display_name}' wants a Docker container, which Databricks can't run: its "
                "runtime is the container. Give the project a python_env, or run it with the local or kubernetes backend."
            )
        _check_tracking(reveal(request.tracking_uri), config)
        if config.git_source and config.compute != "new":
            raise failure(
                "git-source needs a new_cluster, which passes the run's variables on. Leave it out to upload the code."
            )
        secret_places(request)
        driver_environment(request)

    def map_paths(self, request: DatabricksRequest, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Returns the paths on the driver: of files of the project, and of DBFS and volumes."""
        folder = request.working_copy.directory
        mapped = {}
        for name, value in paths.items():
            if value.startswith("dbfs:/"):
                on_volume = value.startswith("dbfs:/Volumes/")
                mapped[name] = value.removeprefix("dbfs:") if on_volume else storage.driver_path(value)
            elif Path(value).is_absolute() and Path(value).is_relative_to(folder):
                mapped[name] = str(Path(value).relative_to(folder))
            else:
                raise failure(
                    f"Parameter '{name}': {redact(value)} can't be reached from Databricks. Give a dbfs:/ path or a file of the "
                    "project, or declare the parameter as uri and let the project read it."
                )
        return mapped

    def plan(self, request: DatabricksRequest, command: str) -> BackendPlan:
        """Returns the submission as JSON, and what would be uploaded and built; sends nothing."""
        self.check(request)
        environment = driver_environment(request)
        archive, count = storage.pack(request, environment.files)
        code = Upload.of(storage.code_path(request.config, "<user>"), "<user>", archive)
        body = submission(request, command, code, {}, "mlp-<flow run id>-0")
        shown = json.dumps(without_secrets(disclose(body)), indent=2)
        if request.config.git_source:
            return BackendPlan(NAME, sections={"code": "checked out by Databricks", "submission": shown})
        packed = f"{count} files and folders, {code.size} bytes packed, to {code.archive}"
        sections = {"code": packed, "environment": environment.description, "submission": shown}
        return BackendPlan(NAME, sections=sections)

    def prepare(self, request: DatabricksRequest, report: Report, stop: StopSignal) -> DatabricksPrepared:
        """Uploads the project and the bootstrap unless the workspace has them."""
        config, tracking_uri = request.config, reveal(request.tracking_uri)
        if is_on_this_machine(tracking_uri):
            report("Warning: the tracking URI names this machine; a cluster elsewhere can't reach it.")
        spark_file = (request.project.databricks_spark_job or {}).get("python_file")
        if request.entry_point.name != "main" and spark_file is not None:
            ignored = f"the entry point '{request.entry_point.name}' is ignored"
            report(f"Warning: the MLproject's databricks_spark_job names a python_file and its parameters; {ignored}.")
        environment = driver_environment(request)
        for warning in environment.warnings:
            report(f"Warning: {warning}")
        client = connect(config, tracking_uri, stop)
        ask = partial(insist, config=config, stop=stop, what="The project can't be uploaded to Databricks")
        user = str(ask(lambda: client.current_user.me().user_name))
        root = storage.code_path(config, user)
        if config.git_source:
            return Prepared(request, Upload(root, user), "git commit checked out by Databricks", True)
        archive, _ = storage.pack(request, environment.files)
        code = Upload.of(root, user, archive)
        storage.check_size(root, code.size)
        if stop.requested:
            raise unavailable("The upload to Databricks was stopped.")
        reused = storage.upload(storage.storage_for(client, root), code, archive, ask, report)
        return Prepared(request, code, f"archive of {code.size} bytes at {code.archive}", reused)

    def execute(
        self, prepared: DatabricksPrepared, command: Command, events: ExecutionEvents, stop: StopSignal
    ) -> Outcome:
        """Submits the run, or attaches to the one submitted for the same flow run, and watches it to its end."""
        if stop.requested:
            return stopped_outcome(stop)
        client = connect(prepared.request.config, reveal(prepared.request.tracking_uri), stop)
        return Execution(client, prepared, command, events, stop).run()


def _check_tracking(uri: str, config: DatabricksConfig) -> None:
    scheme = uri.partition(":")[0]
    if scheme in ("databricks", "databricks-uc"):
        return
    if scheme not in ("http", "https"):
        raise failure(
            "When running on Databricks, the MLflow tracking URI must be of the form 'databricks' or 'databricks://profile', or a "
            "remote HTTP URI accessible to both the current client and code running on Databricks. Got local tracking URI "
            f"{redact_url(uri)}. Please specify a valid tracking URI via mlflow.set_tracking_uri or by setting the "
            "MLFLOW_TRACKING_URI environment variable."
        )
    if split_url(uri).username and not {"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"} & set(config.secrets):
        raise failure(
            f"The tracking URI {redact_url(uri)} holds a password, which must not be in the submitted task. Put user and password "
            "into a Databricks secret scope and name them in the backend configuration: secrets: {MLFLOW_TRACKING_USERNAME: "
            "scope/key, MLFLOW_TRACKING_PASSWORD: scope/key}."
        )


def _images(config: Any) -> list[str]:
    """Returns the images that a configuration names, at any depth."""
    if isinstance(config, list | tuple):
        return [image for each in config for image in _images(each)]
    if not isinstance(config, Mapping):
        return []
    named = config.get("docker_image")
    own = [str(named["url"])] if isinstance(named, Mapping) and named.get("url") else []
    return [*own, *(image for each in config.values() for image in _images(each))]
