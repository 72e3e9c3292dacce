"""Explains why a Job does not start or how it ended: pure functions from the cluster's objects to cause, advice and category."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from http import HTTPStatus

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.backends.kubernetes.api import NO_ANSWER, ApiError, Json, nested
from prefect_mlprojects.backends.kubernetes.config import BACKEND
from prefect_mlprojects.backends.kubernetes.manifest import CLONE_CONTAINER, UNPACK_FAILED_CODE
from prefect_mlprojects.backends.outcome import Outcome, explain_exit
from prefect_mlprojects.exceptions import BackendError, BackendUnavailableError
from prefect_mlprojects.types import FailureCategory


@dataclass(frozen=True)
class Problem:
    """A condition that keeps a Job from running; it may be transient. `kind` is Kubernetes' name, such as ``ImagePullBackOff``."""

    kind: str
    cause: str
    advice: str
    category: FailureCategory = FailureCategory.INFRASTRUCTURE

    @property
    def of_nodes(self) -> bool:
        """True if ``scheduling-grace`` limits how long it may last, False if ``start-grace`` does."""
        return self.category in (FailureCategory.SCHEDULING, FailureCategory.PREEMPTED)


_CHECK_IMAGE = "Check the image's name and tag, that the nodes can reach its registry, and 'image-pull-secrets'."
# The advice by the reason for which a container waits: those that concern its image, and the others.
_WAITING_IMAGE = {
    **dict.fromkeys(("ImagePullBackOff", "ErrImagePull", "ImageInspectError", "RegistryUnavailable"), _CHECK_IMAGE),
    "InvalidImageName": "Check the image's name: [registry/]name[:tag][@digest], in lower case.",
    "ErrImageNeverPull": "The node does not have the image and imagePullPolicy is Never: load it, or change the policy.",
    "RunContainerError": "The node can't start the container: check that its image has 'sh' and that its mounts exist.",
}
_WAITING_OTHER = {
    "CreateContainerConfigError": "A ConfigMap, Secret or key of the pod does not exist: check the job template.",
    "CreateContainerError": "The node can't create the container: check the template's mounts and security context.",
    "CrashLoopBackOff": "A container of the pod exits repeatedly: see its log with 'kubectl logs --previous'.",
}
_RAISE_MEMORY = "It exceeded its memory limit: raise 'resources: {limits: {memory: ...}}' or let it use less memory."
_REDUCE_REQUESTS = (
    "Request less ('resources'), correct the job template's nodeSelector, affinity and tolerations, or add nodes; "
    "'scheduling-grace' sets how long to wait for one."
)
_NODE_LOST = "The node went away while the pod ran. Run it again, or set 'backoff-limit' to let Kubernetes retry."
_EVICTED = "The node ran out of a resource. Request as much as the command needs ('resources')."
_RAISE_STORAGE = (
    "It wrote more to the pod's disk than its limit: raise 'resources: {limits: {ephemeral-storage: ...}}' (or the sizeLimit of "
    "the job template's emptyDir), write to a volume, or keep less."
)
_OWN_STORAGE_LIMIT = re.compile(r"exceed(s|ed) (its local ephemeral storage|the total|the) limit", re.IGNORECASE)
"""The kubelet's messages for a pod above its own limit; a node that runs out of storage has another."""
_DISRUPTIONS = {
    "PreemptionByScheduler": "A pod of a higher priority took its place. Run it again, or raise its priority.",
    "EvictionByEvictionAPI": "It was evicted through the API, as 'kubectl drain' and autoscalers do. Run it again; a "
    "PodDisruptionBudget, or the autoscaler's annotation against eviction, protects a pod.",
    "TerminationByKubelet": "The node was shut down or ran out of a resource. Run it again.",
    **dict.fromkeys(("DeletionByTaintManager", "DeletionByPodGC"), _NODE_LOST),
}
_DELETED = "Somebody deleted the pod or its namespace; 'kubectl get events' may show who. Run it again."


def container_status(pod: Json, name: str) -> Json:
    """Returns the status of one of a pod's containers; empty if it has none yet."""
    return next((each for each in nested(pod, "status.containerStatuses") or [] if each.get("name") == name), {})


def final_state(status: Json) -> Json | None:
    """Returns how a container ended; of one that waits for its restart, how its last instance did."""
    ended: Json | None = nested(status, "state.terminated") or nested(status, "lastState.terminated")
    return ended


def _conditions(body: Json, status: str, *types: str) -> list[Json]:
    conditions = nested(body, "status.conditions") or []
    return [each for each in conditions if each.get("type") in types and each.get("status") == status]


def _disruptions(pod: Json) -> dict[str, str]:
    """Returns the messages of a pod's disruptions by their reasons."""
    targets = _conditions(pod, "True", "DisruptionTarget")
    return {str(each.get("reason")): each.get("message") or "" for each in targets}


def find_problem(job: Json, pods: Collection[Json], events: Sequence[Json], container: str) -> Problem | None:
    """Returns what keeps an unfinished Job from running, or None.

    `events` are those about the Job and its pods, `container` is the name of the project's container.
    """
    if not pods and not nested(job, "status.active"):
        return _creation_problem(job, events)
    return next(filter(None, (_pod_problem(pod, events, container) for pod in pods)), None)


def _pod_problem(pod: Json, events: Sequence[Json], container: str) -> Problem | None:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    if status.get("reason") == "NodeLost" or "DeletionByTaintManager" in _disruptions(pod):
        cause = f"node {nested(pod, 'spec.nodeName') or '?'} of pod {name} does not answer"
        return Problem("NodeLost", cause, _NODE_LOST, FailureCategory.PREEMPTED)
    if pod["metadata"].get("deletionTimestamp"):
        return None
    for condition in _conditions(pod, "False", "PodScheduled"):
        message = condition.get("message") or condition.get("reason") or "no reason given"
        cause = f"no node can take pod {name}: {message}"
        return Problem("Unschedulable", cause, _REDUCE_REQUESTS, FailureCategory.SCHEDULING)
    project = container_status(pod, container)
    if nested(project, "state.running") is not None or final_state(project):
        # Neighbours don't end the run, and the Job's backoffLimit bounds the restarts of the project's container.
        return None
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    waiting = next(filter(None, (_waiting_problem(pod, each, events) for each in containers)), None)
    mounted = ("Pulling", "Pulled", "Created", "Started")
    message = _event_message(name, events, ("FailedMount", "FailedAttachVolume"), mounted)
    if waiting is not None or status.get("phase") != "Pending" or not message:
        return waiting
    advice = "Check the volumes of the job template: a ConfigMap, Secret or claim that they name may be missing."
    return Problem("FailedMount", f"a volume of pod {name} can't be mounted{_appended(message)}", advice)


def _waiting_problem(pod: Json, container: Json, events: Sequence[Json]) -> Problem | None:
    name, pod_name, waiting = container.get("name"), pod["metadata"]["name"], nested(container, "state.waiting") or {}
    kind = waiting.get("reason", "")
    advice = _WAITING_IMAGE.get(kind) or _WAITING_OTHER.get(kind)
    init_containers = nested(pod, "spec.initContainers") or []
    sidecars = [each.get("name") for each in init_containers if each.get("restartPolicy") == "Always"]
    # The Job's backoffLimit bounds the restarts of all containers except sidecars.
    if advice is None or (kind == "CrashLoopBackOff" and name not in sidecars):
        return None
    image = f" (image {container.get('image')})" if advice is _CHECK_IMAGE and container.get("image") else ""
    message = _appended(waiting.get("message") or _event_message(pod_name, events, ("Failed",)))
    cause = f"container {name} of pod {pod_name} can't start: {kind}{image}{message}"
    category = FailureCategory.IMAGE if kind in _WAITING_IMAGE else FailureCategory.INFRASTRUCTURE
    return Problem(kind, redact(cause), advice, category)


def _appended(message: str) -> str:
    message = " ".join(message.split()).rstrip(".")
    return f": {message[:400]}" if message else ""


def _event_message(name: str, events: Sequence[Json], reasons: tuple[str, ...], resolved: tuple[str, ...] = ()) -> str:
    """Returns the message of the newest event with one of `reasons`; empty if a later event shows that it was resolved."""
    wanted = (*reasons, *resolved)
    about = [each for each in events if nested(each, "involvedObject.name") == name and each.get("reason") in wanted]
    # Times have whole seconds: of two events in the same second, the resolving one counts as the later.
    about.sort(key=lambda each: (_event_time(each), each.get("reason") in resolved))
    return str(about[-1].get("message") or "") if about and about[-1].get("reason") in reasons else ""


def _event_time(event: Json) -> str:
    fields = ("series.lastObservedTime", "lastTimestamp", "eventTime", "metadata.creationTimestamp")
    return str(next(filter(None, (nested(event, each) for each in fields)), ""))[:19]


def _creation_problem(job: Json, events: Sequence[Json]) -> Problem | None:
    message = _event_message(job["metadata"]["name"], events, ("FailedCreate",), ("SuccessfulCreate",))
    if not message:
        return None
    cause = f"the cluster refuses the Job's pods{_appended(message)}"
    if "exceeded quota" in message or "limited:" in message:
        advice = "The namespace's quota is used up: wait, request less ('resources'), or have the quota raised."
        return Problem("QuotaExceeded", cause, advice, FailureCategory.SCHEDULING)
    advice = "An admission rule of the namespace refuses the pod: adapt the job template to it."
    return Problem("FailedCreate", cause, advice)


def final_condition(job: Json) -> Json | None:
    """Returns the condition ``Complete`` or ``Failed`` of a finished Job, None before."""
    return next(iter(_conditions(job, "True", "Complete", "Failed")), None)


def explain_end(job: Json, pods: Iterable[Json], container: str) -> Outcome:
    """Returns the outcome of a finished Job, from its pods as far as they still exist or were seen."""
    condition = final_condition(job) or {}
    if condition.get("type") == "Complete":
        return Outcome("exited", 0, cause="exit code 0")
    if condition.get("reason") == "DeadlineExceeded":
        limit = f"its limit of {nested(job, 'spec.activeDeadlineSeconds')} s"
        advice = "Raise 'timeout' of the backend configuration, or activeDeadlineSeconds of the job template."
        return Outcome("timed-out", cause=f"the Job took longer than {limit} (DeadlineExceeded)", advice=advice)
    outcomes = [explain_pod(pod, container) for pod in by_age(pods)]
    failures = [each for each in outcomes if each is not None and each.exit_code != 0]
    if not failures:
        message = condition.get("message") or "no reason given"
        return Outcome("not-started", cause=f"the Job failed: {condition.get('reason') or 'Failed'}: {message}")
    last = failures[-1]
    if len(failures) == 1 or condition.get("reason") != "BackoffLimitExceeded":
        return last
    retried = f"{len(failures)} pods failed, more than 'backoff-limit' lets it try again (BackoffLimitExceeded)"
    return replace(last, cause=f"{last.cause}; {retried}")


def by_age(pods: Iterable[Json]) -> list[Json]:
    """Returns pods, the oldest first."""
    return sorted(pods, key=lambda pod: nested(pod, "metadata.creationTimestamp") or "")


def explain_pod(pod: Json, container: str) -> Outcome | None:
    """Returns how the project's container in a pod ended; None if it has not."""
    status, name, disrupted = pod.get("status") or {}, pod["metadata"]["name"], _disruption(pod)
    if disrupted is not None:
        return disrupted
    if failed := _failed_init_containers(pod):
        return _explain_init_container(name, *failed[0])
    # A pod deleted during its last restart keeps waiting for it: its end is in lastState.
    if final := final_state(container_status(pod, container)):
        return _explain_terminated(final)
    if status.get("phase") != "Failed":
        return None
    message = status.get("message") or status.get("reason") or "no reason given"
    return Outcome("not-started", cause=f"pod {name} failed: {message}")


def _explain_init_container(pod: str, container: str, ended: Json) -> Outcome:
    advice = f"See its log: kubectl logs {pod} -c {container}."
    if container == CLONE_CONTAINER:
        advice = f"The clone failed; check the URL, that the commit was pushed, and the git-credentials block. {advice}"
    reason = f" ({ended['reason']})" if ended.get("reason") not in (None, "", "Error", "Completed") else ""
    detail = f"exit code {ended.get('exitCode')}{reason}{_appended(ended.get('message') or '')}"
    return Outcome("not-started", cause=f"init container {container} of pod {pod} failed: {detail}", advice=advice)


def failed_init_container(pods: Iterable[Json]) -> tuple[str, str] | None:
    """Returns the newest pod that an init container's failure ended, and that container; their names."""
    failed = [(pod["metadata"]["name"], name) for pod in by_age(pods) for name, _ in _failed_init_containers(pod)]
    return failed[-1] if failed else None


def _failed_init_containers(pod: Json) -> list[tuple[str, Json]]:
    """Returns the init containers that ended a pod, with how they ended."""
    statuses = nested(pod, "status.initContainerStatuses") if nested(pod, "status.phase") == "Failed" else None
    ended = [(str(each.get("name")), nested(each, "state.terminated") or {}) for each in statuses or []]
    return [(name, state) for name, state in ended if state.get("exitCode") not in (0, None)]


def _disruption(pod: Json) -> Outcome | None:
    """Returns the outcome of a pod that something other than its own processes ended; None for others."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    reason, message = status.get("reason"), _appended(status.get("message") or "")
    category = FailureCategory.PREEMPTED
    if reason == "Evicted":
        cause, advice = f"pod {name} was evicted (Evicted){message}", _EVICTED
        if _OWN_STORAGE_LIMIT.search(message):
            advice, category = _RAISE_STORAGE, FailureCategory.USER_CODE
    elif reason == "NodeLost":
        cause, advice = f"the node of pod {name} was lost (NodeLost){message}", _NODE_LOST
    elif status.get("phase") == "Failed" and (disruptions := _disruptions(pod)):
        kind, message = next(iter(disruptions.items()))
        cause, advice = f"the cluster ended pod {name}: {kind}{_appended(message)}", _DISRUPTIONS.get(kind, _EVICTED)
    elif status.get("phase") == "Failed" and _deleted_before_end(pod):
        cause, advice = f"pod {name} was deleted while it ran", _DELETED
        category = FailureCategory.INFRASTRUCTURE
    else:
        return None
    return Outcome("not-started", cause=cause, advice=advice, reason=category)


def _deleted_before_end(pod: Json) -> bool:
    """Whether the deletion of an ended pod was requested before its last container ended."""
    metadata = pod["metadata"]
    if not metadata.get("deletionTimestamp"):
        return False
    grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    statuses = nested(pod, "status.containerStatuses") or []
    ends = [ended["finishedAt"] for each in statuses if (ended := final_state(each)) and ended.get("finishedAt")]
    return not ends or _parse_time(max(ends)) >= _parse_time(metadata["deletionTimestamp"]) - grace


def _parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _explain_terminated(ended: Json) -> Outcome:
    code, reason = int(ended.get("exitCode") or 0), ended.get("reason") or ""
    if reason == "OOMKilled":
        cause, out_of_memory = f"exit code {code}: OOMKilled, it ran out of memory", FailureCategory.OUT_OF_MEMORY
        return Outcome("exited", code or 137, 9, cause, _RAISE_MEMORY, reason=out_of_memory)
    if reason in ("StartError", "ContainerCannotRun"):
        cause = f"the container could not start{_appended(ended.get('message') or reason)}"
        advice = "The image must contain 'sh'; also check the job template's security context."
        return Outcome("not-started", cause=cause, advice=advice, reason=FailureCategory.IMAGE)
    if code == UNPACK_FAILED_CODE:
        advice = "With 'code-delivery: archive' the image must contain tar and gzip; otherwise use 'image' or 'git'."
        return Outcome("exited", code, cause=f"exit code {code}", advice=advice, reason=FailureCategory.IMAGE)
    return explain_exit(code)


def find_blocked_pod(pods: Iterable[Json], container: str) -> tuple[str, Outcome, tuple[str, ...]] | None:
    """Finds a pod whose project has ended while other containers keep running, so that its Job can never complete.

    Returns the pod's name, the project's outcome and the names of the running containers; None if no pod is blocked.
    """
    for pod in pods:
        ended = nested(container_status(pod, container), "state.terminated")
        running = tuple(
            str(each.get("name"))
            for each in nested(pod, "status.containerStatuses") or []
            if each.get("name") != container and nested(each, "state.terminated") is None
        )
        restarts = nested(pod, "spec.restartPolicy") != "Never"
        if ended and running and nested(pod, "status.phase") == "Running" and not restarts:
            return pod["metadata"]["name"], _explain_terminated(ended), running
    return None


def explain_refusal(error: ApiError, cluster: str) -> tuple[str, str]:
    """Returns the cause and the advice of an error of the API server; `cluster` is the cluster's name."""
    verb, _, resource = error.action.partition(" ")
    where = f" in namespace {error.namespace}" if error.namespace else ""
    message = redact(" ".join(error.message.split()))[:800]
    action = f"{error.action}{where}"
    cause, advice = f"{cluster} answered {error.status} to {action}", ""
    if error.status == NO_ANSWER:
        cause = f"{cluster} does not answer ({error.action})"
        advice = "Check 'kube-context' and that the API server can be reached from here: kubectl cluster-info."
    elif error.status == HTTPStatus.UNAUTHORIZED:
        cause = f"authentication failed at {cluster}"
        advice = "The credentials are missing or have expired: sign in again."
    # The authorizer's message; admission plugins have their own.
    elif error.status == HTTPStatus.FORBIDDEN and re.search(r'User ".*" cannot \w+ resource', message):
        cause = f"no permission to {verb} {resource}{where}"
        advice = f"Bind a Role with the verb '{verb}' on '{resource}'; docs/kubernetes.md lists all that are needed."
    elif error.status == HTTPStatus.FORBIDDEN:
        cause, advice = f"{cluster} refuses to {action}", "A quota or an admission rule refuses it."
    elif error.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
        cause = f"{cluster} finds the manifest invalid ({action})"
        advice = "Correct the job template or the backend configuration; 'mlprojects plan' prints the manifest."
    elif error.status == HTTPStatus.NOT_FOUND:
        cause, advice = f"{cluster} has no such object ({action})", "Check 'namespace' of the configuration."
    return f"{cause}: {message}", advice


def refused(error: ApiError, cluster: str) -> BackendError:
    """Returns the error for users for an error of the API server."""
    cause, advice = explain_refusal(error, cluster)
    # 400, 404 and 422 are mistakes in the configuration or the job template.
    kind = BackendError if error.status in (400, 404, 422) else BackendUnavailableError
    return kind(f"{cause[:1].upper()}{cause[1:]}. {advice}".strip(), backend=BACKEND)
