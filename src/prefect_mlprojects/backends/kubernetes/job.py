"""The Job of a run: the user's template, or a safe default, with what the run needs merged in; pure.

The format is ``batch/v1`` Job (https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_mlprojects.backends.containers.image import CODE_FOLDER, RUN_BY_SHELL
from prefect_mlprojects.backends.kubernetes.checkout import (
    CLONE_CONTAINER,
    CLONE_SCRIPT,
    REPOSITORY_FOLDER,
    GitCheckout,
)
from prefect_mlprojects.backends.kubernetes.config import BACKEND, DeliveryName, KubernetesConfig
from prefect_mlprojects.exceptions import BackendError

CONTAINER_NAME = "project"
ARCHIVE_DIRECTORY = "/mlflow/projects/archive"
ARCHIVE_FILE = "project.tar.gz"
DEFAULT_TTL_SECONDS = 86_400

_CODE_VOLUME = "mlprojects-code"
_ARCHIVE_VOLUME = "mlprojects-archive"
PLAIN_VARIABLES = frozenset({"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "PREFECT_MLPROJECTS_FLOW_RUN_ID"})
"""What may stand in the Job's spec; all other values go into the Secret, since none of them is known to be harmless."""

UNPACK_FAILED_CODE = 120
"""The exit code with which the prelude ends when it could not unpack the project."""
UNPACK_FAILED_TEXT = "mlprojects: the project could not be unpacked"

_UNPACK = f"""fail() {{ echo "{UNPACK_FAILED_TEXT}: $1" >&2; exit {UNPACK_FAILED_CODE}; }}
command -v tar >/dev/null 2>&1 || fail "the image has no tar"
command -v gzip >/dev/null 2>&1 || fail "the image has no gzip"
mkdir -p {CODE_FOLDER} && cd {CODE_FOLDER} || fail "{CODE_FOLDER} can't be used"
gzip -dc {ARCHIVE_DIRECTORY}/{ARCHIVE_FILE} | tar -xf - -o -p || fail "tar failed"
"""
# tar's -o: files belong to whoever unpacks them; busybox and GNU tar both know it, and no long options.


@dataclass(frozen=True)
class JobRequest:
    """All that a Job is made of.

    Attributes:
        name: The Job's name; its Secret and ConfigMap derive theirs from it.
        namespace: The namespace.
        image: The image; None when the template names it.
        command: The shell command line.
        delivery: How the code gets there.
        config: The configuration.
        template: The user's Job.
        labels: Labels for the Job and its pods.
        annotations: Annotations for the Job.
        variables: The command's environment; the values may be secret.
        volumes: Host paths to mount, in Docker's notation.
        checkout: What to clone, for ``git``.
        registry_auth: ``username``, ``password`` and ``registry`` with which the nodes pull the image.
        deadline: Seconds after which Kubernetes itself ends the Job; None for no limit.
        termination_grace: Seconds between asking a pod to end and killing it.
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
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    volumes: tuple[str, ...] = ()
    checkout: GitCheckout | None = None
    registry_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    deadline: int | None = None
    termination_grace: int = 10

    @property
    def variables_secret(self) -> str:
        """The name of the Secret that holds the variables."""
        return f"{self.name}-env"

    @property
    def registry_secret(self) -> str:
        """The name of the Secret with which the nodes pull the image."""
        return f"{self.name}-pull"

    @property
    def archive_map(self) -> str:
        """The name of the ConfigMap that holds the project."""
        return f"{self.name}-code"


def build_job(request: JobRequest) -> dict[str, Any]:
    """Returns the Job's manifest: plain JSON that holds no secret.

    What the template says is kept, except for the project's container's image (when another is named), command, our
    variables and mounts; what the configuration sets wins over the template.

    Raises:
        BackendError: There is no image, a volume can't be carried over, or the template's parts don't fit.
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
    container = project_container(pod)
    _set_container(container, pod, request)
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
    _settle(spec, "backoffLimit", config.backoff_limit, 0)
    _settle(spec, "ttlSecondsAfterFinished", config.ttl_seconds_after_finished, DEFAULT_TTL_SECONDS)
    deadline = config.timeout if config.timeout is not None else request.deadline
    if deadline is not None:
        spec["activeDeadlineSeconds"] = deadline


def _settle(spec: dict[str, Any], key: str, configured: object, default: object) -> None:
    """Sets a field to what is configured; else keeps the template's, else takes the default."""
    if configured is not None:
        spec[key] = configured
    elif spec.get(key) is None:
        spec[key] = default


def _set_pod_spec(pod: dict[str, Any], request: JobRequest) -> None:
    config = request.config
    pod.setdefault("restartPolicy", "Never")
    _settle(pod, "terminationGracePeriodSeconds", config.termination_grace, request.termination_grace)
    if config.service_account is not None:
        pod["serviceAccountName"] = config.service_account
        pod.pop("serviceAccount", None)
    if request.template is None:
        # A project needs no access to the cluster, unless somebody names an account for it.
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
        # As on a machine: an image that is there is used, whatever its tag.
        container["imagePullPolicy"] = "IfNotPresent"
        container["securityContext"] = {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    resources = request.config.resources
    if resources is not None:
        settled = _child(container, "resources")
        for kind, wanted in (("requests", resources.requests), ("limits", resources.limits)):
            if wanted:
                settled[kind] = {**(settled.get(kind) or {}), **wanted}
    prelude = _UNPACK + RUN_BY_SHELL if request.delivery == "archive" else RUN_BY_SHELL
    # The kubelet itself expands $(NAME) and $$ in these, before any shell sees them.
    container["command"] = ["sh", "-c", escape_expansion(prelude), "mlprojects"]
    container["args"] = [escape_expansion(request.command)]
    if request.delivery in ("archive", "image", "git"):
        container["workingDir"] = CODE_FOLDER
    ours = _environment(request)
    names = {each["name"] for each in ours}
    container["env"] = ours + [each for each in container.get("env") or [] if each.get("name") not in names]
    if request.delivery == "archive":
        archive = {"configMap": {"name": request.archive_map, "defaultMode": 0o444}}
        _mount(pod, container, _ARCHIVE_VOLUME, archive, ARCHIVE_DIRECTORY, read_only=True)
        _mount(pod, container, _CODE_VOLUME, {"emptyDir": {}}, CODE_FOLDER)
    elif request.delivery == "git":
        _add_clone(pod, container, request)
    for index, volume in enumerate(request.volumes):
        _mount_host_path(pod, container, volume, index, request.config)


def no_image() -> BackendError:
    """The error of a call that names no image."""
    return BackendError(
        "No image is named for the Kubernetes pod: pass docker_args={'image': 'name:tag'}, write 'docker_env: {image: …}' "
        "into the MLproject file, or give the job template's container an image.",
        backend=BACKEND,
    )


def escape_expansion(text: str) -> str:
    """Doubles each ``$``, which the kubelet takes back: it expands ``$(NAME)`` in commands and arguments, and ``$$`` to ``$``."""
    return text.replace("$", "$$")


def _environment(request: JobRequest) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, value in sorted(request.variables.items()):
        if name in PLAIN_VARIABLES:
            entries.append({"name": name, "value": escape_expansion(value)})
        else:
            reference = {"name": request.variables_secret, "key": name}
            entries.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return entries


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
        raise BackendError(
            f"The job template mounts a volume at {path}, where the project's code belongs; mount it elsewhere, or use "
            "'code-delivery: none'.",
            backend=BACKEND,
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
    if checkout.variables:
        clone["env"] = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": request.variables_secret, "key": name}}}
            for name in sorted(checkout.variables)
        ]
    # First: an init container of the user's may want the code.
    pod["initContainers"] = [clone, *(pod.get("initContainers") or [])]


def _mount_host_path(
    pod: dict[str, Any], container: dict[str, Any], volume: str, index: int, config: KubernetesConfig
) -> None:
    host, _, rest = volume.partition(":")
    path, _, mode = rest.partition(":")
    if not config.allow_host_paths:
        raise BackendError(
            f"The project's docker_env mounts {volume!r}, a folder of the machine; on a cluster that is a hostPath of "
            "whichever node the pod lands on. Allow it with 'allow-host-paths: true', or mount a volume in the job template.",
            backend=BACKEND,
        )
    if not host.startswith("/") or not path.startswith("/"):
        raise BackendError(
            f"The volume {volume!r} of docker_env can't become a hostPath: both of its paths must be absolute.",
            backend=BACKEND,
        )
    name = f"mlprojects-host-{index}"
    _mount(
        pod, container, name, {"hostPath": {"path": host}}, path.rstrip("/") or "/", read_only="ro" in mode.split(",")
    )
