"""The Kubernetes backend: a project's command runs as a Job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefect_mlprojects import settings
from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects._support.secrets import reveal_all, reveal_values
from prefect_mlprojects.backends.contract import (
    Backend,
    BackendPlan,
    Command,
    ExecutionEvents,
    Prepared,
    Report,
    RunIdentity,
)
from prefect_mlprojects.backends.kubernetes import names
from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Cluster
from prefect_mlprojects.backends.kubernetes.checkout import GitCheckout, git_checkout, signed_in
from prefect_mlprojects.backends.kubernetes.config import (
    BACKEND,
    DeliveryName,
    KubernetesConfig,
    KubernetesRequest,
    load_template,
    parse_kubernetes_config,
)
from prefect_mlprojects.backends.kubernetes.connection import connect
from prefect_mlprojects.backends.kubernetes.delivery import WAYS, find_delivery, map_values, pack_project
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal
from prefect_mlprojects.backends.kubernetes.execution import JobRun, Limits
from prefect_mlprojects.backends.kubernetes.images import base_image, push_project_image
from prefect_mlprojects.backends.kubernetes.job import JobRequest, build_job, no_image, project_container
from prefect_mlprojects.backends.kubernetes.pod_env import check_tracking, link_annotations, pod_variables
from prefect_mlprojects.backends.kubernetes.submission import submit
from prefect_mlprojects.backends.outcome import Outcome, stopped_outcome
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.types import BackendConfig, StopSignal

JOB_TAG = "mlprojects.kubernetes.job"
NAMESPACE_TAG = "mlprojects.kubernetes.namespace"
_DEADLINE_SLACK_SECONDS = 60
"""How much later than this process Kubernetes itself ends a Job at its timeout: for when nobody watches any more."""


class KubernetesBackend(Backend[KubernetesConfig, DeliveryName]):
    """Runs a project's command as a Job."""

    name = BACKEND
    config_model = KubernetesConfig
    # A pod would not see what is downloaded here.
    downloads_paths = False

    def parse_config(self, config: BackendConfig) -> KubernetesConfig:
        """Returns a configuration as its model.

        Raises:
            BackendError: A key is unknown (the nearest is named), a value is of the wrong type, or keys contradict each other.
        """
        return parse_kubernetes_config(config)

    def environment_kind(self, request: KubernetesRequest) -> str:
        """Returns ``docker``, MLflow's word for a container wherever it runs."""
        del request
        return "docker"

    def check(self, request: KubernetesRequest) -> None:
        """Checks a request before anything is built or submitted.

        Raises:
            BackendError: No image is named, the code can't be delivered, or a pod can't reach the tracking store.
        """
        template = load_template(request.config, request.working_copy.directory)
        _check_docker_args(request)
        check_tracking(request)
        delivery = find_delivery(request).delivery
        if delivery == "image":
            base_image(request)
        else:
            _image(request, template)
        _job_request(request, template, delivery, name="check", labels={}, variables={}, image="check")

    def map_paths(self, request: KubernetesRequest, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Returns relative paths for files of the project.

        Raises:
            BackendError: A path is not part of the project that gets to the pod.
        """
        return map_values(request, find_delivery(request).delivery, paths)

    def plan(self, request: KubernetesRequest, command: str) -> BackendPlan:
        """Returns what would be submitted: how the code gets to the pod, and the Job as YAML, without secrets.

        Raises:
            BackendError: It could not work.
        """
        import yaml

        template = load_template(request.config, request.working_copy.directory)
        choice = find_delivery(request)
        image = _image(request, template) if choice.delivery != "image" else f"{request.config.repository_uri}@DIGEST"
        identity = RunIdentity("FLOW-RUN-ID", "MLFLOW-RUN-ID", request.project.display_name, request.entry_point.name)
        variables = {name: name for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "PREFECT_MLPROJECTS_FLOW_RUN_ID")}
        job_request = _job_request(
            request,
            template,
            choice.delivery,
            name=names.job_name(identity),
            labels=names.run_labels(identity, 1),
            variables=pod_variables(request, {**variables, "MLFLOW_TRACKING_URI": ""}, lambda _: None),
            image=image,
            command=command,
        )
        sections = {
            "code delivery": f"{choice.delivery}: {choice.reason}",
            "image": image,
            "manifest": yaml.safe_dump(build_job(job_request), sort_keys=False, allow_unicode=True, width=1000),
        }
        return BackendPlan("docker", sections=sections)

    def prepare(
        self, request: KubernetesRequest, report: Report, stop: StopSignal
    ) -> Prepared[KubernetesConfig, DeliveryName]:
        """Chooses how the code gets to the pod; builds and pushes the image if the code is delivered in it.

        Raises:
            BackendError: The code can't be delivered, or the image could not be built or pushed.
        """
        choice = find_delivery(request)
        report(f"Code delivery: {choice.delivery}, because {choice.reason}.")
        if choice.delivery == "image":
            pushed = push_project_image(request, report, stop)
            tags = {"mlflow.docker.image.uri": pushed.reference, "mlflow.docker.image.id": pushed.digest}
            return Prepared(
                request, choice.delivery, f"image {pushed.reference}", pushed.reused, pushed.reference, tags
            )
        image = _image(request, load_template(request.config, request.working_copy.directory))
        description = f"image {image}, code by {choice.delivery}"
        return Prepared(request, choice.delivery, description, True, image, {"mlflow.docker.image.uri": image})

    def execute(
        self,
        prepared: Prepared[KubernetesConfig, DeliveryName],
        command: Command,
        events: ExecutionEvents,
        stop: StopSignal,
    ) -> Outcome:
        """Submits the Job, or finds the one that an earlier process submitted for this flow run, and stays until it ended.

        Raises:
            BackendError: The cluster can't be reached or refused the Job.
        """
        if stop.requested:
            return stopped_outcome(stop)
        config = prepared.request.config
        template = load_template(config, prepared.request.working_copy.directory)
        client, namespace, name = connect(config)
        cluster = Cluster(client, config.namespace or _template_namespace(template) or namespace, name)
        try:
            return self._execute(cluster, prepared, command, template, events, stop)
        except ApiRefusal as refusal:
            if stop.wait(0):
                return stopped_outcome(stop)
            cause, advice = explain_refusal(refusal, cluster.name)
            raise BackendError(f"{cause[:1].upper()}{cause[1:]}. {advice}".strip(), backend=BACKEND) from None
        finally:
            client.close()

    def _execute(
        self,
        cluster: Cluster,
        prepared: Prepared[KubernetesConfig, DeliveryName],
        command: Command,
        template: Mapping[str, Any] | None,
        events: ExecutionEvents,
        stop: StopSignal,
    ) -> Outcome:
        request, identity, delivery = prepared.request, command.identity, prepared.value
        child_env = reveal_values(command.child_env)
        variables = pod_variables(request, child_env, events.report)

        checkout: GitCheckout | None = None
        if delivery == "git":
            checkout = signed_in(git_checkout(request.working_copy, WAYS), request.git_credentials)

        def make(name: str, attempt: int) -> JobRequest:
            return _job_request(
                request,
                template,
                delivery,
                name=name,
                namespace=cluster.namespace,
                labels=names.run_labels(identity, attempt),
                annotations={
                    names.PROJECT_ANNOTATION: identity.project,
                    names.ENTRY_POINT_ANNOTATION: identity.entry_point,
                    names.SOURCE_ANNOTATION: request.working_copy.source_name,
                    names.DELIVERY_ANNOTATION: delivery,
                    **link_annotations(identity, request, child_env),
                },
                variables=variables,
                image=prepared.image,
                command=command.line,
                timeout=command.timeout,
                checkout=checkout,
            )

        def archive() -> bytes | None:
            return pack_project(request.working_copy.directory) if delivery == "archive" else None

        submission = submit(cluster, identity, make, archive, stop, events.report)
        job = submission.job
        name, attempt = job["metadata"]["name"], job["metadata"]["labels"][names.ATTEMPT_LABEL]
        verb = "Found the Job that runs already:" if submission.attached else "Submitted Job"
        events.report(f"{verb} {name} in namespace {cluster.namespace} of {cluster.name}.")
        events.tag({JOB_TAG: name, NAMESPACE_TAG: cluster.namespace})
        limits = Limits(request.config.start_grace, request.config.scheduling_grace, command.timeout)
        selector = names.pod_selector(identity.flow_run_id, attempt)
        return JobRun(cluster, submission, selector, limits, TailedOutput(events), events, stop).follow()


def _template_namespace(template: Mapping[str, Any] | None) -> str | None:
    namespace = ((template or {}).get("metadata") or {}).get("namespace")
    return namespace if isinstance(namespace, str) else None


def _check_docker_args(request: KubernetesRequest) -> None:
    others = sorted(set(request.docker_args or {}) - {"image"})
    if others:
        raise BackendError(
            f"docker_args {', '.join(map(repr, others))} mean something to a Docker engine only. For a pod, write what they "
            "are for into 'resources' or the job template of the backend configuration.",
            backend=BACKEND,
        )


def _image(request: KubernetesRequest, template: Mapping[str, Any] | None) -> str:
    """The image that the request names: ``docker_args``, else ``docker_env``, else the template's container.

    Raises:
        BackendError: None of them does.
    """
    image = request.image
    if not image:
        pod = (((template or {}).get("spec") or {}).get("template") or {}).get("spec") or {}
        image = project_container(pod).get("image") if pod.get("containers") else None
    if not image:
        raise no_image()
    return str(image)


def _job_request(
    request: KubernetesRequest,
    template: Mapping[str, Any] | None,
    delivery: DeliveryName,
    *,
    name: str,
    labels: Mapping[str, str],
    variables: Mapping[str, str],
    image: str | None,
    namespace: str = "",
    annotations: Mapping[str, str] | None = None,
    command: str = "",
    timeout: float | None = None,
    checkout: GitCheckout | None = None,
) -> JobRequest:
    config, environment = request.config, request.project.environment
    return JobRequest(
        name=name,
        namespace=namespace or config.namespace or _template_namespace(template) or "default",
        image=image,
        command=command,
        delivery=delivery,
        config=config,
        template=template,
        labels=labels,
        annotations=annotations or {},
        variables=variables,
        volumes=environment.volumes if isinstance(environment, DockerEnvironment) else (),
        checkout=checkout if checkout or delivery != "git" else git_checkout(request.working_copy, WAYS),
        registry_auth=reveal_all(request.docker_auth),
        deadline=None if timeout is None else math.ceil(timeout) + _DEADLINE_SLACK_SECONDS,
        termination_grace=math.ceil(settings.grace_period()),
    )
