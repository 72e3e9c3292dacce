"""Builds a run's Job and the objects that it owns: names, labels, manifests, and the scripts that deliver the code. Pure.

The format is ``batch/v1`` Job (https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/), the rules for names
and labels are those of https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and .../labels/.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_mlprojects.backends.containers.image import CODE_FOLDER
from prefect_mlprojects.backends.containers.prelude import RUN_BY_SHELL, STOP_WHILE_PREPARING
from prefect_mlprojects.backends.contract import Demands, RunIdentity
from prefect_mlprojects.backends.kubernetes.api import Json
from prefect_mlprojects.backends.kubernetes.config import DeliveryName, KubernetesConfig, backend_error

PREFIX = "prefect-mlprojects"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
SELECTOR = f"{MANAGED_BY_LABEL}={PREFIX}"
"""Selects the Jobs of runs."""
FLOW_RUN_LABEL = f"{PREFIX}/flow-run-id"
MLFLOW_RUN_LABEL = f"{PREFIX}/mlflow-run-id"
PROJECT_LABEL = f"{PREFIX}/project"
ENTRY_POINT_LABEL = f"{PREFIX}/entry-point"
ATTEMPT_LABEL = f"{PREFIX}/attempt"
ENDED_LABEL = f"{PREFIX}/ended"  # set once the Job's end was observed; a Job with this label is never attached to again
PREPARING_ANNOTATION = f"{PREFIX}/preparing"
"""Set while the Job is suspended because its Secret and ConfigMap are still being created."""
WATCHED_ANNOTATION = f"{PREFIX}/watched-at"  # the heartbeat of the process that watches the Job, RFC 3339

# A Job's name becomes a label of its pods (63 characters), whose names append "-xxxxx"; the rest is for the suffixes of the
# Secrets and the ConfigMap.
_MAX_NAME = 52
_VARIABLES_SUFFIX, _LOGIN_SUFFIX, _ARCHIVE_SUFFIX = "-env", "-pull", "-code"
_CONTAINER_NAME = "project"
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DEFAULT_TTL_SECONDS = 86_400
PLAIN_VARIABLES = frozenset({"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "PREFECT_MLPROJECTS_FLOW_RUN_ID"})
"""Variables whose values may be in the Job's spec; all others go into the Secret, as they may be secret."""
_CODE_VOLUME = "mlprojects-code"
_ARCHIVE_DIRECTORY = "/mlflow/projects/archive"
_ARCHIVE_FILE = "project.tar.gz"
CLONE_CONTAINER = "mlprojects-clone"
_REPOSITORY_FOLDER = ".repository"  # the repository's folder in the volume that becomes the project's folder
_NO_PRIVILEGES = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

UNPACK_FAILED_CODE = 120  # the exit code of `_UNPACK_SCRIPT` when it fails
# tar's -o: files belong to the user who unpacks them; busybox and GNU tar both have it, but share no long option.
_UNPACK_SCRIPT = f"""fail() {{ echo "mlprojects: the project could not be unpacked: $1" >&2; exit {UNPACK_FAILED_CODE}; }}
command -v tar >/dev/null 2>&1 || fail "the image has no tar"
command -v gzip >/dev/null 2>&1 || fail "the image has no gzip"
mkdir -p {CODE_FOLDER} && cd {CODE_FOLDER} || fail "{CODE_FOLDER} can't be used"
gzip -dc {_ARCHIVE_DIRECTORY}/{_ARCHIVE_FILE} | tar -xf - -o -p || fail "tar failed"
"""

GIT_TOKEN = "MLPROJECTS_GIT_TOKEN"  # noqa: S105 - the name of a variable
GIT_USERNAME = "MLPROJECTS_GIT_USERNAME"
GIT_SSH_KEY = "MLPROJECTS_GIT_SSH_KEY"
GIT_KNOWN_HOSTS = "MLPROJECTS_GIT_KNOWN_HOSTS"
_CLONE_SCRIPT = f"""set -eu
export HOME=/tmp GIT_TERMINAL_PROMPT=0
if [ -n "${{{GIT_SSH_KEY}:-}}" ]; then
  (umask 077; printf '%s\\n' "${GIT_SSH_KEY}" > /tmp/mlprojects-key)
  options="-o BatchMode=yes -o ConnectTimeout=30 -o IdentitiesOnly=yes -i /tmp/mlprojects-key"
  if [ -n "${{{GIT_KNOWN_HOSTS}:-}}" ]; then
    printf '%s\\n' "${GIT_KNOWN_HOSTS}" > /tmp/mlprojects-hosts
    options="$options -o UserKnownHostsFile=/tmp/mlprojects-hosts -o StrictHostKeyChecking=yes"
  else
    options="$options -o UserKnownHostsFile=/tmp/mlprojects-hosts -o StrictHostKeyChecking=accept-new"
  fi
  export GIT_SSH_COMMAND="ssh $options"
fi
umask 000
git init -q "$1/{_REPOSITORY_FOLDER}"
cd "$1/{_REPOSITORY_FOLDER}"
if [ -n "${{{GIT_TOKEN}:-}}" ]; then
  helper='!f() {{ test "$1" = get && printf "username=%s\\npassword=%s\\n" "${GIT_USERNAME}" "${GIT_TOKEN}"; }}; f'
  origin=$(printf '%s' "$2" | sed 's|^\\([a-z]*://[^/]*\\).*|\\1|')
  git config "credential.$origin.helper" "$helper"
fi
git remote add origin "$2"
git fetch -q --depth 1 origin "$3" || git fetch -q origin "+refs/heads/*:refs/remotes/origin/*" "+refs/tags/*:refs/tags/*"
git -c advice.detachedHead=false checkout -q "$3"
"""
"""A script for ``sh``: clones the commit ``$3`` of the repository ``$2`` into the folder ``$1``."""


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
class GitCheckout:
    """A commit for an init container to clone; `child_env` holds the repository's credentials.

    `url` has no user-info, `commit` is the full SHA, `subdirectory` is the project's folder, empty for the repository's top.
    """

    url: str
    commit: str
    subdirectory: str = ""
    child_env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class JobRequest:
    """The inputs of a Job's manifest; the names of its Secrets and its ConfigMap are derived from `name`.

    The values of `child_env` may be secret. `volumes` are host paths to mount, in Docker's notation, `registry_auth` is
    ``docker_auth``. `deadline` (None: no limit) and `termination_grace` are seconds.
    """

    name: str
    namespace: str
    image: str
    command: str
    delivery: DeliveryName
    config: KubernetesConfig
    template: Json | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    child_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    volumes: tuple[str, ...] = ()
    checkout: GitCheckout | None = None
    registry_auth: Json | None = field(default=None, repr=False)
    deadline: int | None = None
    termination_grace: int = 10


def build_job(request: JobRequest) -> dict[str, Any]:
    """Returns the Job's manifest: plain JSON without secrets.

    The template is kept, except for the command, the variables, the mounts and (if another is named) the image of the project's
    container; the configuration takes precedence over the template. Raises `BackendError` if a volume can't be mounted, or the
    template contradicts the request.
    """
    job: dict[str, Any] = copy.deepcopy(dict(request.template or {}))
    job["apiVersion"], job["kind"] = "batch/v1", "Job"
    job.pop("status", None)
    metadata = _child(job, "metadata")
    for key in ("generateName", "uid", "resourceVersion", "creationTimestamp", "managedFields", "ownerReferences"):
        metadata.pop(key, None)
    metadata["name"], metadata["namespace"] = request.name, request.namespace
    _child(metadata, "labels").update(request.labels)
    _child(metadata, "annotations").update(request.annotations)
    spec, config = _child(job, "spec"), request.config
    _resolve(spec, "backoffLimit", config.backoff_limit, 0)
    _resolve(spec, "ttlSecondsAfterFinished", config.ttl_seconds_after_finished, _DEFAULT_TTL_SECONDS)
    deadline = config.timeout if config.timeout is not None else request.deadline
    if deadline is not None:
        spec["activeDeadlineSeconds"] = deadline
    template = _child(spec, "template")
    _child(_child(template, "metadata"), "labels").update(request.labels)
    pod = _child(template, "spec")
    _set_pod_spec(pod, request)
    _set_container(project_container(pod), pod, request)
    return job


def project_container(pod_spec: Json) -> dict[str, Any]:
    """Returns the container that runs the project: the one named ``project``, else the first."""
    containers: list[dict[str, Any]] = pod_spec["containers"]
    return next((each for each in containers if each.get("name") == _CONTAINER_NAME), containers[0])


def _child(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns the mapping at `key`; makes it if it is missing."""
    child: dict[str, Any] = parent[key] if isinstance(parent.get(key), dict) else {}
    parent[key] = child
    return child


def _resolve(spec: dict[str, Any], key: str, configured: object, default: object) -> None:
    """Resolves a field: configuration, then template, then default."""
    spec[key] = next((each for each in (configured, spec.get(key)) if each is not None), default)


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
    pod["containers"] = pod.get("containers") or [{"name": _CONTAINER_NAME}]
    present = list(pod.get("imagePullSecrets") or [])
    names = [*config.image_pull_secrets, *([request.name + _LOGIN_SUFFIX] if request.registry_auth else [])]
    if names:
        pod["imagePullSecrets"] = present + [{"name": name} for name in names if {"name": name} not in present]


def _set_container(container: dict[str, Any], pod: dict[str, Any], request: JobRequest) -> None:
    container.setdefault("name", _CONTAINER_NAME)
    if not _LABEL.fullmatch(str(container["name"])):
        # MLflow's example of a job template has a placeholder for the project's name there.
        container["name"] = _slug(request.labels.get(PROJECT_LABEL, ""))[:63].strip("-") or _CONTAINER_NAME
    container["image"] = request.image
    if request.template is None:
        # As with Docker: an image that the node has is used, whatever its tag.
        container["imagePullPolicy"] = "IfNotPresent"
        container["securityContext"] = copy.deepcopy(_NO_PRIVILEGES)
    for kind, wanted in request.config.resources or ():
        if wanted:
            _child(_child(container, "resources"), kind).update(wanted)
    prelude = STOP_WHILE_PREPARING + _UNPACK_SCRIPT + RUN_BY_SHELL if request.delivery == "archive" else RUN_BY_SHELL
    container["command"] = ["sh", "-c", escape_expansion(prelude), "mlprojects"]
    container["args"] = [escape_expansion(request.command)]
    if request.delivery != "none":
        container["workingDir"] = CODE_FOLDER
    env = [
        {"name": name, "value": escape_expansion(value)} if name in PLAIN_VARIABLES else _secret_variable(name, request)
        for name, value in sorted(request.child_env.items())
    ]
    names = {each["name"] for each in env}
    container["env"] = env + [each for each in container.get("env") or [] if each.get("name") not in names]
    if request.delivery == "archive":
        archive = {"configMap": {"name": request.name + _ARCHIVE_SUFFIX, "defaultMode": 0o444}}
        _mount(pod, container, "mlprojects-archive", archive, _ARCHIVE_DIRECTORY, readOnly=True)
        _mount(pod, container, _CODE_VOLUME, {"emptyDir": {}}, CODE_FOLDER)
    elif request.checkout is not None:
        _add_clone(pod, container, request, request.checkout)
    _mount_host_paths(pod, container, request)


def escape_expansion(text: str) -> str:
    """Doubles each ``$``: in commands and arguments, the kubelet expands ``$(NAME)`` and turns ``$$`` into ``$``."""
    return text.replace("$", "$$")


def _secret_variable(name: str, request: JobRequest) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": request.name + _VARIABLES_SUFFIX, "key": name}}}


def _mount(pod: dict[str, Any], container: dict[str, Any], name: str, source: Json, path: str, **options: Any) -> None:
    volumes, mounts = pod.get("volumes") or [], container.get("volumeMounts") or []
    if not any(each.get("name") == name for each in volumes):
        pod["volumes"] = [*volumes, {"name": name, **source}]
    if any(each.get("mountPath", "").rstrip("/") == path for each in mounts):
        raise backend_error(
            f"The job template mounts a volume at {path}, the folder of the project's code; mount it elsewhere, or use "
            "'code-delivery: none'."
        )
    container["volumeMounts"] = [*mounts, {"name": name, "mountPath": path, **options}]


def _add_clone(pod: dict[str, Any], container: dict[str, Any], request: JobRequest, checkout: GitCheckout) -> None:
    below = "/".join(filter(None, (_REPOSITORY_FOLDER, checkout.subdirectory.strip("/"))))
    _mount(pod, container, _CODE_VOLUME, {"emptyDir": {}}, CODE_FOLDER, subPath=below)
    clone: dict[str, Any] = {
        "name": CLONE_CONTAINER,
        "image": request.config.git_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", escape_expansion(_CLONE_SCRIPT), "mlprojects"],
        "args": [escape_expansion(each) for each in (CODE_FOLDER, checkout.url, checkout.commit)],
        "volumeMounts": [{"name": _CODE_VOLUME, "mountPath": CODE_FOLDER}],
        "securityContext": copy.deepcopy(_NO_PRIVILEGES),
    }
    if checkout.child_env:
        clone["env"] = [_secret_variable(name, request) for name in sorted(checkout.child_env)]
    # First: the user's init containers may need the code.
    pod["initContainers"] = [clone, *(pod.get("initContainers") or [])]


def _mount_host_paths(pod: dict[str, Any], container: dict[str, Any], request: JobRequest) -> None:
    for index, volume in enumerate(request.volumes):
        host, _, rest = volume.partition(":")
        path, _, mode = rest.partition(":")
        if not request.config.allow_host_paths:
            raise backend_error(
                f"The project's docker_env mounts {volume!r}, a folder of the machine; on a cluster that is a hostPath of "
                "whichever node the pod runs on. Allow it with 'allow-host-paths: true', or mount a volume in the job template."
            )
        if not host.startswith("/") or not path.startswith("/"):
            raise backend_error(
                f"The volume {volume!r} of docker_env can't become a hostPath: both paths must be absolute."
            )
        source, options = {"hostPath": {"path": host}}, {"readOnly": True} if "ro" in mode.split(",") else {}
        _mount(pod, container, f"mlprojects-host-{index}", source, path.rstrip("/") or "/", **options)


def build_dependents(request: JobRequest, archive: bytes | None, owner: Json) -> list[dict[str, Any]]:
    """Returns the manifests of the Secrets and the ConfigMap that the Job `owner` owns."""
    reference = {"apiVersion": "batch/v1", "kind": "Job", "blockOwnerDeletion": False, "controller": True}
    reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
    metadata = {"namespace": request.namespace, "labels": request.labels, "ownerReferences": [reference]}
    variables = {name: value for name, value in request.child_env.items() if name not in PLAIN_VARIABLES}
    if request.checkout is not None:
        variables |= request.checkout.child_env
    contents: dict[str, dict[str, Any]] = {}
    if variables:
        contents[_VARIABLES_SUFFIX] = {"kind": "Secret", "type": "Opaque", "stringData": variables}
    if request.registry_auth:
        login = {".dockerconfigjson": _base64(_docker_config(request.registry_auth).encode())}
        contents[_LOGIN_SUFFIX] = {"kind": "Secret", "type": "kubernetes.io/dockerconfigjson", "data": login}
    if archive is not None:
        contents[_ARCHIVE_SUFFIX] = {"kind": "ConfigMap", "binaryData": {_ARCHIVE_FILE: _base64(archive)}}
    return [
        {"apiVersion": "v1", "metadata": {"name": request.name + suffix, **metadata}, **content}
        for suffix, content in contents.items()
    ]


def _docker_config(auth: Json) -> str:
    """Returns ``docker_auth`` as the text of Docker's ``config.json``; secret."""
    username, password = str(auth.get("username", "")), str(auth.get("password", ""))
    registry = str(auth.get("registry") or auth.get("serveraddress") or "https://index.docker.io/v1/")
    login = {"username": username, "password": password, "auth": _base64(f"{username}:{password}".encode())}
    return json.dumps({"auths": {registry: login}})


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def demands(job: Mapping[str, Any], image: str) -> Demands:
    """Returns what a Job asks of its node. `image` is the project's, which the Job may only have built in."""
    pod = job["spec"]["template"]["spec"]
    kinds = ("containers", "initContainers", "ephemeralContainers")
    containers = [each for kind in kinds for each in pod.get(kind) or ()]
    privileges = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    for container in containers:
        security = container.get("securityContext") or {}
        privileges += [name for name in ("privileged", "allowPrivilegeEscalation") if security.get(name)]
        privileges += ["capabilities"] if (security.get("capabilities") or {}).get("add") else []
    paths = [each["hostPath"]["path"] for each in pod.get("volumes") or () if each.get("hostPath")]
    images = dict.fromkeys([image, *(str(each.get("image")) for each in containers)])
    built = [each for each in images if not each.endswith("@DIGEST")]
    return Demands(tuple(built), tuple(paths), tuple(dict.fromkeys(privileges)))
