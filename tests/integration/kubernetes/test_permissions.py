"""The Role in examples/kubernetes/role.yaml is sufficient and minimal: without any of its verbs a run names the missing one."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

_ROLE = yaml.safe_load((Path(__file__).parents[3] / "examples" / "kubernetes" / "role.yaml").read_text())
_GRANTED = [
    (verb, resource) for rule in _ROLE["rules"] for resource in rule["resources"] for verb in rule["verbs"]
]  # fmt: skip


def _rules_without(verb: str, resource: str) -> list[dict[str, Any]]:
    return [
        {"apiGroups": rule["apiGroups"], "resources": [each], "verbs": verbs}
        for rule in _ROLE["rules"]
        for each in rule["resources"]
        if (verbs := [one for one in rule["verbs"] if (one, each) != (verb, resource)])
    ]


def _become(cluster: Any, rules: list[dict[str, Any]]) -> None:
    """Makes the backend use the cluster as a service account that a Role with these rules is bound to."""
    core, rbac, namespace = cluster.core, cluster.rbac, cluster.namespace
    core.create_namespaced_service_account(namespace, {"metadata": {"name": "runner"}})
    rbac.create_namespaced_role(namespace, {"metadata": {"name": "runner"}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": "runner", "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "runner"}
    rbac.create_namespaced_role_binding(
        namespace, {"metadata": {"name": "runner"}, "subjects": [subject], "roleRef": role}
    )
    answer = core.create_namespaced_service_account_token(
        "runner",
        namespace,
        {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}},
        _preload_content=False,
    )
    settings = cluster.api.configuration
    credentials = {
        "host": settings.host,
        "token": json.loads(answer.data)["status"]["token"],
        "verify-tls": bool(settings.verify_ssl),
    }
    if settings.ssl_ca_cert:
        credentials["certificate-authority"] = Path(settings.ssl_ca_cert).read_text()
    cluster.config = {"credentials": credentials}


def _run_and_stop(cluster: Any, *, refused: str | None = None) -> str:
    """Runs a command, stops it once it runs (or, with `refused`, once that was reported), and returns all messages."""
    stop, recorder = StopSignal(), cluster.recorder

    def can_stop() -> bool:
        if stop.requested:
            return True
        return refused in "\n".join(recorder.reports).lower() if refused else b"begun" in recorder.data

    def watch() -> None:
        cluster.wait_for(can_stop)
        stop.request("enough")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        message = cluster.run("echo begun; sleep 1000", stop=stop).cause
    except BackendError as error:
        message = error.message
    finally:
        stop.request("over")
        thread.join()
    return "\n".join([*recorder.reports, message])


def _wait_for_role(cluster: Any, verb: str, resource: str) -> None:
    """Waits until the cluster's authorizer has read the Role: the account gets its first permission then."""
    from kubernetes.client import ApiException, BatchV1Api, CoreV1Api

    from prefect_mlprojects.backends.kubernetes.config import connect, parse_kubernetes_config

    client = connect(parse_kubernetes_config(cluster.config)).client
    probe = CoreV1Api(client).list_namespaced_pod
    if (verb, resource) == ("list", "pods"):
        probe = BatchV1Api(client).list_namespaced_job

    def may() -> bool:
        try:
            probe(cluster.namespace)
        except ApiException as error:
            if error.status in (401, 403):
                return False
            raise
        return True

    cluster.wait_for(may)
    client.close()


def test_role_is_sufficient(cluster: Any) -> None:
    _become(cluster, _ROLE["rules"])
    _wait_for_role(cluster, "", "")
    assert cluster.run("cat hello*").output_tail == ("hello",)
    cluster.recorder.data = b""
    messages = _run_and_stop(cluster)
    assert messages.endswith("enough")
    assert "no permission" not in messages.lower()
    assert [job.metadata.labels for job in cluster.jobs if job.status.succeeded is None] == []


@pytest.mark.parametrize(("verb", "resource"), _GRANTED)
def test_role_without_a_verb_names_it(cluster: Any, verb: str, resource: str) -> None:
    _become(cluster, _rules_without(verb, resource))
    _wait_for_role(cluster, verb, resource)
    refused = f"no permission to {verb} {resource} in namespace {cluster.namespace}"
    # Watches start concurrently with the command, which may be faster; without its log nothing shows that it runs.
    early = verb == "watch" or resource == "pods/log"
    messages = _run_and_stop(cluster, refused=refused if early else None)
    assert refused in messages.lower()
    if (verb, resource) != ("delete", "jobs"):
        # A Job that could not be started or watched was deleted.
        cluster.wait_for(lambda: not cluster.jobs and not cluster.pods)
