"""The Kubernetes backend: a project's command runs as a Job."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from prefect_mlprojects import settings
from prefect_mlprojects._support.redaction import redact, redact_url
from prefect_mlprojects._support.secrets import Withheld, reveal, reveal_all, reveal_values, secrets_in
from prefect_mlprojects.backends import contract
from prefect_mlprojects.backends.containers.archive import project_files
from prefect_mlprojects.backends.containers.engine import LocalConfig
from prefect_mlprojects.backends.containers.engine import connect as connect_engine
from prefect_mlprojects.backends.containers.image import EngineImages
from prefect_mlprojects.backends.contract import (
    Backend,
    BackendPlan,
    Command,
    Demands,
    ExecutionEvents,
    Prepared,
    Report,
)
from prefect_mlprojects.backends.kubernetes import manifest
from prefect_mlprojects.backends.kubernetes.api import ApiError, nested
from prefect_mlprojects.backends.kubernetes.config import (
    BACKEND,
    DeliveryName,
    KubernetesConfig,
    KubernetesRequest,
    backend_error,
    connect,
    load_template,
    parse_kubernetes_config,
)
from prefect_mlprojects.backends.kubernetes.diagnosis import refused
from prefect_mlprojects.backends.kubernetes.execution import JobRun
from prefect_mlprojects.backends.kubernetes.manifest import JobRequest
from prefect_mlprojects.backends.kubernetes.submission import Submitter, find_checkout, find_delivery, with_credentials
from prefect_mlprojects.backends.outcome import Outcome, stopped_outcome
from prefect_mlprojects.exceptions import BackendError, BackendUnavailableError
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.tracking.uris import EXPERIMENT_ID_VARIABLE, TRACKING_URI_VARIABLE, is_on_this_machine, run_page
from prefect_mlprojects.types import BackendConfig, StopSignal

JOB_TAG = "mlprojects.kubernetes.job"
NAMESPACE_TAG = "mlprojects.kubernetes.namespace"
KUBE_TRACKING_URI_VARIABLE = "KUBE_MLFLOW_TRACKING_URI"
"""MLflow's variable for the tracking URI that pods use."""
_ENGINE_SECONDS = 600
_DEADLINE_SLACK_SECONDS = 60
"""How much later than this process Kubernetes enforces the time-out, for when the watching process has died."""
_TRACKING_CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_WORKSPACE",
)
"""Variables of this process that a pod needs to reach the tracking server."""
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_MAX_SECRET_BYTES = 900_000

_Prepared: TypeAlias = Prepared[KubernetesConfig, DeliveryName]


class KubernetesBackend(Backend[KubernetesConfig, DeliveryName]):
    """Runs a project's command as a Job; see `Backend` for its methods."""

    name = BACKEND
    config_model = KubernetesConfig
    # A pod has no access to files downloaded to this machine.
    downloads_paths = False

    def parse_config(self, config: BackendConfig) -> KubernetesConfig:
        """Returns a configuration as its model; also refuses keys that contradict each other."""
        return parse_kubernetes_config(config)

    def environment_kind(self, request: KubernetesRequest) -> str:
        """Returns ``docker``, MLflow's term for a container wherever it runs."""
        del request
        return "docker"

    def check(self, request: KubernetesRequest) -> None:
        """Raises `BackendError` if no image is named, the code can't be delivered, or a pod can't reach the tracking store."""
        others = sorted(set(request.docker_args or {}) - {"image"})
        if others:
            raise backend_error(
                f"docker_args {', '.join(map(repr, others))} apply to a Docker engine only. For a pod, use 'resources' or the "
                "job template of the backend configuration."
            )
        uri = reveal(request.tracking_uri)
        if _pod_tracking_uri(request.config) is None and uri and is_on_this_machine(uri):
            raise backend_error(
                f"The tracking URI {redact_url(uri)} is of this machine alone: a pod can't reach it. Track with a server "
                "(MLFLOW_TRACKING_URI), or set the URI for pods: 'tracking-uri' in the backend configuration, or the variable "
                f"{KUBE_TRACKING_URI_VARIABLE}."
            )
        manifest.build_job(_job_request(request, find_delivery(request)[0]))

    def map_paths(self, request: KubernetesRequest, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Returns paths relative to the project's folder; raises `BackendError` for one that is not delivered to the pod."""
        directory, delivered = request.working_copy.directory, None
        if find_delivery(request)[0] in ("archive", "image"):
            delivered = {file.name for file in project_files(request.working_copy, backend=BACKEND)}
        advice = (
            "Declare the parameter as 'uri' and open it in the project's code, or mount a volume in the job template and pass "
            "its path as a 'string'."
        )
        mapped: dict[str, str] = {}
        for name, value in paths.items():
            unreachable = f"The pod can't be given parameter {name!r}: {value}"
            if "://" in value or not value.startswith("/"):
                raise backend_error(f"{unreachable} is not part of the project. {advice}")
            if not Path(value).is_relative_to(directory):
                raise backend_error(f"{unreachable} is not inside the project {directory}. {advice}")
            mapped[name] = inside = Path(value).relative_to(directory).as_posix()
            if delivered is not None and inside != "." and inside not in delivered:
                raise backend_error(f"{unreachable} is not delivered. Include it by '!{inside}' in the .dockerignore.")
        return mapped

    def demands(self, request: KubernetesRequest) -> Demands:
        """Returns the images and mounts of the pod, and what weakens its isolation from its node."""
        import yaml

        planned = self.plan(request, "true").sections
        return manifest.demands(yaml.safe_load(planned["manifest"]), str(request.image or planned["image"]))

    def plan(self, request: KubernetesRequest, command: str) -> BackendPlan:
        """Returns the code delivery and the Job as YAML, without secrets."""
        import yaml

        delivery, reason = find_delivery(request)
        job_request = _job_request(request, delivery)
        image = job_request.image if delivery != "image" else f"{request.config.repository_uri}@DIGEST"
        project, entry_point = request.project.display_name, request.entry_point.name
        identity = contract.RunIdentity("FLOW-RUN-ID", "MLFLOW-RUN-ID", project, entry_point)
        variables = {name: name for name in sorted(manifest.PLAIN_VARIABLES)}
        job_request = replace(
            job_request,
            name=manifest.job_name(identity),
            labels=manifest.run_labels(identity, 1),
            child_env=_pod_env(request, {**variables, TRACKING_URI_VARIABLE: ""}, lambda _: None),
            image=image,
            command=command,
        )
        sections = {
            "code delivery": f"{delivery}: {reason}",
            "image": image,
            "manifest": redact(
                yaml.safe_dump(manifest.build_job(job_request), sort_keys=False, allow_unicode=True, width=999),
                *(each for each in secrets_in(request.config.kube_job_template) if not isinstance(each, Withheld)),
            ),
        }
        return BackendPlan("docker", sections=sections)

    def prepare(self, request: KubernetesRequest, report: Report, stop: StopSignal) -> _Prepared:
        """Chooses how the code gets to the pod; builds and pushes the image if the code is delivered in it."""
        delivery, reason = find_delivery(request)
        report(f"Code delivery: {delivery}, because {reason}.")
        image = _job_request(request, delivery).image
        if delivery == "image":
            return _push_project_image(request, image, report, stop)
        description = f"image {image}, code by {delivery}"
        return Prepared(request, delivery, description, True, image, {"mlflow.docker.image.uri": image})

    def execute(self, prepared: _Prepared, command: Command, events: ExecutionEvents, stop: StopSignal) -> Outcome:
        """Submits the Job, or finds the one that an earlier process submitted for this flow run, and watches it until it ends."""
        if stop.requested:
            return stopped_outcome(stop)
        request = prepared.request
        job_request = replace(_job_request(request, prepared.value), image=str(prepared.image))
        cluster = connect(request.config, nested(job_request.template, "metadata.namespace"))
        try:
            job_request = _add_run(replace(job_request, namespace=cluster.namespace), request, command, events.report)
            submitter = Submitter(cluster, command.identity, stop, events.report)
            job, attached = submitter.submit(job_request, request.working_copy)
            name, verb = job["metadata"]["name"], "Found the Job that runs already:" if attached else "Submitted Job"
            events.report(f"{verb} {name} in namespace {cluster.namespace} of {cluster.name}.")
            events.tag({JOB_TAG: name, NAMESPACE_TAG: cluster.namespace})
            return JobRun(cluster, job, attached, request.config, command.timeout, events, stop).follow()
        except ApiError as error:
            if stop.wait(0):
                return stopped_outcome(stop)
            raise refused(error, cluster.name) from None
        finally:
            cluster.client.close()


def _push_project_image(request: KubernetesRequest, base: str, report: Report, stop: StopSignal) -> _Prepared:
    """Builds the project's image on the Docker engine, unless its files are unchanged, and pushes it."""
    login = reveal_all(request.docker_auth) or None
    try:
        engine = connect_engine(LocalConfig(), backend=BACKEND, timeout=_ENGINE_SECONDS)
    except BackendError as error:
        raise BackendUnavailableError(
            f"'code-delivery: image' needs a Docker engine to build with. {error.message} 'code-delivery: archive' and 'git' "
            "need none.",
            backend=BACKEND,
        ) from None
    repository, copy = request.config.repository_uri, request.working_copy
    try:
        images = EngineImages(engine, BACKEND, report, stop)
        base_id, _ = images.ensure(base, "missing", login)
        built = images.build(base, base_id, copy, repository)
        image = images.push(built.name, login)
    finally:
        engine.close()
    tags = {"mlflow.docker.image.uri": image, "mlflow.docker.image.id": image.rpartition("@")[2]}
    return Prepared(request, "image", f"image {image}", built.reused, image, tags)


def _add_run(job_request: JobRequest, request: KubernetesRequest, command: Command, report: Report) -> JobRequest:
    """Adds the inputs of a Job that depend on the run; `report` receives warnings."""
    identity, child_env, checkout = command.identity, reveal_values(command.child_env), job_request.checkout
    annotations = {
        "project-name": identity.project,
        "entry-point-name": identity.entry_point,
        "source": request.working_copy.source_name,
        "code-delivery": job_request.delivery,
        **_links(command, request, child_env),
    }
    return replace(
        job_request,
        annotations={f"{manifest.PREFIX}/{key}": value for key, value in annotations.items()},
        child_env=_pod_env(request, child_env, report),
        command=command.line,
        checkout=with_credentials(checkout, request.git_credentials, request.working_copy) if checkout else None,
        deadline=None if command.timeout is None else math.ceil(command.timeout) + _DEADLINE_SLACK_SECONDS,
    )


def _job_request(request: KubernetesRequest, delivery: DeliveryName) -> JobRequest:
    """Returns the inputs of a request's Job that don't depend on the run; reads the template and finds the commit to clone.

    The image is that of ``docker_args``, else of ``docker_env``, else of the template's container.
    """
    config, environment = request.config, request.project.environment
    template = load_template(config, request.working_copy.directory)
    image, pod = request.image, nested(template, "spec.template.spec") or {}
    if not image and delivery != "image" and pod.get("containers"):
        image = manifest.project_container(pod).get("image")
    if not image:
        raise backend_error(
            "No image is named for the Kubernetes pod: pass docker_args={'image': 'name:tag'}, write 'docker_env: {image: ...}' "
            "into the MLproject file, or set the image of the job template's container."
        )
    return JobRequest(
        name="check",
        namespace=config.namespace or nested(template, "metadata.namespace") or "default",
        image=str(image),
        command="",
        delivery=delivery,
        config=config,
        template=template,
        volumes=environment.volumes if isinstance(environment, DockerEnvironment) else (),
        checkout=find_checkout(request.working_copy) if delivery == "git" else None,
        registry_auth=reveal_all(request.docker_auth),
        termination_grace=math.ceil(settings.grace_period()),
    )


def _pod_tracking_uri(config: KubernetesConfig) -> str | None:
    """Returns the tracking URI that is configured for pods; None if they use the run's."""
    return reveal_all(config.tracking_uri) or os.environ.get(KUBE_TRACKING_URI_VARIABLE) or None


def _pod_env(request: KubernetesRequest, child_env: Mapping[str, str], report: Report) -> dict[str, str]:
    """Returns the environment of the project's container; the values may be secret."""
    pod_env = {name: os.environ[name] for name in _TRACKING_CREDENTIALS if os.environ.get(name)}
    environment = request.project.environment
    for name, value in environment.environment if isinstance(environment, DockerEnvironment) else ():
        if value is None and name not in os.environ:
            report(f"Warning: docker_env copies the variable {name} from this machine, where it is not set.")
            continue
        pod_env[name] = os.environ[name] if value is None else value
    pod_env |= child_env
    # In the pod, this address would be the pod itself.
    if is_on_this_machine(pod_env.get("PREFECT_API_URL", "http://elsewhere")):
        del pod_env["PREFECT_API_URL"]
        pod_env.pop("PREFECT_API_AUTH_STRING", None)
    if override := _pod_tracking_uri(request.config):
        pod_env[TRACKING_URI_VARIABLE] = override
    for name in pod_env:
        if not _VARIABLE_NAME.fullmatch(name):
            raise backend_error(f"{name!r} is not a valid name for a variable of a pod.")
    if sum(len(name) + len(value.encode("utf-8", "replace")) for name, value in pod_env.items()) > _MAX_SECRET_BYTES:
        raise backend_error("The variables for the pod are larger than a Secret may be (1 MB).")
    return pod_env


def _links(command: Command, request: KubernetesRequest, child_env: Mapping[str, str]) -> dict[str, str]:
    """Returns the pages of the flow run and the MLflow run for annotations, as far as they are known."""
    api = child_env.get("PREFECT_API_URL", "").rstrip("/")
    page, _ = run_page(request.tracking_uri, child_env.get(EXPERIMENT_ID_VARIABLE, ""), command.identity.mlflow_run_id)
    links = {"mlflow-run-url": page} if page else {}
    # Prefect Cloud serves its pages under another host than its API.
    if api.endswith("/api"):
        links["flow-run-url"] = f"{redact(api.removesuffix('/api'))}/runs/flow-run/{command.identity.flow_run_id}"
    return links
