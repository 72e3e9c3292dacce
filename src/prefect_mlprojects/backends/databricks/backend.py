"""The databricks backend: uploads a project, submits it as a one-time run, watches it, and ends it."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prefect_mlprojects._output import TailedOutput
from prefect_mlprojects._redaction import mask_text
from prefect_mlprojects.backends.base import BackendCall, ExecutionOutcome, ExecutionRequest, Preparation
from prefect_mlprojects.backends.databricks.config import NAME, NO_CLUSTER, DatabricksConfig, parse_databricks_config
from prefect_mlprojects.backends.databricks.connection import connect
from prefect_mlprojects.backends.databricks.output import LiveOutput, driver_output
from prefect_mlprojects.backends.databricks.states import Diagnosis, diagnose
from prefect_mlprojects.backends.databricks.storage import FOLDER, Storage, storage_for
from prefect_mlprojects.backends.databricks.task import (
    REQUIREMENTS_FILE,
    Code,
    python_spec,
    remote_variables,
    requirements_text,
    submission,
)
from prefect_mlprojects.backends.databricks.watch import cancel, insist, watch
from prefect_mlprojects.backends.project_archive import project_files, write_archive
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.tracking.uris import is_on_this_machine
from prefect_mlprojects.types import BackendConfig, OutputSink, StopSignal

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.jobs import Run

_MAX_ATTEMPTS = 100


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
        python_spec(call)

    def place_paths(self, call: BackendCall, values: Mapping[str, str]) -> Mapping[str, str]:
        """Gives ``path`` parameters the values that they have on the driver."""
        folder = call.working_copy.directory
        placed = {}
        for name, value in values.items():
            if value.startswith("dbfs:/"):
                placed[name] = "/dbfs/" + value.removeprefix("dbfs:").lstrip("/")
            elif Path(value).is_absolute() and Path(value).is_relative_to(folder):
                placed[name] = str(Path(value).relative_to(folder))
            else:
                raise BackendError(
                    f"Parameter '{name}': {mask_text(value)} can't be reached from Databricks. Give a dbfs:/ path or a file of the "
                    "project, or declare the parameter as uri and let the project read it.",
                    backend=NAME,
                )
        return placed

    def plan(self, call: BackendCall, command: str) -> Mapping[str, str]:
        """Returns the submission as JSON; asks no network."""
        self.check(call)
        config = parse_databricks_config(call.config)
        root = _root(config, "<user>")
        archive = _archive(call)
        token = "mlp-<flow run id>-0"  # noqa: S105 - an idempotency token
        code = _code(root, hashlib.sha256(archive).hexdigest(), token, live=config.live_output)
        body = submission(call, config, command, code, remote_variables({}, call.tracking_uri), token)
        return {"submission": json.dumps(body, indent=2)}

    def prepare(self, call: BackendCall, report: Callable[[str], None], stop: StopSignal) -> Preparation:
        """Uploads the project and the bootstrap, unless they are there."""
        config = parse_databricks_config(call.config)
        if is_on_this_machine(call.tracking_uri):
            report("Warning: the tracking URI names this machine; a cluster elsewhere can't reach it.")
        client = connect(config, call.tracking_uri)
        ask = partial(
            insist, seconds=config.network_timeout, stop=stop, what="The project can't be uploaded to Databricks"
        )
        root = config.code_path or _root(config, ask(lambda: str(client.current_user.me().user_name)))
        if config.git_source:
            return Preparation("git commit checked out by Databricks", True, facts={"root": root, "sha256": ""})
        archive = _archive(call)
        digest = hashlib.sha256(archive).hexdigest()
        code = _code(root, digest, "", live=False)
        storage = storage_for(client, root)
        reused = True
        for path, content in ((code.bootstrap, _bootstrap()), (code.archive, archive)):
            if stop.requested:
                raise BackendError("The upload to Databricks was stopped.", backend=NAME)
            if not ask(partial(storage.exists, path)):
                report(f"Uploading {len(content)} bytes to {path}")
                ask(partial(storage.write, path, content))
                reused = False
        return Preparation(
            f"archive of {len(archive)} bytes at {code.archive}", reused, facts={"root": root, "sha256": digest}
        )

    def execute(self, request: ExecutionRequest, output: OutputSink, stop: StopSignal) -> ExecutionOutcome:
        """Submits the run, or attaches to the one that was submitted for the same flow run, and watches it to its end."""
        if stop.requested:
            return ExecutionOutcome("stopped", cause=stop.reason or "it was cancelled")
        assert request.call is not None
        assert request.preparation is not None
        config = parse_databricks_config(request.config)
        client = connect(config, request.call.tracking_uri)
        return _Execution(client, config, request, TailedOutput(output), stop).run()


class _Execution:
    """One execution: what belongs to it while it goes on."""

    def __init__(
        self,
        client: WorkspaceClient,
        config: DatabricksConfig,
        request: ExecutionRequest,
        output: TailedOutput,
        stop: StopSignal,
    ) -> None:
        assert request.call is not None
        assert request.preparation is not None
        self._client, self._config, self._request = client, config, request
        self._output, self._stop, self._call = output, stop, request.call
        self._facts = request.preparation.facts
        self._storage: Storage = storage_for(client, self._facts["root"])
        self._phase = ""
        self._token = ""

    def run(self) -> ExecutionOutcome:
        started = time.monotonic()
        run_id, code = self._submit()
        live = LiveOutput(self._storage, code.output, self._output) if code.output else None
        deadline = None if self._request.timeout is None else started + self._request.timeout

        def look(_run: Run, found: Diagnosis) -> bool:
            if found.phase != self._phase:
                self._phase = found.phase
                self._request.events.report(f"Databricks run {run_id}: {found.phase}")
            return live.read() if live is not None else False

        run, found, why = watch(self._client, run_id, self._config, self._stop, deadline, look)
        if why != "ended":
            self._request.events.report(f"Cancelling the Databricks run {run_id}")
            run, found = cancel(self._client, run_id, self._config)
        if live is not None:
            live.read()
        error = ""
        if found.status != "succeeded":
            error = driver_output(self._client, run, self._output, whole=live is None or not live.seen)
        elif live is None or not live.seen:
            driver_output(self._client, run, self._output, whole=True)
        tail = self._output.close()
        if found.status != "succeeded":
            self._note_told()
        self._forget(code)
        return _outcome(found, why, self._stop, live.exit_code if live is not None else None, error, tail)

    def _submit(self) -> tuple[int, Code]:
        """Submits the run; a run of an earlier attempt whose failure was told already gives way to a new one."""
        variables = remote_variables(self._request.variables, self._call.tracking_uri)
        for attempt in range(_MAX_ATTEMPTS):
            token = f"mlp-{self._request.identity.flow_run_id}-{attempt}"[:64]
            code = _code(self._facts["root"], self._facts["sha256"], token, live=self._live())
            body = submission(self._call, self._config, self._request.command, code, variables, token)
            run_id = int(self._ask(partial(_post, self._client, body), "Databricks refused the run")["run_id"])
            run = self._ask(partial(self._client.jobs.get_run, run_id), "The run can't be read")
            found = diagnose(run)
            if found.ended and found.status != "succeeded" and self._was_told(token):
                continue
            self._token = token
            self._tell(run_id, run)
            return run_id, code
        raise BackendError(f"The run was tried {_MAX_ATTEMPTS} times.", backend=NAME)

    def _was_told(self, token: str) -> bool:
        return bool(
            self._ask(partial(self._storage.exists, self._marker(token)), "The run's marker can't be looked for")
        )

    def _note_told(self) -> None:
        """Notes that the failure was told: a retry of the flow run is then a new run, a restart before that is not."""
        try:
            self._storage.write(self._marker(self._token), b"told\n")
        except Exception as error:  # noqa: BLE001 - the failure itself is what people must hear of
            self._request.events.report(f"A retry will find the same run again: {error}")

    def _marker(self, token: str) -> str:
        return f"{self._facts['root']}/told/{token}"

    def _live(self) -> bool:
        return self._config.live_output and not self._config.git_source

    def _ask(self, call: Callable[[], Any], what: str) -> Any:
        return insist(call, self._config.network_timeout, self._stop, what)

    def _tell(self, run_id: int, run: Run) -> None:
        # The tags that `mlflow run` sets: mlflow/projects/databricks.py, _print_description_and_log_tags.
        tags = {"mlflow.databricks.shellJobRunID": str(run_id), "mlflow.databricks.webappURL": self._client.config.host}
        if run.job_id is not None:
            tags["mlflow.databricks.shellJobID"] = str(run.job_id)
        if run.run_page_url:
            tags["mlflow.databricks.runURL"] = run.run_page_url
            self._request.events.link("Databricks run", run.run_page_url)
        self._request.events.tag(tags)

    def _forget(self, code: Code) -> None:
        if code.output is None:
            return
        try:
            self._storage.remove(code.output)
        except Exception as error:  # noqa: BLE001 - `mlprojects databricks clean` takes what is left
            self._request.events.report(f"The output folder {code.output} could not be removed: {error}")


def _post(client: WorkspaceClient, body: Mapping[str, Any]) -> Any:
    # The SDK's own submit() takes dataclasses and drops keys that it does not know; the body is passed on as written.
    return client.api_client.do("POST", "/api/2.2/jobs/runs/submit", body=dict(body))


def _outcome(
    found: Diagnosis, why: str, stop: StopSignal, exit_code: int | None, error: str, tail: tuple[str, ...]
) -> ExecutionOutcome:
    if found.status == "succeeded":
        return ExecutionOutcome("exited", exit_code=0, cause="exit code 0", output_tail=tail)
    if why == "stopped":
        return ExecutionOutcome("stopped", cause=stop.reason or "it was cancelled", output_tail=tail)
    if why == "timed-out":
        return ExecutionOutcome(
            "timed-out", cause="it took longer than its timeout and was cancelled", output_tail=tail
        )
    if found.status == "failed" and exit_code:
        return ExecutionOutcome(
            "exited", exit_code, cause=f"exit code {exit_code}", advice=found.advice, output_tail=tail
        )
    cause = f"{found.cause}: {error}" if error and error not in found.cause else found.cause
    match found.status:
        case "cancelled":
            return ExecutionOutcome("stopped", cause=cause, advice=found.advice, output_tail=tail)
        case "timed-out":
            return ExecutionOutcome("timed-out", cause=cause, advice=found.advice, output_tail=tail)
        case "not-started":
            return ExecutionOutcome("not-started", cause=cause, advice=found.advice, output_tail=tail)
    return ExecutionOutcome("exited", exit_code or 1, cause=cause, advice=found.advice, output_tail=tail)


def _check_tracking(uri: str, config: DatabricksConfig) -> None:
    scheme = uri.partition(":")[0]
    if scheme in ("databricks", "databricks-uc"):
        return
    if scheme not in ("http", "https"):
        raise BackendError(
            "When running on Databricks, the MLflow tracking URI must be of the form 'databricks' or 'databricks://profile', or a "
            "remote HTTP URI accessible to both the current client and code running on Databricks. Got local tracking URI "
            f"{mask_text(uri)}. Please specify a valid tracking URI via mlflow.set_tracking_uri or by setting the "
            "MLFLOW_TRACKING_URI environment variable.",
            backend=NAME,
        )
    if urlsplit(uri).username and not {"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"} & set(config.secrets):
        raise BackendError(
            f"The tracking URI {mask_text(uri)} holds a password, which must not be in the submitted task. Put user and password "
            "into a Databricks secret scope and name them in the backend configuration: secrets: {MLFLOW_TRACKING_USERNAME: "
            "scope/key, MLFLOW_TRACKING_PASSWORD: scope/key}.",
            backend=NAME,
        )


def _root(config: DatabricksConfig, user: str) -> str:
    return config.code_path or f"/Workspace/Users/{user}/{FOLDER}"


def _bootstrap() -> bytes:
    return (Path(__file__).parent / "bootstrap.py").read_bytes()


def _code(root: str, digest: str, token: str, *, live: bool) -> Code:
    version = hashlib.sha256(_bootstrap()).hexdigest()[:16]
    return Code(
        archive=f"{root}/code/{digest}.tar.gz",
        sha256=digest,
        bootstrap=f"{root}/code/bootstrap-{version}.py",
        output=f"{root}/output/{token}" if live else None,
    )


def _archive(call: BackendCall) -> bytes:
    spec = python_spec(call)
    extra = {} if spec is None else {REQUIREMENTS_FILE: requirements_text(spec).encode()}
    content = io.BytesIO()
    files = project_files(call.working_copy.directory, backend=NAME)
    write_archive(content, files, prefix="project", extra=extra, compressed=True, backend=NAME)
    return content.getvalue()
