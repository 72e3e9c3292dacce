"""The Kubernetes backend: a project's command runs as a Job."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from prefect_mlprojects import settings
from prefect_mlprojects._support.output import TailedOutput
from prefect_mlprojects.backends.contract import (
    BackendCall,
    ExecutionOutcome,
    ExecutionRequest,
    NoEvents,
    Preparation,
    RunIdentity,
)
from prefect_mlprojects.backends.kubernetes import names
from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Cluster
from prefect_mlprojects.backends.kubernetes.checkout import GitCheckout, git_checkout, signed_in
from prefect_mlprojects.backends.kubernetes.config import (
    BACKEND,
    DeliveryName,
    KubernetesConfig,
    dump_config,
    load_template,
    parse_kubernetes_config,
)
from prefect_mlprojects.backends.kubernetes.connection import connect
from prefect_mlprojects.backends.kubernetes.delivery import WAYS, call_delivery, pack_project, place_values
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal
from prefect_mlprojects.backends.kubernetes.execution import JobRun, Limits
from prefect_mlprojects.backends.kubernetes.images import base_image, push_project_image
from prefect_mlprojects.backends.kubernetes.job import JobRequest, build_job, no_image, project_container
from prefect_mlprojects.backends.kubernetes.submission import submit
from prefect_mlprojects.backends.kubernetes.surroundings import check_tracking, link_annotations, pod_variables
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.types import BackendConfig, OutputSink, StopSignal

JOB_TAG = "mlprojects.kubernetes.job"
NAMESPACE_TAG = "mlprojects.kubernetes.namespace"
_DELIVERY_FACT = "delivery"
_DEADLINE_SLACK_SECONDS = 60
"""How much later than this process Kubernetes itself ends a Job at its timeout: for when nobody watches any more."""


class KubernetesBackend:
    """Runs a project's command as a Job; a ``PreparingBackend`` and a ``PlanningBackend``."""

    @property
    def environment_kind(self) -> str:
        """The kind of the environment for MLflow's tag; as MLflow, which calls a container so wherever it runs."""
        return "docker"

    @property
    def downloads_paths(self) -> bool:
        """Remote ``path`` parameters are not downloaded here: a pod would not see them."""
        return False

    def validate_config(self, config: BackendConfig) -> BackendConfig:
        """Checks the configuration without touching the network.

        Raises:
            BackendError: A key is unknown (the nearest is named), a value is not of its kind, or keys contradict each other.
        """
        return dump_config(parse_kubernetes_config(config))

    def check(self, call: BackendCall) -> None:
        """Checks a call before anything is built or submitted.

        Raises:
            BackendError: There is no image, no way for the code, or the tracking store is of this machine alone.
        """
        config = parse_kubernetes_config(call.config)
        template = load_template(config, call.working_copy.directory)
        _check_docker_args(call)
        check_tracking(call, config)
        delivery = call_delivery(call, config).delivery
        if delivery == "image":
            base_image(call)
        else:
            _image(call, template)
        _request(call, config, template, delivery, name="check", labels={}, variables={}, image="check")

    def place_paths(self, call: BackendCall, values: Mapping[str, str]) -> Mapping[str, str]:
        """Returns relative paths for what is part of the project.

        Raises:
            BackendError: A value is not part of the project that gets to the pod.
        """
        config = parse_kubernetes_config(call.config)
        return place_values(call, call_delivery(call, config).delivery, values)

    def prepare(self, call: BackendCall, report: Callable[[str], None], stop: StopSignal) -> Preparation:
        """Chooses how the code gets to the pod, and builds and pushes the image where that is the way.

        Raises:
            BackendError: No way fits, or the image could not be built or pushed.
        """
        config = parse_kubernetes_config(call.config)
        choice = call_delivery(call, config)
        report(f"Code delivery: {choice.delivery}, because {choice.reason}.")
        facts = {_DELIVERY_FACT: choice.delivery}
        if choice.delivery == "image":
            pushed = push_project_image(call, config, report, stop)
            tags = {"mlflow.docker.image.uri": pushed.reference, "mlflow.docker.image.id": pushed.digest}
            return Preparation(f"image {pushed.reference}", pushed.reused, pushed.reference, tags, facts)
        template = load_template(config, call.working_copy.directory)
        image = _image(call, template)
        description = f"image {image}, code by {choice.delivery}"
        return Preparation(description, True, image, {"mlflow.docker.image.uri": image}, facts)

    def plan(self, call: BackendCall, command: str) -> Mapping[str, str]:
        """Returns what would be submitted: how the code gets there, and the Job as YAML, with no secret in it.

        Raises:
            BackendError: It could not work.
        """
        import yaml

        config = parse_kubernetes_config(call.config)
        template = load_template(config, call.working_copy.directory)
        choice = call_delivery(call, config)
        image = _image(call, template) if choice.delivery != "image" else f"{config.repository_uri}@DIGEST"
        identity = RunIdentity("FLOW-RUN-ID", "MLFLOW-RUN-ID", call.project.display_name, call.entry_point.name)
        variables = {name: name for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "PREFECT_MLPROJECTS_FLOW_RUN_ID")}
        request = _request(
            call,
            config,
            template,
            choice.delivery,
            name=names.job_name(identity),
            labels=names.run_labels(identity, 1),
            variables=pod_variables(call, config, {**variables, "MLFLOW_TRACKING_URI": ""}, NoEvents().report),
            image=image,
            command=command,
        )
        return {
            "code delivery": f"{choice.delivery}: {choice.reason}",
            "image": image,
            "manifest": yaml.safe_dump(build_job(request), sort_keys=False, allow_unicode=True, width=1000),
        }

    def execute(self, request: ExecutionRequest, output: OutputSink, stop: StopSignal) -> ExecutionOutcome:
        """Submits the Job, or finds the one that an earlier process submitted for this flow run, and stays until it ended.

        Raises:
            BackendError: The cluster can't be reached or refused the Job.
        """
        if stop.requested:
            return ExecutionOutcome("stopped", cause=str(stop.reason))
        call, preparation = request.call, request.preparation
        if call is None or preparation is None:
            raise BackendError("The kubernetes backend was given no call to run.", backend=BACKEND)
        config = parse_kubernetes_config(request.config)
        template = load_template(config, request.working_directory)
        client, namespace, name = connect(config)
        cluster = Cluster(client, config.namespace or _template_namespace(template) or namespace, name)
        try:
            return self._execute(cluster, request, call, preparation, template, config, TailedOutput(output), stop)
        except ApiRefusal as refusal:
            if stop.wait(0):
                return ExecutionOutcome("stopped", cause=str(stop.reason))
            cause, advice = explain_refusal(refusal, cluster.name)
            raise BackendError(f"{cause[:1].upper()}{cause[1:]}. {advice}".strip(), backend=BACKEND) from None
        finally:
            client.close()

    def _execute(
        self,
        cluster: Cluster,
        request: ExecutionRequest,
        call: BackendCall,
        preparation: Preparation,
        template: Mapping[str, Any] | None,
        config: KubernetesConfig,
        output: TailedOutput,
        stop: StopSignal,
    ) -> ExecutionOutcome:
        identity, events = request.identity, request.events
        delivery: DeliveryName = preparation.facts[_DELIVERY_FACT]  # type: ignore[assignment]  # as prepare wrote it
        variables = pod_variables(call, config, request.variables, events.report)

        checkout: GitCheckout | None = None
        if delivery == "git":
            checkout = signed_in(git_checkout(call.working_copy, WAYS), call.git_credentials)

        def make(name: str, attempt: int) -> JobRequest:
            return _request(
                call,
                config,
                template,
                delivery,
                name=name,
                namespace=cluster.namespace,
                labels=names.run_labels(identity, attempt),
                annotations={
                    names.PROJECT_ANNOTATION: identity.project,
                    names.ENTRY_POINT_ANNOTATION: identity.entry_point,
                    names.SOURCE_ANNOTATION: call.working_copy.source_name,
                    names.DELIVERY_ANNOTATION: delivery,
                    **link_annotations(identity, call, request.variables),
                },
                variables=variables,
                image=preparation.image,
                command=request.command,
                timeout=request.timeout,
                checkout=checkout,
            )

        def archive() -> bytes | None:
            return pack_project(request.working_directory) if delivery == "archive" else None

        submission = submit(cluster, identity, make, archive, stop, events.report)
        job = submission.job
        name, attempt = job["metadata"]["name"], job["metadata"]["labels"][names.ATTEMPT_LABEL]
        verb = "Found the Job that runs already:" if submission.attached else "Submitted Job"
        events.report(f"{verb} {name} in namespace {cluster.namespace} of {cluster.name}.")
        events.tag({JOB_TAG: name, NAMESPACE_TAG: cluster.namespace})
        limits = Limits(config.start_grace, config.scheduling_grace, request.timeout)
        selector = names.pod_selector(identity.flow_run_id, attempt)
        return JobRun(cluster, submission, selector, limits, output, events, stop).follow()


def _template_namespace(template: Mapping[str, Any] | None) -> str | None:
    namespace = ((template or {}).get("metadata") or {}).get("namespace")
    return namespace if isinstance(namespace, str) else None


def _check_docker_args(call: BackendCall) -> None:
    others = sorted(set(call.docker_args or {}) - {"image"})
    if others:
        raise BackendError(
            f"docker_args {', '.join(map(repr, others))} mean something to a Docker engine only. For a pod, write what they "
            "are for into 'resources' or the job template of the backend configuration.",
            backend=BACKEND,
        )


def _image(call: BackendCall, template: Mapping[str, Any] | None) -> str:
    """The image that the call names: ``docker_args``, else ``docker_env``, else the template's container.

    Raises:
        BackendError: None of them does.
    """
    image = call.image
    if not image:
        pod = (((template or {}).get("spec") or {}).get("template") or {}).get("spec") or {}
        image = project_container(pod).get("image") if pod.get("containers") else None
    if not image:
        raise no_image()
    return str(image)


def _request(
    call: BackendCall,
    config: KubernetesConfig,
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
    environment = call.project.environment
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
        checkout=checkout if checkout or delivery != "git" else git_checkout(call.working_copy, WAYS),
        registry_auth=call.docker_auth,
        deadline=None if timeout is None else math.ceil(timeout) + _DEADLINE_SLACK_SECONDS,
        termination_grace=math.ceil(settings.grace_period()),
    )
