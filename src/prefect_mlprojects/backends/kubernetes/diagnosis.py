"""Why a run on Kubernetes does not start, or ended as it did: pure functions from what the cluster says to cause and advice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.backends.kubernetes.api import LOST, ApiRefusal
from prefect_mlprojects.backends.kubernetes.job import UNPACK_FAILED_CODE
from prefect_mlprojects.backends.outcome import Ending, explain_exit
from prefect_mlprojects.types import FailureCategory

Json: TypeAlias = Mapping[str, Any]
Patience: TypeAlias = Literal["start", "scheduling"]
"""Which grace a trouble is given: ``start-grace`` or ``scheduling-grace`` of the configuration."""


@dataclass(frozen=True)
class Trouble:
    """What keeps a Job from going on; it may heal.

    Attributes:
        kind: Kubernetes' name of it, such as ``ImagePullBackOff``.
        cause: What is wrong, in words.
        advice: What to do about it.
        patience: How long it may last.
    """

    kind: str
    cause: str
    advice: str
    patience: Patience = "start"

    @property
    def category(self) -> FailureCategory:
        """The category of a run that fails by it."""
        if _WAITING.get(self.kind) is _IMAGE or self.kind in ("InvalidImageName", "ErrImageNeverPull"):
            return FailureCategory.IMAGE
        if self.kind in ("Unschedulable", "QuotaExceeded"):
            return FailureCategory.SCHEDULING
        return FailureCategory.PREEMPTED if self.kind == "NodeLost" else FailureCategory.INFRASTRUCTURE


@dataclass(frozen=True)
class Diagnosis:
    """How a Job ended, and why.

    Attributes:
        ending: As ``Outcome.ending``.
        cause: Why, in words.
        advice: What to do about it; empty when there is nothing to say.
        exit_code: The command's exit code, when it exited by itself.
        signal: The number of the signal that ended it, when one did.
        category: The category of the failure, where it is not the one of `ending`.
    """

    ending: Ending
    cause: str
    advice: str = ""
    exit_code: int | None = None
    signal: int | None = None
    category: FailureCategory | None = None


_PREEMPTED, _OUT_OF_MEMORY = FailureCategory.PREEMPTED, FailureCategory.OUT_OF_MEMORY
_IMAGE = "Check the image's name and tag, that the nodes can reach its registry, and 'image-pull-secrets'."
_CONFIG = "The pod refers to a ConfigMap, Secret or key that does not exist: check the job template."
_WAITING: Mapping[str, str] = {
    "ImagePullBackOff": _IMAGE,
    "ErrImagePull": _IMAGE,
    "InvalidImageName": "Check the image's name: [registry/]name[:tag][@digest], in lower case.",
    "ErrImageNeverPull": "The node does not hold the image and imagePullPolicy is Never: load it, or change the policy.",
    "ImageInspectError": _IMAGE,
    "RegistryUnavailable": _IMAGE,
    "CreateContainerConfigError": _CONFIG,
    "CreateContainerError": "The node could not create the container: check the job template's mounts and security context.",
    "RunContainerError": "The node could not start the container: does its image hold 'sh', and do its mounts exist?",
    "CrashLoopBackOff": "A container of the pod ends again and again: see its log with 'kubectl logs --previous'.",
}
_MEMORY = "It used more memory than it may: raise the limit ('resources: {limits: {memory: …}}'), or let the command use less."
_ROOM = (
    "Ask for less ('resources'), correct the job template's nodeSelector, affinity and tolerations, or add nodes; "
    "'scheduling-grace' says how long to wait for one."
)
_NODE = "The node went away while the pod ran. Run it again; 'backoff-limit' lets Kubernetes do so by itself."
_EVICTED = (
    "The node was short of a resource. Ask for what the command really needs ('resources'), so that it fits the node."
)
_MOUNT_FAILURES = ("FailedMount", "FailedAttachVolume")
_MOUNTED = ("Pulling", "Pulled", "Created", "Started")
_UNPACK = "With 'code-delivery: archive' the image must hold tar and gzip; use 'image' or 'git' for one that does not."


def find_trouble(job: Json, pods: Iterable[Json], events: Iterable[Json], container: str) -> Trouble | None:
    """Returns what keeps a running Job from going on, or None when nothing is known to.

    Args:
        job: The Job as the API server has it.
        pods: Its pods.
        events: The events about the Job and its pods.
        container: The name of the project's container.
    """
    pods, events = list(pods), list(events)
    for pod in pods:
        trouble = _pod_trouble(pod, events, container)
        if trouble is not None:
            return trouble
    if not pods and not (job.get("status") or {}).get("active"):
        return _creation_trouble(job, events)
    return None


def _pod_trouble(pod: Json, events: list[Json], container: str) -> Trouble | None:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    if status.get("reason") == "NodeLost" or _node_unreachable(pod):
        node = (pod.get("spec") or {}).get("nodeName", "?")
        return Trouble("NodeLost", f"node {node} of pod {name} does not answer", _NODE, "scheduling")
    if pod["metadata"].get("deletionTimestamp"):
        return None
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            words = condition.get("message") or condition.get("reason") or "no reason given"
            return Trouble("Unschedulable", f"no node can take pod {name}: {words}", _ROOM, "scheduling")
    if _has_run(status, container):
        # What goes on beside the project does not end it, and Kubernetes itself counts how often the project is restarted.
        return None
    for each in _container_statuses(status):
        waiting = (each.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason", "")
        if reason not in _WAITING:
            continue
        if reason == "CrashLoopBackOff" and not _is_sidecar(pod, str(each.get("name"))):
            # The Job's backoffLimit bounds the restarts of all others.
            continue
        image = f" (image {each.get('image')})" if _WAITING[reason] is _IMAGE and each.get("image") else ""
        words = _first_words(waiting.get("message") or _event_words(name, events, ("Failed",)))
        cause = f"container {each.get('name')} of pod {name} can't start: {reason}{image}{words}"
        return Trouble(reason, redact(cause), _WAITING[reason])
    if status.get("phase") == "Pending" and (words := _event_words(name, events, _MOUNT_FAILURES, _MOUNTED)):
        advice = "Check the volumes of the job template: a ConfigMap, Secret or claim that they name may be missing."
        return Trouble("FailedMount", f"a volume of pod {name} can't be mounted{_first_words(words)}", advice)
    return None


def _has_run(status: Json, container: str) -> bool:
    for each in status.get("containerStatuses") or []:
        if each.get("name") == container:
            state = each.get("state") or {}
            return "running" in state or "terminated" in state or bool((each.get("lastState") or {}).get("terminated"))
    return False


def _is_sidecar(pod: Json, name: str) -> bool:
    containers = (pod.get("spec") or {}).get("initContainers") or []
    return any(each.get("name") == name and each.get("restartPolicy") == "Always" for each in containers)


def _container_statuses(status: Json) -> list[Json]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _node_unreachable(pod: Json) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(
        each.get("type") == "DisruptionTarget"
        and each.get("status") == "True"
        and each.get("reason") == "DeletionByTaintManager"
        for each in conditions
    )


def _first_words(text: str) -> str:
    text = " ".join(text.split())
    return f": {text[:400]}" if text else ""


def _event_words(name: str, events: list[Json], reasons: tuple[str, ...], healed: tuple[str, ...] = ()) -> str:
    """The newest message of some reasons about an object; none when an event that shows the contrary came later."""
    about = [
        each
        for each in events
        if (each.get("involvedObject") or {}).get("name") == name and each.get("reason") in (*reasons, *healed)
    ]
    # Times have whole seconds: of two events of one second, the one that is no trouble counts as the later.
    about.sort(key=lambda each: (_event_time(each), each.get("reason") in healed))
    return str(about[-1].get("message") or "") if about and about[-1].get("reason") in reasons else ""


def _event_time(event: Json) -> str:
    series = event.get("series") or {}
    found = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return str(found or (event.get("metadata") or {}).get("creationTimestamp") or "")[:19]


def _creation_trouble(job: Json, events: list[Json]) -> Trouble | None:
    words = _event_words(job["metadata"]["name"], events, ("FailedCreate",), ("SuccessfulCreate",))
    if not words:
        return None
    if "exceeded quota" in words or "limited:" in words:
        advice = "The namespace's quota is used up: wait, ask for less ('resources'), or have the quota raised."
        return Trouble(
            "QuotaExceeded", f"the cluster refuses the Job's pods{_first_words(words)}", advice, "scheduling"
        )
    advice = "An admission rule of the namespace refuses the pod: give the job template what it asks for."
    return Trouble("FailedCreate", f"the cluster refuses the Job's pods{_first_words(words)}", advice)


def job_finished(job: Json) -> bool:
    """Tells whether a Job has its final condition."""
    return _final_condition(job) is not None


def _final_condition(job: Json) -> Json | None:
    for condition in (job.get("status") or {}).get("conditions") or []:
        if condition.get("type") in ("Complete", "Failed") and condition.get("status") == "True":
            result: Json = condition
            return result
    return None


def explain_end(job: Json, pods: Iterable[Json], container: str) -> Diagnosis:
    """Explains how a finished Job ended.

    Args:
        job: The Job, with its final condition.
        pods: Its pods, as far as they are still there or were seen.
        container: The name of the project's container.
    """
    condition = _final_condition(job) or {}
    ordered = sorted(pods, key=lambda pod: (pod.get("metadata") or {}).get("creationTimestamp") or "")
    if condition.get("type") == "Complete":
        return Diagnosis("exited", "exit code 0", exit_code=0)
    if condition.get("reason") == "DeadlineExceeded":
        seconds = (job.get("spec") or {}).get("activeDeadlineSeconds")
        return Diagnosis(
            "timed-out",
            f"the Job took longer than its limit of {seconds} s (DeadlineExceeded)",
            "Raise 'timeout' of the backend configuration, or activeDeadlineSeconds of the job template.",
        )
    ends = [end for pod in ordered if (end := explain_pod(pod, container)) is not None and end.exit_code != 0]
    if ends:
        last = ends[-1]
        if len(ends) > 1 and condition.get("reason") == "BackoffLimitExceeded":
            cause = f"{last.cause}; {len(ends)} pods failed, more than 'backoff-limit' lets it try again (BackoffLimitExceeded)"
            return replace(last, cause=cause)
        return last
    words = condition.get("message") or "no reason given"
    return Diagnosis("not-started", f"the Job failed: {condition.get('reason') or 'Failed'}: {words}")


def explain_pod(pod: Json, container: str) -> Diagnosis | None:
    """Explains how a pod's project ended; None while it has not.

    Args:
        pod: The pod.
        container: The name of the project's container.
    """
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    disrupted = _disruption(pod)
    if disrupted is not None:
        return disrupted
    for each in status.get("initContainerStatuses") or []:
        ended = (each.get("state") or {}).get("terminated")
        if ended and ended.get("exitCode") not in (0, None) and status.get("phase") == "Failed":
            advice = f"See its log: kubectl logs {name} -c {each.get('name')}."
            if each.get("name") == "mlprojects-clone":
                advice = (
                    "The repository could not be cloned; check its URL, that the commit was pushed, and the git-credentials "
                    f"block. {advice}"
                )
            cause = f"init container {each.get('name')} of pod {name} failed: {_terminated_words(ended)}"
            return Diagnosis("not-started", cause, advice)
    for each in status.get("containerStatuses") or []:
        # A pod that was deleted at its last restart waits for one that never comes.
        ended = (each.get("state") or {}).get("terminated") or (each.get("lastState") or {}).get("terminated")
        if each.get("name") == container and ended:
            return _explain_terminated(ended)
    if status.get("phase") == "Failed":
        words = status.get("message") or status.get("reason") or "no reason given"
        return Diagnosis("not-started", f"pod {name} failed: {words}")
    return None


def failed_init_container(pods: Iterable[Json]) -> tuple[str, str] | None:
    """Finds an init container whose failure ended its pod: the names of the newest such pod and the container."""
    found: tuple[str, str] | None = None
    for pod in sorted(pods, key=lambda each: (each.get("metadata") or {}).get("creationTimestamp") or ""):
        status = pod.get("status") or {}
        for each in status.get("initContainerStatuses") or []:
            ended = (each.get("state") or {}).get("terminated")
            if ended and ended.get("exitCode") not in (0, None) and status.get("phase") == "Failed":
                found = pod["metadata"]["name"], str(each.get("name"))
    return found


def _disruption(pod: Json) -> Diagnosis | None:
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    reason, words = status.get("reason"), status.get("message") or ""
    if reason == "Evicted":
        return Diagnosis(
            "not-started", f"pod {name} was evicted (Evicted){_first_words(words)}", _EVICTED, category=_PREEMPTED
        )
    if reason == "NodeLost":
        return Diagnosis(
            "not-started",
            f"the node of pod {name} was lost (NodeLost){_first_words(words)}",
            _NODE,
            category=_PREEMPTED,
        )
    if status.get("phase") != "Failed":
        return None
    for condition in status.get("conditions") or []:
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            why = f"{condition.get('reason')}{_first_words(condition.get('message') or '')}"
            lost = condition.get("reason") in ("DeletionByTaintManager", "DeletionByPodGC")
            advice = (
                _NODE if lost else "The cluster took the pod's place for another. Run it again, or raise its priority."
            )
            return Diagnosis("not-started", f"the cluster ended pod {name}: {why}", advice, category=_PREEMPTED)
    return None


def _terminated_words(ended: Json) -> str:
    reason = ended.get("reason") or ""
    words = f" ({reason})" if reason not in ("", "Error", "Completed") else ""
    return f"exit code {ended.get('exitCode')}{words}{_first_words(ended.get('message') or '')}"


def _explain_terminated(ended: Json) -> Diagnosis:
    code, reason = int(ended.get("exitCode") or 0), ended.get("reason") or ""
    if reason == "OOMKilled":
        return Diagnosis(
            "exited", f"exit code {code}: OOMKilled, it ran out of memory", _MEMORY, code or 137, 9, _OUT_OF_MEMORY
        )
    if reason in ("StartError", "ContainerCannotRun"):
        cause = f"the container could not start{_first_words(ended.get('message') or reason)}"
        return Diagnosis(
            "not-started",
            cause,
            "The image must hold 'sh'; check the job template's security context too.",
            category=FailureCategory.IMAGE,
        )
    if code == UNPACK_FAILED_CODE:
        return Diagnosis("exited", f"exit code {code}", _UNPACK, code, category=FailureCategory.IMAGE)
    found = explain_exit(code)
    return Diagnosis("exited", found.text, found.advice, found.exit_code, found.signal)


def project_ended_beside_others(pods: Iterable[Json], container: str) -> tuple[Json, Diagnosis, tuple[str, ...]] | None:
    """Finds a pod whose project has ended while other containers go on, so that its Job can never complete.

    Args:
        pods: The Job's pods.
        container: The name of the project's container.

    Returns:
        The pod, how the project ended, and the containers that go on; None when there is no such pod.
    """
    for pod in pods:
        status = pod.get("status") or {}
        if status.get("phase") != "Running" or (pod.get("spec") or {}).get("restartPolicy") != "Never":
            continue
        ended = None
        others: list[str] = []
        for each in status.get("containerStatuses") or []:
            state = each.get("state") or {}
            if each.get("name") == container:
                ended = state.get("terminated")
            elif "terminated" not in state:
                others.append(str(each.get("name")))
        if ended and others:
            return pod, _explain_terminated(ended), tuple(others)
    return None


def explain_refusal(refusal: ApiRefusal, cluster: str) -> tuple[str, str]:
    """Explains what the API server refused: the cause and the advice.

    Args:
        refusal: The refusal.
        cluster: What the cluster is called.
    """
    verb, _, resource = refusal.action.partition(" ")
    place = f" in namespace {refusal.namespace}" if refusal.namespace else ""
    words = redact(" ".join(refusal.message.split()))[:800]
    if refusal.status == LOST:
        return (
            f"{cluster} does not answer ({refusal.action}): {words}",
            "Check 'kube-context' and that the API server can be reached from here: kubectl cluster-info.",
        )
    if refusal.status == 401:
        return f"{cluster} does not know us: {words}", "The credentials are missing or have expired: sign in again."
    if refusal.status == 403 and _is_permission(words):
        return (
            f"no permission to {verb} {resource}{place}: {words}",
            f"Have a Role with the verb '{verb}' on '{resource}' bound; docs/kubernetes.md lists all that are needed.",
        )
    if refusal.status == 403:
        return f"{cluster} refuses to {refusal.action}{place}: {words}", "A quota or an admission rule refuses it."
    if refusal.status in (400, 422):
        return (
            f"{cluster} finds the manifest invalid ({refusal.action}{place}): {words}",
            "Correct the job template or the backend configuration; 'mlprojects plan' prints the manifest.",
        )
    if refusal.status == 404:
        return (
            f"{cluster} has no such thing ({refusal.action}{place}): {words}",
            "Check 'namespace' of the configuration.",
        )
    return f"{cluster} answered {refusal.status} to {refusal.action}{place}: {words}", ""


def _is_permission(words: str) -> bool:
    # The authorizer's words; admission plugins refuse in words of their own.
    return re.search(r'User ".*" cannot \w+ resource', words) is not None
