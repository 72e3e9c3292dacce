"""The Kubernetes backend: a project's command runs as a Job."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from prefect_mlprojects import settings
from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import reveal, reveal_all, reveal_values
from prefect_mlprojects.backends.contract import (
    Backend,
    BackendPlan,
    Command,
    ExecutionEvents,
    Prepared,
    Report,
    RunIdentity,
)
from prefect_mlprojects.backends.kubernetes.api import ApiError, Cluster, connect
from prefect_mlprojects.backends.kubernetes.config import (
    BACKEND,
    DeliveryName,
    KubernetesConfig,
    KubernetesRequest,
    backend_error,
    load_template,
    parse_kubernetes_config,
    template_namespace,
    template_pod,
)
from prefect_mlprojects.backends.kubernetes.delivery import (
    base_image,
    find_checkout,
    find_delivery,
    map_project_paths,
    no_image,
    pack_project,
    push_project_image,
    with_credentials,
)
from prefect_mlprojects.backends.kubernetes.diagnosis import refused
from prefect_mlprojects.backends.kubernetes.execution import JobRun, Limits
from prefect_mlprojects.backends.kubernetes.job import (
    DELIVERY_ANNOTATION,
    ENTRY_POINT_ANNOTATION,
    FLOW_RUN_URL_ANNOTATION,
    MLFLOW_RUN_URL_ANNOTATION,
    PLAIN_VARIABLES,
    PROJECT_ANNOTATION,
    SOURCE_ANNOTATION,
    JobRequest,
    build_job,
    job_name,
    project_container,
    run_labels,
)
from prefect_mlprojects.backends.kubernetes.submission import Submitter
from prefect_mlprojects.backends.outcome import Outcome, stopped_outcome
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.tracking.uris import (
    EXPERIMENT_ID_VARIABLE,
    TRACKING_URI_VARIABLE,
    is_on_this_machine,
    run_page,
)
from prefect_mlprojects.types import BackendConfig, StopSignal

JOB_TAG = "mlprojects.kubernetes.job"
NAMESPACE_TAG = "mlprojects.kubernetes.namespace"
KUBE_TRACKING_URI_VARIABLE = "KUBE_MLFLOW_TRACKING_URI"
"""MLflow's variable for the tracking URI that pods use."""

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
    """Runs a project's command as a Job."""

    name = BACKEND
    config_model = KubernetesConfig
    # A pod has no access to files downloaded to this machine.
    downloads_paths = False

    def parse_config(self, config: BackendConfig) -> KubernetesConfig:
        """Returns a configuration as its model.

        Raises:
            BackendError: A key is unknown (the nearest is named), a value has the wrong type, or keys contradict each other.
        """
        return parse_kubernetes_config(config)

    def environment_kind(self, request: KubernetesRequest) -> str:
        """Returns ``docker``, MLflow's term for a container wherever it runs."""
        del request
        return "docker"

    def check(self, request: KubernetesRequest) -> None:
        """Checks a request before anything is built or submitted.

        Raises:
            BackendError: No image is named, the code can't be delivered, or a pod can't reach the tracking store.
        """
        template = load_template(request.config, request.working_copy.directory)
        _check_docker_args(request)
        _check_tracking(request)
        delivery = find_delivery(request).delivery
        if delivery == "image":
            base_image(request)
        else:
            _image(request, template)
        build_job(_job_request(request, template, delivery, name="check", image="check"))

    def map_paths(self, request: KubernetesRequest, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Returns paths relative to the project's folder.

        Raises:
            BackendError: A path is not part of the project that is delivered to the pod.
        """
        return map_project_paths(request, find_delivery(request).delivery, paths)

    def plan(self, request: KubernetesRequest, command: str) -> BackendPlan:
        """Returns the code delivery and the Job as YAML, without secrets.

        Raises:
            BackendError: The request can't work.
        """
        import yaml

        template = load_template(request.config, request.working_copy.directory)
        choice = find_delivery(request)
        image = _image(request, template) if choice.delivery != "image" else f"{request.config.repository_uri}@DIGEST"
        identity = RunIdentity("FLOW-RUN-ID", "MLFLOW-RUN-ID", request.project.display_name, request.entry_point.name)
        variables = {name: name for name in sorted(PLAIN_VARIABLES)}
        job_request = _job_request(
            request,
            template,
            choice.delivery,
            name=job_name(identity),
            labels=run_labels(identity, 1),
            child_env=_pod_env(request, {**variables, TRACKING_URI_VARIABLE: ""}, lambda _: None),
            image=image,
            command=command,
        )
        sections = {
            "code delivery": f"{choice.delivery}: {choice.reason}",
            "image": image,
            "manifest": yaml.safe_dump(build_job(job_request), sort_keys=False, allow_unicode=True, width=1000),
        }
        return BackendPlan("docker", sections=sections)

    def prepare(self, request: KubernetesRequest, report: Report, stop: StopSignal) -> _Prepared:
        """Chooses how the code gets to the pod; builds and pushes the image if the code is delivered in it.

        Raises:
            BackendError: The code can't be delivered, or the image could not be built or pushed.
        """
        choice = find_delivery(request)
        report(f"Code delivery: {choice.delivery}, because {choice.reason}.")
        if choice.delivery == "image":
            pushed = push_project_image(request, report, stop)
            tags = {"mlflow.docker.image.uri": pushed.reference, "mlflow.docker.image.id": pushed.digest}
            description = f"image {pushed.reference}"
            return Prepared(request, choice.delivery, description, pushed.reused, pushed.reference, tags)
        image = _image(request, load_template(request.config, request.working_copy.directory))
        description = f"image {image}, code by {choice.delivery}"
        return Prepared(request, choice.delivery, description, True, image, {"mlflow.docker.image.uri": image})

    def execute(self, prepared: _Prepared, command: Command, events: ExecutionEvents, stop: StopSignal) -> Outcome:
        """Submits the Job, or finds the one that an earlier process submitted for this flow run, and watches it until it ends.

        Raises:
            BackendError: The cluster can't be reached or refused the Job.
        """
        if stop.requested:
            return stopped_outcome(stop)
        request = prepared.request
        template = load_template(request.config, request.working_copy.directory)
        cluster = connect(request.config, template_namespace(template))
        try:
            return _run_job(cluster, prepared, command, template, events, stop)
        except ApiError as error:
            if stop.wait(0):
                return stopped_outcome(stop)
            raise refused(error, cluster.name) from None
        finally:
            cluster.client.close()


def _run_job(
    cluster: Cluster,
    prepared: _Prepared,
    command: Command,
    template: Mapping[str, Any] | None,
    events: ExecutionEvents,
    stop: StopSignal,
) -> Outcome:
    request, identity, delivery = prepared.request, command.identity, prepared.value
    child_env = reveal_values(command.child_env)
    pod_env = _pod_env(request, child_env, events.report)
    git_credentials = request.git_credentials if delivery == "git" else None

    def make_request(name: str, attempt: int) -> JobRequest:
        return _job_request(
            request,
            template,
            delivery,
            name=name,
            namespace=cluster.namespace,
            labels=run_labels(identity, attempt),
            annotations={
                PROJECT_ANNOTATION: identity.project,
                ENTRY_POINT_ANNOTATION: identity.entry_point,
                SOURCE_ANNOTATION: request.working_copy.source_name,
                DELIVERY_ANNOTATION: delivery,
                **_link_annotations(identity, request, child_env),
            },
            child_env=pod_env,
            image=prepared.image,
            command=command.line,
            timeout=command.timeout,
            git_credentials=git_credentials,
        )

    def make_archive() -> bytes | None:
        return pack_project(request.working_copy.directory) if delivery == "archive" else None

    submission = Submitter(cluster, identity, stop, events.report).submit(make_request, make_archive)
    name = submission.job["metadata"]["name"]
    verb = "Found the Job that runs already:" if submission.attached else "Submitted Job"
    events.report(f"{verb} {name} in namespace {cluster.namespace} of {cluster.name}.")
    events.tag({JOB_TAG: name, NAMESPACE_TAG: cluster.namespace})
    limits = Limits(request.config.start_grace, request.config.scheduling_grace, command.timeout)
    return JobRun(cluster, submission, limits, TailedOutput(events), events, stop).follow()


def _check_docker_args(request: KubernetesRequest) -> None:
    others = sorted(set(request.docker_args or {}) - {"image"})
    if others:
        raise backend_error(
            f"docker_args {', '.join(map(repr, others))} apply to a Docker engine only. For a pod, use 'resources' or the job "
            "template of the backend configuration."
        )


def _image(request: KubernetesRequest, template: Mapping[str, Any] | None) -> str:
    """Returns the image of ``docker_args``, else of ``docker_env``, else of the template's container."""
    pod = template_pod(template)
    image = request.image or (project_container(pod).get("image") if pod.get("containers") else None)
    if not image:
        raise no_image()
    return str(image)


def _job_request(
    request: KubernetesRequest,
    template: Mapping[str, Any] | None,
    delivery: DeliveryName,
    *,
    name: str,
    image: str | None,
    namespace: str | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    child_env: Mapping[str, str] | None = None,
    command: str = "",
    timeout: float | None = None,
    git_credentials: Any = None,
) -> JobRequest:
    config, environment = request.config, request.project.environment
    checkout = find_checkout(request.working_copy) if delivery == "git" else None
    return JobRequest(
        name=name,
        namespace=namespace or config.namespace or template_namespace(template) or "default",
        image=image,
        command=command,
        delivery=delivery,
        config=config,
        template=template,
        labels=labels or {},
        annotations=annotations or {},
        child_env=child_env or {},
        volumes=environment.volumes if isinstance(environment, DockerEnvironment) else (),
        checkout=with_credentials(checkout, git_credentials) if checkout is not None else None,
        registry_auth=reveal_all(request.docker_auth),
        deadline=None if timeout is None else math.ceil(timeout) + _DEADLINE_SLACK_SECONDS,
        termination_grace=math.ceil(settings.grace_period()),
    )


def _pod_tracking_uri(config: KubernetesConfig) -> str | None:
    """Returns the tracking URI that is configured for pods; None if they use the run's."""
    return reveal_all(config.tracking_uri) or os.environ.get(KUBE_TRACKING_URI_VARIABLE) or None


def _check_tracking(request: KubernetesRequest) -> None:
    uri = reveal(request.tracking_uri)
    if _pod_tracking_uri(request.config) is None and uri and is_on_this_machine(uri):
        raise backend_error(
            f"The tracking URI {redact(uri)} is of this machine alone: a pod can't reach it. Track with a server "
            "(MLFLOW_TRACKING_URI), or set the URI for pods: 'tracking-uri' in the backend configuration, or the variable "
            f"{KUBE_TRACKING_URI_VARIABLE}."
        )


def _pod_env(request: KubernetesRequest, child_env: Mapping[str, str], report: Report) -> dict[str, str]:
    """Returns the environment of the project's container; the values may be secret."""
    pod_env = {name: os.environ[name] for name in _TRACKING_CREDENTIALS if os.environ.get(name)}
    environment = request.project.environment
    if isinstance(environment, DockerEnvironment):
        for name, value in environment.environment:
            if value is None and name not in os.environ:
                report(f"Warning: docker_env copies the variable {name} from this machine, where it is not set.")
                continue
            pod_env[name] = os.environ[name] if value is None else value
    pod_env |= child_env
    # In the pod, this address would be the pod itself.
    if is_on_this_machine(pod_env.get("PREFECT_API_URL", "http://elsewhere")):
        del pod_env["PREFECT_API_URL"]
    override = _pod_tracking_uri(request.config)
    if override is not None:
        pod_env[TRACKING_URI_VARIABLE] = override
    for name in pod_env:
        if not _VARIABLE_NAME.fullmatch(name):
            raise backend_error(f"{name!r} is not a valid name for a variable of a pod.")
    if sum(len(name) + len(value.encode("utf-8", "replace")) for name, value in pod_env.items()) > _MAX_SECRET_BYTES:
        raise backend_error("The variables for the pod are larger than a Secret may be (1 MB).")
    return pod_env


def _link_annotations(
    identity: RunIdentity, request: KubernetesRequest, child_env: Mapping[str, str]
) -> dict[str, str]:
    """Returns annotations with the pages of the flow run and the MLflow run, as far as they are known."""
    links: dict[str, str] = {}
    api = child_env.get("PREFECT_API_URL", "").rstrip("/")
    # Prefect Cloud serves its pages under another host than its API.
    if api.endswith("/api"):
        links[FLOW_RUN_URL_ANNOTATION] = f"{redact(api.removesuffix('/api'))}/runs/flow-run/{identity.flow_run_id}"
    page, _ = run_page(request.tracking_uri, child_env.get(EXPERIMENT_ID_VARIABLE, ""), identity.mlflow_run_id)
    if page:
        links[MLFLOW_RUN_URL_ANNOTATION] = page
    return links
