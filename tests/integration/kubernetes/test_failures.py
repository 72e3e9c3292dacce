"""The outcome and the message of a run that the cluster refuses, can't start, or ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from tests.services.recorder import Recorder

from prefect_mlprojects.backends.kubernetes.config import connect, parse_kubernetes_config
from prefect_mlprojects.backends.kubernetes.logs import PodLogs
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import FailureCategory


def _template(pod: dict[str, Any], container: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    project = {"name": "project", "imagePullPolicy": "IfNotPresent", **(container or {})}
    return {"spec": {**spec, "template": {"spec": {**pod, "containers": [project, *pod.get("containers", ())]}}}}


def _other(cluster: Any, name: str, command: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", command],
        **fields,
    }


def _quota(cluster: Any, **hard: str) -> None:
    body = {"metadata": {"name": "narrow"}, "spec": {"hard": hard}}
    cluster.core.create_namespaced_resource_quota(cluster.namespace, body)
    # Until the cluster has counted, it refuses every object.
    cluster.wait_for(
        lambda: cluster.core.read_namespaced_resource_quota("narrow", cluster.namespace).status.hard is not None
    )


@pytest.mark.parametrize(
    ("container", "pod", "kind", "text"),
    [
        (
            {"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "absent", "key": "k"}}}]},
            {},
            "CreateContainerConfigError",
            "absent",
        ),
        (
            {"volumeMounts": [{"name": "v", "mountPath": "/v"}]},
            {"volumes": [{"name": "v", "configMap": {"name": "absent"}}]},
            "a volume of pod",
            "absent",
        ),
        ({"image": "UPPER CASE"}, {}, "InvalidImageName", "UPPER CASE"),
    ],
)
def test_pod_that_can_not_start_names_the_cause(
    cluster: Any, container: dict[str, Any], pod: dict[str, Any], kind: str, text: str
) -> None:
    image = container.get("image")
    template = _template(pod, container)
    outcome = cluster.run("true", image=image, **{"kube-job-template": template, "start-grace": 1})
    assert outcome.ending == "not-started"
    assert kind in outcome.cause
    assert text in outcome.cause
    assert outcome.advice
    assert (cluster.pods, cluster.jobs) == ([], [])


def test_unmatched_node_selector_is_not_started(cluster: Any) -> None:
    template = _template({"nodeSelector": {"prefect-mlprojects/nowhere": "x"}})
    outcome = cluster.run("true", **{"kube-job-template": template, "scheduling-grace": 1})
    assert outcome.ending == "not-started"
    assert "node affinity/selector" in outcome.cause
    assert "nodeSelector" in outcome.advice


def test_out_of_memory_names_the_limit(cluster: Any) -> None:
    command = """python3 -c 'import time; x = b"x" * (600 << 20); time.sleep(60)'"""
    outcome = cluster.run(command, resources={"limits": {"memory": "64Mi"}})
    assert (outcome.ending, outcome.exit_code, outcome.signal) == ("exited", 137, 9)
    assert "OOMKilled" in outcome.cause
    assert "limit" in outcome.advice


def test_pod_quota_is_not_started(cluster: Any) -> None:
    _quota(cluster, pods="0")
    outcome = cluster.run("true", **{"scheduling-grace": 1})
    assert outcome.ending == "not-started"
    assert "exceeded quota: narrow" in outcome.cause
    assert cluster.jobs == []


def test_job_quota_is_refused(cluster: Any) -> None:
    _quota(cluster, **{"count/jobs.batch": "0"})
    with pytest.raises(BackendError, match=r"refuses to create jobs.*exceeded quota: narrow") as caught:
        cluster.run("true")
    assert "quota" in caught.value.message


def test_missing_service_account_is_not_started(cluster: Any) -> None:
    outcome = cluster.run("true", **{"service-account": "nobody", "start-grace": 1})
    assert outcome.ending == "not-started"
    assert 'serviceaccount "nobody" not found' in outcome.cause
    assert cluster.jobs == []


def test_invalid_manifest_is_refused(cluster: Any) -> None:
    resources = {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}
    with pytest.raises(BackendError, match=r"manifest invalid .*memory limit"):
        cluster.run("true", resources=resources)
    assert cluster.jobs == []


def test_missing_namespace_is_refused(cluster: Any) -> None:
    with pytest.raises(BackendError, match="nowhere-at-all"):
        cluster.run("true", namespace="nowhere-at-all")


def test_deadline_of_the_job_is_a_timeout(cluster: Any) -> None:
    outcome = cluster.run("sleep 1000", timeout=None, call=cluster.call(timeout=3))
    assert outcome.ending == "timed-out"
    assert "3 s (DeadlineExceeded)" in outcome.cause


def test_failed_init_container_is_not_started(cluster: Any) -> None:
    template = _template({"initContainers": [_other(cluster, "first", "echo no such model; exit 7")]})
    outcome = cluster.run("true", **{"kube-job-template": template})
    assert outcome.ending == "not-started"
    assert "init container first" in outcome.cause
    assert "exit code 7" in outcome.cause
    assert "[first] no such model" in cluster.recorder.reports


def test_sidecar_ends_with_the_project(cluster: Any) -> None:
    sidecar = _other(cluster, "side", "while true; do sleep 1; done", restartPolicy="Always")
    outcome = cluster.run("echo done", **{"kube-job-template": _template({"initContainers": [sidecar]})})
    assert outcome.succeeded
    assert outcome.output_tail == ("done",)


def test_neighbour_that_keeps_running_is_deleted(cluster: Any) -> None:
    template = _template({"containers": [_other(cluster, "neighbour", "sleep 1000")]})
    outcome = cluster.run("echo done; exit 3", **{"kube-job-template": template, "start-grace": 2})
    assert (outcome.ending, outcome.exit_code, outcome.output_tail) == ("exited", 3, ("done",))
    assert any("neighbour" in line and "sidecar" in line for line in cluster.recorder.reports)
    assert cluster.jobs == []


def test_job_deleted_by_another_client_fails(cluster: Any) -> None:
    def delete() -> None:
        cluster.wait_for(lambda: b"begun" in cluster.recorder.data)
        cluster.batch.delete_namespaced_job(
            cluster.jobs[0].metadata.name, cluster.namespace, propagation_policy="Background"
        )

    thread = threading.Thread(target=delete)
    thread.start()
    outcome = cluster.run("echo begun; sleep 1000")
    thread.join()
    assert not outcome.succeeded
    assert "was deleted while it ran" in outcome.cause


@pytest.mark.parametrize(
    ("removal", "cause", "category"),
    [
        ("delete", "was deleted while it ran", FailureCategory.INFRASTRUCTURE),
        ("evict", "EvictionByEvictionAPI", FailureCategory.PREEMPTED),
    ],
)
def test_pod_removed_through_the_api_names_the_removal(
    cluster: Any, removal: str, cause: str, category: FailureCategory
) -> None:
    def remove() -> None:
        cluster.wait_for(lambda: b"begun" in cluster.recorder.data)
        name = cluster.pods[0].metadata.name
        if removal == "delete":
            cluster.core.delete_namespaced_pod(name, cluster.namespace)
        else:
            cluster.core.create_namespaced_pod_eviction(name, cluster.namespace, {"metadata": {"name": name}})

    thread = threading.Thread(target=remove)
    thread.start()
    outcome = cluster.run("echo begun; sleep 1000", **{"termination-grace": 2})
    thread.join()

    assert cause in outcome.cause
    assert outcome.category == category
    assert "memory" not in outcome.cause + outcome.advice


def test_unprivileged_read_only_container_succeeds(cluster: Any) -> None:
    context = {"runAsUser": 65534, "runAsNonRoot": True, "readOnlyRootFilesystem": True}
    template = _template({}, {"securityContext": {**context, "allowPrivilegeEscalation": False}})
    outcome = cluster.run("cat hello*; echo made > file; cat file", **{"kube-job-template": template})
    assert outcome.succeeded, cluster.recorder
    assert outcome.output_tail == ("hello", "made")


def test_job_removed_when_finished_succeeds(cluster: Any) -> None:
    outcome = cluster.run("echo short", **{"ttl-seconds-after-finished": 0})
    assert outcome.succeeded, outcome


def _run_until_third_try(cluster: Any) -> None:
    """Runs a Job whose container is restarted twice in its pod."""
    template = _template({"restartPolicy": "OnFailure", "volumes": [{"name": "kept", "emptyDir": {}}]})
    project = template["spec"]["template"]["spec"]["containers"][0]
    project["volumeMounts"] = [{"name": "kept", "mountPath": "/kept"}]
    command = "echo x >> /kept/tries; echo try $(wc -l < /kept/tries); [ $(wc -l < /kept/tries) -ge 3 ]"
    outcome = cluster.run(command, **{"kube-job-template": template, "backoff-limit": 3, "start-grace": 1})
    assert outcome.succeeded, cluster.recorder.reports
    assert outcome.output_tail == ("try 1", "try 2", "try 3")


def test_restarted_container_output_is_complete(cluster: Any) -> None:
    _run_until_third_try(cluster)


def test_restarts_before_first_status_previous_log_is_read_and_loss_reported(cluster: Any) -> None:
    _run_until_third_try(cluster)
    late = Recorder()
    client = connect(parse_kubernetes_config({**cluster.config, "namespace": cluster.namespace}))
    logs = PodLogs(client, "project", False, late, late.report)
    logs.update({pod["metadata"]["name"]: pod for pod in client.items("pods")})
    logs.finish()
    logs.abandon()
    assert late.data.decode().splitlines() == ["try 2", "try 3"]
    assert any("from before restart 1 is missing" in line for line in late.reports)
    assert [line.partition(" runs ")[2] for line in late.reports if " runs " in line] == [
        "the project (restart 1).",
        "the project (restart 2).",
    ]
