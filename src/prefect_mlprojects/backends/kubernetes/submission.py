"""Submits a run: chooses how its code gets to the pod, and creates, finds, lists and deletes its Job."""

from __future__ import annotations

import copy
import io
import tarfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Literal

from prefect_mlprojects.backends.containers.archive import iterate_archive, project_files
from prefect_mlprojects.backends.contract import Report, RunIdentity
from prefect_mlprojects.backends.kubernetes.api import CONFLICT, ApiError, Cluster
from prefect_mlprojects.backends.kubernetes.config import (
    BACKEND,
    DeliveryName,
    KubernetesRequest,
    backend_error,
    connect,
    parse_kubernetes_config,
)
from prefect_mlprojects.backends.kubernetes.diagnosis import final_condition, refused
from prefect_mlprojects.backends.kubernetes.job import (
    ATTEMPT_LABEL,
    ENDED_LABEL,
    FLOW_RUN_LABEL,
    GIT_KNOWN_HOSTS,
    GIT_SSH_KEY,
    GIT_TOKEN,
    GIT_USERNAME,
    MANAGED_BY_LABEL,
    MLFLOW_RUN_LABEL,
    PREFIX,
    PREPARING_ANNOTATION,
    WATCHED_ANNOTATION,
    GitCheckout,
    JobRequest,
    build_dependents,
    build_job,
    job_name,
    label_value,
)
from prefect_mlprojects.exceptions import BackendError, FetchError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.sources.git import GitCredentialsLookup, parse_git_url
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


@dataclass(frozen=True)
class Choice:
    """A way of delivery, and why it was chosen, for messages."""

    delivery: DeliveryName
    reason: str


def choose_delivery(
    requested: DeliveryName | None, *, repository_uri: str | None, build_image: bool, archive_size: int | None
) -> Choice:
    """Chooses how the code gets to the pod. Pure.

    `archive_size` is the size of the project's archive in bytes; None if it exceeds `ARCHIVE_LIMIT`. Raises `BackendError` if no
    way is possible, or the options contradict each other; the message lists the ways.
    """
    if build_image and requested not in (None, "image"):
        raise backend_error(f"build_image=True contradicts 'code-delivery: {requested}'. {_WAYS}")
    if (build_image or requested == "image") and not repository_uri:
        option = "build_image=True" if build_image else "'code-delivery: image'"
        raise backend_error(
            f"{option} needs 'repository-uri': a registry that the cluster's nodes can pull from. {_WAYS}"
        )
    limit = f"{ARCHIVE_LIMIT // 1000} kB"
    if requested == "archive" and archive_size is None:
        raise backend_error(f"The project's archive exceeds {limit}, compressed. {_TRIM} {_WAYS}")
    if requested is not None:
        return Choice(requested, "the configuration asks for it")
    if repository_uri:
        return Choice("image", "build_image=True" if build_image else "'repository-uri' is set")
    if archive_size is None:
        raise backend_error(
            f"The project is too large for an archive of {limit}, and no 'repository-uri' is set. {_TRIM} {_WAYS}"
        )
    fits = f"it fits: {archive_size:,} bytes of at most {ARCHIVE_LIMIT:,}, and no 'repository-uri' is set"
    return Choice("archive", fits)


def find_delivery(request: KubernetesRequest) -> Choice:
    """Chooses how a request's code gets to the pod; reads the project's files, sends no request.

    Raises `BackendError` if no way is possible, or the project does not meet the requirements of the way.
    """
    config = request.config
    without_image = config.code_delivery is None and not config.repository_uri and not request.build_image
    packs = config.code_delivery == "archive" or without_image
    archive = pack_project(request.working_copy) if packs else None
    choice = choose_delivery(
        config.code_delivery,
        repository_uri=config.repository_uri,
        build_image=request.build_image,
        archive_size=None if archive is None else len(archive),
    )
    if choice.delivery == "git":
        find_checkout(request.working_copy)
    return choice


def pack_project(working_copy: WorkingCopy) -> bytes | None:
    """Returns the project as a compressed archive; None if it exceeds `ARCHIVE_LIMIT`."""
    packed = io.BytesIO()
    files = project_files(working_copy, backend=BACKEND)
    for piece in iterate_archive(files, compressed=True, tar_format=tarfile.GNU_FORMAT, backend=BACKEND):
        packed.write(piece)
        if packed.tell() > ARCHIVE_LIMIT:
            return None
    return packed.getvalue()


def find_checkout(working_copy: WorkingCopy) -> GitCheckout:
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
            f"{_NO_GIT} the repository's remote {remote} is a folder of this machine, which a pod can't clone. {_WAYS}"
        )
    if working_copy.dirty:
        raise backend_error(
            f"'code-delivery: git' would run commit {commit[:12]}, but the project's files differ from it. Commit and "
            "push them, or use 'archive' or 'image'."
        )
    return GitCheckout(address.url, commit, working_copy.source_name.partition("#")[2])


def with_credentials(checkout: GitCheckout, lookup: GitCredentialsLookup | None) -> GitCheckout:
    """Returns a checkout with the credentials that `lookup` has for its repository's host; `lookup` blocks."""
    address = parse_git_url(checkout.url)
    credentials = lookup(checkout.url, address.host) if lookup is not None and address is not None else None
    if credentials is None or address is None:
        return checkout
    child_env: dict[str, str] = {}
    if address.scheme in ("http", "https") and credentials.token is not None:
        child_env |= {GIT_TOKEN: credentials.token, GIT_USERNAME: credentials.username or "git"}
    if address.scheme == "ssh" and credentials.ssh_private_key is not None:
        child_env[GIT_SSH_KEY] = credentials.ssh_private_key.strip()
        if credentials.known_hosts is not None:
            child_env[GIT_KNOWN_HOSTS] = credentials.known_hosts.strip()
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


@dataclass(frozen=True)
class Submission:
    """A run's Job as the API server returned it; `attached` is true if it was submitted earlier."""

    job: dict[str, Any]
    attached: bool


class Submitter:
    """Submits the Job of one flow run; `stop` ends the retries, `report` receives progress."""

    def __init__(self, cluster: Cluster, identity: RunIdentity, stop: StopSignal, report: Report) -> None:
        self._cluster = cluster
        self._identity = identity
        self._stop = stop
        self._report = report

    def submit(
        self, make_request: Callable[[str, int], JobRequest], make_archive: Callable[[], bytes | None]
    ) -> Submission:
        """Returns the flow run's Job: the one whose end nobody has observed yet, or a new one.

        The Job is created suspended, then the Secrets and the ConfigMap that it owns, then it is started: after a failure in
        between, deleting the Job removes everything, and a later call continues. Its name is derived from the flow run, so two
        callers can't both create it. `make_request` takes the Job's name and the attempt (from 1). Raises `ApiError` if the server
        refuses a request, `BackendError` if the Job can't be built.
        """
        selector = f"{MANAGED_BY_LABEL}={PREFIX},{FLOW_RUN_LABEL}={label_value(self._identity.flow_run_id)}"
        jobs = sorted(self._cluster.list_jobs(label_selector=selector, **self._retries()), key=_attempt)
        unfinished = [
            job
            for job in jobs
            if ENDED_LABEL not in job["metadata"].get("labels", {}) and not job["metadata"].get("deletionTimestamp")
        ]
        if unfinished:
            job, attached = unfinished[-1], True
            request = make_request(job["metadata"]["name"], _attempt(job))
        else:
            attempt = max(map(_attempt, jobs), default=0) + 1
            request = make_request(job_name(self._identity, attempt), attempt)
            job, attached = self._create(request)
        if PREPARING_ANNOTATION in (job["metadata"].get("annotations") or {}):
            try:
                job = self._start(request, job, make_archive())
            except (ApiError, BackendError):
                # A suspended Job never ends, so nothing would remove it.
                with suppress(ApiError):
                    self._cluster.delete_job(request.name, job["metadata"]["uid"], retry_seconds=10.0)
                raise
        return Submission(job, attached)

    def _retries(self) -> dict[str, Any]:
        def on_retry(error: ApiError, delay: float) -> None:
            answer = error.status or error.message
            self._report(f"The API server answered {answer} to {error.action}; retrying in {delay:.1f} s.")

        return {"stop": self._stop, "on_retry": on_retry}

    def _call(self, action: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        return self._cluster.call(action, function, *arguments, **self._retries(), **options)

    def _create(self, request: JobRequest) -> tuple[dict[str, Any], bool]:
        job = build_job(request)
        suspended = copy.deepcopy(job)
        suspended["metadata"]["annotations"] |= {
            PREPARING_ANNOTATION: "keep-suspended" if job["spec"].get("suspend") else "true",
            WATCHED_ANNOTATION: timestamp(),
        }
        suspended["spec"]["suspend"] = True
        batch, namespace = self._cluster.batch, self._cluster.namespace
        create, options = batch.create_namespaced_job, {"body": suspended, "field_validation": "Strict"}
        try:
            self._call("create jobs", create, namespace, dry_run="All", **options)
            return self._call("create jobs", create, namespace, **options), False
        except ApiError as error:
            if error.status != CONFLICT or error.reason != "AlreadyExists":
                raise
        # An earlier request of ours whose answer was lost, or another process that runs the same flow run.
        return self._call("get jobs", batch.read_namespaced_job, request.name, namespace), True

    def _start(self, request: JobRequest, job: dict[str, Any], archive: bytes | None) -> dict[str, Any]:
        core, namespace = self._cluster.core, self._cluster.namespace
        for kind, body in build_dependents(request, archive, job):
            create = core.create_namespaced_secret if kind == "Secret" else core.create_namespaced_config_map
            try:
                self._call(f"create {kind.lower()}s", create, namespace, body=body)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
        metadata = {"uid": job["metadata"]["uid"], "annotations": {PREPARING_ANNOTATION: None}}
        patch: dict[str, Any] = {"metadata": metadata}
        if job["metadata"]["annotations"][PREPARING_ANNOTATION] != "keep-suspended":
            patch["spec"] = {"suspend": False}
        return self._call("patch jobs", self._cluster.batch.patch_namespaced_job, request.name, namespace, body=patch)


def _attempt(job: dict[str, Any]) -> int:
    label = (job["metadata"].get("labels") or {}).get(ATTEMPT_LABEL, "")
    return int(label) if label.isdigit() else 1


@dataclass(frozen=True)
class RunJob:
    """A run's Job on a cluster.

    Its state is ``watched`` while a process watches it, ``unwatched`` if that process is gone, ``ended`` once its end was observed.
    """

    name: str
    namespace: str
    state: Literal["watched", "unwatched", "ended"]
    finished: bool
    created: str
    flow_run_id: str
    mlflow_run_id: str
    uid: str


def _run_job(job: Mapping[str, Any]) -> RunJob:
    metadata = job["metadata"]
    labels, created = metadata.get("labels") or {}, metadata.get("creationTimestamp") or ""
    heartbeat = (metadata.get("annotations") or {}).get(WATCHED_ANNOTATION) or created
    unwatched = seconds_since(heartbeat) > _UNWATCHED_SECONDS
    return RunJob(
        metadata["name"],
        metadata["namespace"],
        "ended" if ENDED_LABEL in labels else "unwatched" if unwatched else "watched",
        final_condition(job) is not None,
        created,
        labels.get(FLOW_RUN_LABEL, ""),
        labels.get(MLFLOW_RUN_LABEL, ""),
        metadata["uid"],
    )


class RunJobs:
    """The Jobs of runs in a namespace, for ``mlprojects kubernetes``; all methods raise `BackendError`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._cluster = connect(parse_kubernetes_config(config))

    def list(self) -> list[RunJob]:
        """Returns the Jobs, the oldest first."""
        try:
            jobs = self._cluster.list_jobs(label_selector=f"{MANAGED_BY_LABEL}={PREFIX}", retry_seconds=15.0)
        except ApiError as error:
            raise refused(error, self._cluster.name) from None
        return sorted(map(_run_job, jobs), key=lambda job: job.created)

    def delete(self, job: RunJob) -> None:
        """Deletes a Job with its pods and Secrets."""
        try:
            self._cluster.delete_job(job.name, job.uid)
        except ApiError as error:
            raise refused(error, self._cluster.name) from None
