"""Submits a run: chooses how its code gets to the pod, and creates, finds, lists and deletes its Job."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any

from prefect_mlprojects.backends.containers.archive import iterate_archive, project_files
from prefect_mlprojects.backends.contract import Report, RunIdentity
from prefect_mlprojects.backends.kubernetes import manifest
from prefect_mlprojects.backends.kubernetes.api import ApiError, Cluster, Json, nested
from prefect_mlprojects.backends.kubernetes.config import BACKEND, DeliveryName, KubernetesRequest, backend_error
from prefect_mlprojects.backends.kubernetes.diagnosis import final_condition, refused
from prefect_mlprojects.exceptions import BackendError, FetchError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.sources.git import GitCredentialsLookup, GitUrl, find_credentials, parse_git_url
from prefect_mlprojects.types import StopSignal

ARCHIVE_LIMIT = 900_000  # the largest archive in bytes: the API server accepts ConfigMaps of up to 1 MiB
HEARTBEAT_SECONDS = 30.0
_UNWATCHED_SECONDS = 4 * HEARTBEAT_SECONDS
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_WAYS = (
    "Ways for the code to get to the pod: 'code-delivery: image' with 'repository-uri' (an image is built and pushed), "
    "'archive' (needs no registry, up to 900 kB), 'git' (the pod clones the commit), or 'none' (the image holds the project)."
)
_TRIM = "List what the pod does not need in the project's .dockerignore."
_NO_GIT = "'code-delivery: git' can't work:"


def choose_delivery(
    requested: DeliveryName | None, *, repository_uri: str | None, build_image: bool, archive_size: int | None
) -> tuple[DeliveryName, str]:
    """Chooses how the code gets to the pod; returns the way and why it was chosen. Pure.

    `archive_size` is the size of the project's archive in bytes; None if it exceeds `ARCHIVE_LIMIT`. Raises `BackendError` if no
    way is possible, or the options contradict each other; the message lists the ways.
    """
    if build_image and requested not in (None, "image"):
        raise backend_error(f"build_image=True contradicts 'code-delivery: {requested}'. {_WAYS}")
    if (build_image or requested == "image") and not repository_uri:
        option = "build_image=True" if build_image else "'code-delivery: image'"
        raise backend_error(f"{option} needs 'repository-uri', a registry that the nodes can pull from. {_WAYS}")
    limit = f"{ARCHIVE_LIMIT // 1000} kB"
    if requested == "archive" and archive_size is None:
        raise backend_error(f"The project's archive exceeds {limit}, compressed. {_TRIM} {_WAYS}")
    if requested is not None:
        return requested, "the configuration asks for it"
    if repository_uri:
        return "image", "build_image=True" if build_image else "'repository-uri' is set"
    if archive_size is None:
        raise backend_error(
            f"The project exceeds {limit} as an archive, and 'repository-uri' is not set. {_TRIM} {_WAYS}"
        )
    return "archive", f"it fits: {archive_size:,} bytes of at most {ARCHIVE_LIMIT:,}, and no 'repository-uri' is set"


def find_delivery(request: KubernetesRequest) -> tuple[DeliveryName, str]:
    """Chooses how a request's code gets to the pod, see `choose_delivery`; reads the project's files, sends no request."""
    config, builds = request.config, request.build_image
    packs = config.code_delivery == "archive" or not (config.code_delivery or config.repository_uri or builds)
    archive = pack_project(request.working_copy) if packs else None
    size, uri = None if archive is None else len(archive), config.repository_uri
    return choose_delivery(config.code_delivery, repository_uri=uri, build_image=builds, archive_size=size)


def pack_project(working_copy: WorkingCopy) -> bytes | None:
    """Returns the project as a compressed archive; None if it exceeds `ARCHIVE_LIMIT`."""
    packed = io.BytesIO()
    files = project_files(working_copy, backend=BACKEND)
    for piece in iterate_archive(files, compressed=True, tar_format=tarfile.GNU_FORMAT, backend=BACKEND):
        packed.write(piece)
        if packed.tell() > ARCHIVE_LIMIT:
            return None
    return packed.getvalue()


def find_checkout(working_copy: WorkingCopy) -> manifest.GitCheckout:
    """Returns the commit that an init container has to clone, without credentials.

    Raises `BackendError` if the project is not at a commit, its repository has no remote, or files differ from the commit.
    """
    commit, remote = working_copy.commit, working_copy.repository_url
    if commit is None or remote is None:
        missing = "is not at a git commit" if commit is None else "is in a git repository without a remote"
        raise backend_error(f"{_NO_GIT} the project {working_copy.uri} {missing}. {_WAYS}")
    try:
        address = parse_git_url(remote)
    except FetchError as error:
        raise backend_error(f"{_NO_GIT} {error} {_WAYS}") from None
    if address is None or address.scheme == "file":
        raise backend_error(
            f"{_NO_GIT} the remote {remote} is a folder of this machine, so a pod can't clone it. {_WAYS}"
        )
    if working_copy.dirty:
        raise backend_error(
            f"'code-delivery: git' would run commit {commit[:12]}, but the project's files differ from it. Commit and "
            "push them, or use 'archive' or 'image'."
        )
    return manifest.GitCheckout(address.url, commit, working_copy.source_name.partition("#")[2])


def with_credentials(
    checkout: manifest.GitCheckout, lookup: GitCredentialsLookup | None, copy: WorkingCopy
) -> manifest.GitCheckout:
    """Returns a checkout with the credentials that `lookup` has for its repository's host; `lookup` blocks."""
    address = parse_git_url(checkout.url)
    if address is None:
        return checkout
    # A folder's own configuration names its remote: credentials for it must list its host.
    project = address if copy.kind == "git" else GitUrl(copy.directory.as_uri())
    credentials = find_credentials(lookup, address, project)
    if credentials is None:
        return checkout
    child_env: dict[str, str] = {}
    if address.scheme in ("http", "https") and credentials.token is not None:
        child_env |= {manifest.GIT_TOKEN: credentials.token, manifest.GIT_USERNAME: credentials.username or "git"}
    if address.scheme == "ssh" and credentials.ssh_private_key is not None:
        child_env[manifest.GIT_SSH_KEY] = credentials.ssh_private_key.strip()
        if credentials.known_hosts is not None:
            child_env[manifest.GIT_KNOWN_HOSTS] = credentials.known_hosts.strip()
    return replace(checkout, child_env=child_env)


def timestamp() -> str:
    """Returns the current time in Kubernetes' format."""
    return datetime.now(timezone.utc).strftime(_TIME_FORMAT)


def seconds_since(text: str) -> float:
    """Returns the seconds since a time in Kubernetes' format; any other text counts as the epoch."""
    moment = datetime.fromtimestamp(0, timezone.utc)
    with suppress(ValueError):
        moment = datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=timezone.utc)
    return (datetime.now(timezone.utc) - moment).total_seconds()


@dataclass(frozen=True, eq=False)
class Submitter:
    """Submits the Job of one flow run; `stop` ends the retries, `report` receives progress."""

    cluster: Cluster
    identity: RunIdentity
    stop: StopSignal
    report: Report

    def submit(self, request: manifest.JobRequest, working_copy: WorkingCopy) -> tuple[dict[str, Any], bool]:
        """Returns the flow run's Job, the one whose end nobody has observed yet or a new one, and whether it was found.

        The Job is created suspended, then the Secrets and the ConfigMap that it owns, then it is started: after a failure in
        between, deleting the Job removes everything, and a later call continues. Its name is derived from the flow run, so two
        callers can't both create it. `request` lacks name and labels.

        Raises `ApiError` if the server refuses a request, `BackendError` if the Job can't be built.
        """
        flow_run = manifest.label_value(self.identity.flow_run_id)
        selector = f"{manifest.SELECTOR},{manifest.FLOW_RUN_LABEL}={flow_run}"
        jobs = sorted(self._call("list jobs", label_selector=selector).get("items") or [], key=_attempt)
        old = [job for job in jobs if nested(job, "metadata.deletionTimestamp") or manifest.ENDED_LABEL in _labels(job)]
        found = next((job for job in reversed(jobs) if job not in old), None)
        attempt = _attempt(found) if found else max(map(_attempt, jobs), default=0) + 1
        name = found["metadata"]["name"] if found else manifest.job_name(self.identity, attempt)
        request = replace(request, name=name, labels=manifest.run_labels(self.identity, attempt))
        job, attached = (found, True) if found else self._create(request)
        if manifest.PREPARING_ANNOTATION in (job["metadata"].get("annotations") or {}):
            try:
                job = self._start(request, job, pack_project(working_copy) if request.delivery == "archive" else None)
            except (ApiError, BackendError):
                # A suspended Job never ends, so nothing would remove it.
                with suppress(ApiError):
                    self.cluster.delete_job(name, job["metadata"]["uid"], retry_seconds=10.0)
                raise
        return job, attached

    def _call(self, action: str, *names: str, **options: Any) -> dict[str, Any]:
        return self.cluster.call(action, *names, stop=self.stop, on_retry=self._report_retry, **options)

    def _report_retry(self, error: ApiError, delay: float) -> None:
        answer = error.status or error.message
        self.report(f"The API server answered {answer} to {error.action}; retrying in {delay:.1f} s.")

    def _create(self, request: manifest.JobRequest) -> tuple[dict[str, Any], bool]:
        job = manifest.build_job(request)
        job["metadata"]["annotations"] |= {
            manifest.PREPARING_ANNOTATION: "keep-suspended" if job["spec"].get("suspend") else "true",
            manifest.WATCHED_ANNOTATION: timestamp(),
        }
        job["spec"]["suspend"] = True
        try:
            self._call("create jobs", dry_run="All", body=job, field_validation="Strict")
            return self._call("create jobs", body=job, field_validation="Strict"), False
        except ApiError as error:
            if error.status != HTTPStatus.CONFLICT or error.reason != "AlreadyExists":
                raise
        # An earlier request of ours whose answer was lost, or another process that runs the same flow run.
        return self._call("get jobs", request.name), True

    def _start(self, request: manifest.JobRequest, job: dict[str, Any], archive: bytes | None) -> dict[str, Any]:
        for body in manifest.build_dependents(request, archive, job):
            try:
                self._call(f"create {body['kind'].lower()}s", body=body)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
        metadata = {"uid": job["metadata"]["uid"], "annotations": {manifest.PREPARING_ANNOTATION: None}}
        patch: dict[str, Any] = {"metadata": metadata}
        if job["metadata"]["annotations"][manifest.PREPARING_ANNOTATION] != "keep-suspended":
            patch["spec"] = {"suspend": False}
        return self._call("patch jobs", request.name, body=patch)


def _attempt(job: Json) -> int:
    label = _labels(job).get(manifest.ATTEMPT_LABEL, "")
    return int(label) if label.isdigit() else 1


def _labels(job: Json) -> dict[str, str]:
    return job["metadata"].get("labels") or {}


@dataclass(frozen=True)
class RunJob:
    """A run's Job on a cluster.

    `state` is ``watched`` while a process watches it, ``unwatched`` if that process is gone, ``ended`` once its end was observed.
    """

    name: str
    namespace: str
    state: str
    finished: bool
    created: str
    flow_run_id: str
    mlflow_run_id: str
    uid: str


def _run_job(job: Json) -> RunJob:
    metadata = job["metadata"]
    labels, created = _labels(job), metadata.get("creationTimestamp") or ""
    heartbeat = (metadata.get("annotations") or {}).get(manifest.WATCHED_ANNOTATION) or created
    unwatched = seconds_since(heartbeat) > _UNWATCHED_SECONDS
    state = "ended" if manifest.ENDED_LABEL in labels else "unwatched" if unwatched else "watched"
    flow_run_id, mlflow_run_id = labels.get(manifest.FLOW_RUN_LABEL, ""), labels.get(manifest.MLFLOW_RUN_LABEL, "")
    name, namespace, finished = metadata["name"], metadata["namespace"], final_condition(job) is not None
    return RunJob(name, namespace, state, finished, created, flow_run_id, mlflow_run_id, metadata["uid"])


@dataclass(frozen=True)
class RunJobs:
    """The Jobs of runs in a namespace, for ``mlprojects kubernetes``; all methods raise `BackendError`."""

    cluster: Cluster

    def list(self) -> list[RunJob]:
        """Returns the Jobs, the oldest first."""
        try:
            jobs = self.cluster.items("jobs", label_selector=manifest.SELECTOR, retry_seconds=15.0)
        except ApiError as error:
            raise refused(error, self.cluster.name) from None
        return sorted(map(_run_job, jobs), key=lambda job: job.created)

    def delete(self, job: RunJob) -> None:
        """Deletes a Job with its pods and Secrets."""
        try:
            self.cluster.delete_job(job.name, job.uid)
        except ApiError as error:
            raise refused(error, self.cluster.name) from None
