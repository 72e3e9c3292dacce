"""Builds the Job of a run from the user's template, or a restrictive default; names and labels. Pure.

The format is ``batch/v1`` Job (https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/), the rules for names
and labels are those of https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and .../labels/.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_mlprojects.backends.containers.image import CODE_FOLDER, RUN_BY_SHELL
from prefect_mlprojects.backends.contract import RunIdentity
from prefect_mlprojects.backends.kubernetes.config import DeliveryName, KubernetesConfig, backend_error
from prefect_mlprojects.backends.kubernetes.delivery import (
    ARCHIVE_DIRECTORY,
    CLONE_CONTAINER,
    CLONE_SCRIPT,
    REPOSITORY_FOLDER,
    UNPACK_SCRIPT,
    GitCheckout,
    no_image,
)

PREFIX = "prefect-mlprojects"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
FLOW_RUN_LABEL = f"{PREFIX}/flow-run-id"
MLFLOW_RUN_LABEL = f"{PREFIX}/mlflow-run-id"
PROJECT_LABEL = f"{PREFIX}/project"
ENTRY_POINT_LABEL = f"{PREFIX}/entry-point"
ATTEMPT_LABEL = f"{PREFIX}/attempt"
ENDED_LABEL = f"{PREFIX}/ended"
"""Set once the Job's end was observed; a Job with this label is never attached to again."""

PREPARING_ANNOTATION = f"{PREFIX}/preparing"
"""Set while the Job is suspended because its Secret and ConfigMap are still being created."""
WATCHED_ANNOTATION = f"{PREFIX}/watched-at"
"""The heartbeat of the process that watches the Job, RFC 3339."""
PROJECT_ANNOTATION = f"{PREFIX}/project-name"
ENTRY_POINT_ANNOTATION = f"{PREFIX}/entry-point-name"
SOURCE_ANNOTATION = f"{PREFIX}/source"
DELIVERY_ANNOTATION = f"{PREFIX}/code-delivery"
FLOW_RUN_URL_ANNOTATION = f"{PREFIX}/flow-run-url"
MLFLOW_RUN_URL_ANNOTATION = f"{PREFIX}/mlflow-run-url"

# A Job's name becomes a label of its pods (63 characters), whose names append "-xxxxx"; the rest is for the Secrets' suffixes.
_MAX_NAME = 52

CONTAINER_NAME = "project"
DEFAULT_TTL_SECONDS = 86_400
PLAIN_VARIABLES = frozenset({"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "PREFECT_MLPROJECTS_FLOW_RUN_ID"})
"""Variables whose values may be in the Job's spec; all others go into the Secret, as they may be secret."""

_CODE_VOLUME = "mlprojects-code"
_ARCHIVE_VOLUME = "mlprojects-archive"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def job_name(identity: RunIdentity, attempt: int = 1) -> str:
    """Returns the name of a run's Job: a DNS-1123 label, the same for the same flow run and attempt (from 1)."""
    digest = hashlib.sha256(f"{identity.flow_run_id}/{attempt}".encode()).hexdigest()[:10]
    name = "-".join(filter(None, (_slug(identity.project), _slug(identity.entry_point)))) or "project"
    if not name[0].isalpha():
        name = f"p-{name}"
    return f"{name[: _MAX_NAME - len(digest) - 1].rstrip('-')}-{digest}"


def label_value(text: str) -> str:
    """Returns a text as a label's value: at most 63 letters, digits, ``-``, ``_`` and ``.``, the last three only inside."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("-_.")


def run_labels(identity: RunIdentity, attempt: int) -> dict[str, str]:
    """Returns the labels of a run's objects."""
    return {
        MANAGED_BY_LABEL: PREFIX,
        FLOW_RUN_LABEL: label_value(identity.flow_run_id),
        MLFLOW_RUN_LABEL: label_value(identity.mlflow_run_id),
        PROJECT_LABEL: label_value(identity.project),
        ENTRY_POINT_LABEL: label_value(identity.entry_point),
        ATTEMPT_LABEL: str(attempt),
    }


@dataclass(frozen=True)
class JobRequest:
    """The inputs of a Job's manifest.

    Attributes:
        name: The Job's name; the names of its Secrets and ConfigMap are derived from it.
        namespace: The namespace.
        image: The image; None if the template names it.
        command: The shell command line.
        delivery: How the code gets to the pod.
        config: The configuration.
        template: The user's Job.
        labels: Labels of the Job and its pods.
        annotations: Annotations of the Job.
        child_env: The command's environment; the values may be secret.
        volumes: Host paths to mount, in Docker's notation.
        checkout: The commit to clone, for ``git``.
        registry_auth: ``username``, ``password`` and ``registry`` for pulling the image.
        deadline: Time limit in seconds, enforced by Kubernetes; None: no limit.
        termination_grace: Seconds between SIGTERM and SIGKILL.
    """

    name: str
    namespace: str
    image: str | None
    command: str
    delivery: DeliveryName
    config: KubernetesConfig
    template: Mapping[str, Any] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    child_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    volumes: tuple[str, ...] = ()
    checkout: GitCheckout | None = None
    registry_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    deadline: int | None = None
    termination_grace: int = 10

    @property
    def variables_secret(self) -> str:
        """Name of the Secret with the variables."""
        return f"{self.name}-env"

    @property
    def registry_secret(self) -> str:
        """Name of the Secret with the registry login."""
        return f"{self.name}-pull"

    @property
    def archive_map(self) -> str:
        """Name of the ConfigMap with the project."""
        return f"{self.name}-code"


def build_job(request: JobRequest) -> dict[str, Any]:
    """Returns the Job's manifest: plain JSON without secrets.

    The template is kept, except for the command, the variables, the mounts and (if another is named) the image of the project's
    container; the configuration takes precedence over the template.

    Raises:
        BackendError: No image is named, a volume can't be mounted, or the template contradicts the request.
    """
    job: dict[str, Any] = copy.deepcopy(dict(request.template or {}))
    job["apiVersion"], job["kind"] = "batch/v1", "Job"
    job.pop("status", None)
    _set_metadata(job, request)
    spec = _child(job, "spec")
    _set_job_spec(spec, request)
    template = _child(spec, "template")
    metadata = _child(template, "metadata")
    metadata["labels"] = {**(metadata.get("labels") or {}), **request.labels}
    pod = _child(template, "spec")
    _set_pod_spec(pod, request)
    _set_container(project_container(pod), pod, request)
    return job


def project_container(pod_spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the container that runs the project: the one named ``project``, else the first."""
    containers: list[dict[str, Any]] = pod_spec["containers"]
    return next((each for each in containers if each.get("name") == CONTAINER_NAME), containers[0])


def _child(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        value = parent[key] = {}
    return value


def _set_metadata(job: dict[str, Any], request: JobRequest) -> None:
    metadata = _child(job, "metadata")
    for key in ("generateName", "uid", "resourceVersion", "creationTimestamp", "managedFields", "ownerReferences"):
        metadata.pop(key, None)
    metadata["name"], metadata["namespace"] = request.name, request.namespace
    metadata["labels"] = {**(metadata.get("labels") or {}), **request.labels}
    metadata["annotations"] = {**(metadata.get("annotations") or {}), **request.annotations}


def _set_job_spec(spec: dict[str, Any], request: JobRequest) -> None:
    config = request.config
    _resolve(spec, "backoffLimit", config.backoff_limit, 0)
    _resolve(spec, "ttlSecondsAfterFinished", config.ttl_seconds_after_finished, DEFAULT_TTL_SECONDS)
    deadline = config.timeout if config.timeout is not None else request.deadline
    if deadline is not None:
        spec["activeDeadlineSeconds"] = deadline


def _resolve(spec: dict[str, Any], key: str, configured: object, default: object) -> None:
    """Resolves a field: configuration, then template, then default."""
    if configured is not None:
        spec[key] = configured
    elif spec.get(key) is None:
        spec[key] = default


def _set_pod_spec(pod: dict[str, Any], request: JobRequest) -> None:
    config = request.config
    pod.setdefault("restartPolicy", "Never")
    _resolve(pod, "terminationGracePeriodSeconds", config.termination_grace, request.termination_grace)
    if config.service_account is not None:
        pod["serviceAccountName"] = config.service_account
        pod.pop("serviceAccount", None)
    if request.template is None:
        # A project needs no access to the cluster, unless the user names an account for it.
        pod.setdefault("automountServiceAccountToken", config.service_account is not None)
        pod.setdefault("securityContext", {"seccompProfile": {"type": "RuntimeDefault"}})
    if not pod.get("containers"):
        pod["containers"] = [{"name": CONTAINER_NAME}]
    secrets = [{"name": name} for name in config.image_pull_secrets]
    if request.registry_auth:
        secrets.append({"name": request.registry_secret})
    if secrets:
        present = list(pod.get("imagePullSecrets") or [])
        pod["imagePullSecrets"] = present + [each for each in secrets if each not in present]


def _set_container(container: dict[str, Any], pod: dict[str, Any], request: JobRequest) -> None:
    container.setdefault("name", CONTAINER_NAME)
    if request.image is not None:
        container["image"] = request.image
    elif not container.get("image"):
        raise no_image()
    if request.template is None:
        # As with Docker: an image that the node has is used, whatever its tag.
        container["imagePullPolicy"] = "IfNotPresent"
        container["securityContext"] = {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    resources = request.config.resources
    if resources is not None:
        merged = _child(container, "resources")
        for kind, wanted in (("requests", resources.requests), ("limits", resources.limits)):
            if wanted:
                merged[kind] = {**(merged.get(kind) or {}), **wanted}
    prelude = UNPACK_SCRIPT + RUN_BY_SHELL if request.delivery == "archive" else RUN_BY_SHELL
    container["command"] = ["sh", "-c", escape_expansion(prelude), "mlprojects"]
    container["args"] = [escape_expansion(request.command)]
    if request.delivery in ("archive", "image", "git"):
        container["workingDir"] = CODE_FOLDER
    env = _container_env(request)
    names = {each["name"] for each in env}
    container["env"] = env + [each for each in container.get("env") or [] if each.get("name") not in names]
    if request.delivery == "archive":
        archive = {"configMap": {"name": request.archive_map, "defaultMode": 0o444}}
        _mount(pod, container, _ARCHIVE_VOLUME, archive, ARCHIVE_DIRECTORY, read_only=True)
        _mount(pod, container, _CODE_VOLUME, {"emptyDir": {}}, CODE_FOLDER)
    elif request.delivery == "git":
        _add_clone(pod, container, request)
    for index, volume in enumerate(request.volumes):
        _mount_host_path(pod, container, volume, index, request.config)


def escape_expansion(text: str) -> str:
    """Doubles each ``$``: in commands and arguments, the kubelet expands ``$(NAME)`` and turns ``$$`` into ``$``."""
    return text.replace("$", "$$")


def _container_env(request: JobRequest) -> list[dict[str, Any]]:
    return [
        {"name": name, "value": escape_expansion(value)} if name in PLAIN_VARIABLES else _secret_variable(name, request)
        for name, value in sorted(request.child_env.items())
    ]


def _secret_variable(name: str, request: JobRequest) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": request.variables_secret, "key": name}}}


def _mount(
    pod: dict[str, Any],
    container: dict[str, Any],
    name: str,
    source: Mapping[str, Any],
    path: str,
    *,
    read_only: bool = False,
    sub_path: str = "",
) -> None:
    volumes = list(pod.get("volumes") or [])
    if not any(each.get("name") == name for each in volumes):
        volumes.append({"name": name, **source})
    pod["volumes"] = volumes
    mount: dict[str, Any] = {"name": name, "mountPath": path}
    if read_only:
        mount["readOnly"] = True
    if sub_path:
        mount["subPath"] = sub_path
    mounts = list(container.get("volumeMounts") or [])
    if any(each.get("mountPath", "").rstrip("/") == path for each in mounts):
        raise backend_error(
            f"The job template mounts a volume at {path}, the folder of the project's code; mount it elsewhere, or use "
            "'code-delivery: none'."
        )
    container["volumeMounts"] = [*mounts, mount]


def _add_clone(pod: dict[str, Any], container: dict[str, Any], request: JobRequest) -> None:
    checkout = request.checkout
    assert checkout is not None
    below = "/".join(filter(None, (REPOSITORY_FOLDER, checkout.subdirectory.strip("/"))))
    _mount(pod, container, _CODE_VOLUME, {"emptyDir": {}}, CODE_FOLDER, sub_path=below)
    clone: dict[str, Any] = {
        "name": CLONE_CONTAINER,
        "image": request.config.git_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", escape_expansion(CLONE_SCRIPT), "mlprojects"],
        "args": [escape_expansion(each) for each in (CODE_FOLDER, checkout.url, checkout.commit)],
        "volumeMounts": [{"name": _CODE_VOLUME, "mountPath": CODE_FOLDER}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if checkout.child_env:
        clone["env"] = [_secret_variable(name, request) for name in sorted(checkout.child_env)]
    # First: the user's init containers may need the code.
    pod["initContainers"] = [clone, *(pod.get("initContainers") or [])]


def _mount_host_path(
    pod: dict[str, Any], container: dict[str, Any], volume: str, index: int, config: KubernetesConfig
) -> None:
    host, _, rest = volume.partition(":")
    path, _, mode = rest.partition(":")
    if not config.allow_host_paths:
        raise backend_error(
            f"The project's docker_env mounts {volume!r}, a folder of the machine; on a cluster that is a hostPath of "
            "whichever node the pod runs on. Allow it with 'allow-host-paths: true', or mount a volume in the job template."
        )
    if not host.startswith("/") or not path.startswith("/"):
        raise backend_error(
            f"The volume {volume!r} of docker_env can't become a hostPath: both of its paths must be absolute."
        )
    source = {"hostPath": {"path": host}}
    read_only = "ro" in mode.split(",")
    _mount(pod, container, f"mlprojects-host-{index}", source, path.rstrip("/") or "/", read_only=read_only)
