"""The pure functions: names, manifests, the choice of a delivery, the log filter, diagnoses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefect_mlprojects.backends.configuration import dump_config
from prefect_mlprojects.backends.contract import RunIdentity
from prefect_mlprojects.backends.kubernetes.api import ApiError
from prefect_mlprojects.backends.kubernetes.config import KubernetesConfig, parse_kubernetes_config
from prefect_mlprojects.backends.kubernetes.diagnosis import explain_end, explain_refusal, find_problem
from prefect_mlprojects.backends.kubernetes.logs import LineFilter
from prefect_mlprojects.backends.kubernetes.manifest import JobRequest, build_job, job_name, run_labels
from prefect_mlprojects.backends.kubernetes.submission import choose_delivery
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.tracking.uris import is_on_this_machine


@pytest.mark.parametrize("project", ["Größe & Co", "9lives", "", "x" * 300, "-a-", "日本"])
def test_job_name_of_any_project_is_a_label(project: str) -> None:
    name = job_name(RunIdentity("flow", "run", project, "main"))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 52
    assert name == job_name(RunIdentity("flow", "run", project, "main"))
    assert name != job_name(RunIdentity("flow", "run", project, "main"), 2)


def test_build_job_keeps_the_template() -> None:
    template = {
        "spec": {
            "backoffLimit": 4,
            "template": {
                "spec": {
                    "restartPolicy": "OnFailure",
                    "containers": [
                        {"name": "side", "image": "s"},
                        {"name": "project", "env": [{"name": "A", "value": "1"}]},
                    ],
                }
            },
        }
    }
    request = JobRequest(
        "j",
        "ns",
        "image:1",
        "echo $$",
        "archive",
        KubernetesConfig(),
        template,
        child_env={"A": "hidden", "B": "hidden"},
    )
    job = build_job(request)
    pod = job["spec"]["template"]["spec"]
    side, project = pod["containers"]
    assert (job["spec"]["backoffLimit"], pod["restartPolicy"], side) == (4, "OnFailure", {"name": "side", "image": "s"})
    assert project["image"] == "image:1"
    assert project["args"] == ["echo $$$$"]
    assert [each["name"] for each in project["env"]] == ["A", "B"]
    assert "hidden" not in str(job)


@pytest.mark.parametrize(
    ("written", "project", "name"),
    [
        ("{replaced with MLflow Project name}", "Churn Model_2", "churn-model-2"),
        ("{replaced with MLflow Project name}", "日本", "project"),
        ("Train", "p" * 70, "p" * 63),
        ("train", "churn", "train"),
        (None, "churn", "project"),
    ],
)
def test_build_job_unusable_container_name_becomes_the_project_s(written: str | None, project: str, name: str) -> None:
    container = {"image": "i"} if written is None else {"image": "i", "name": written}
    template = {"spec": {"template": {"spec": {"containers": [container]}}}}
    labels = run_labels(RunIdentity("f", "m", project, "main"), 1)
    request = JobRequest("j", "ns", "i", "x", "none", KubernetesConfig(), template, labels=labels)
    (built,) = build_job(request)["spec"]["template"]["spec"]["containers"]
    assert built["name"] == name


def test_choose_delivery_follows_the_options() -> None:
    def choose(requested: Any = None, uri: str | None = None, build: bool = False, size: int | None = 1) -> str:
        return choose_delivery(requested, repository_uri=uri, build_image=build, archive_size=size)[0]

    assert [choose(), choose(uri="r/x"), choose(build=True, uri="r/x"), choose("none"), choose("git")] == [
        "archive",
        "image",
        "image",
        "none",
        "git",
    ]
    for wrong in ({"build": True}, {"requested": "image"}, {"size": None}, {"requested": "git", "build": True}):
        with pytest.raises(BackendError, match="Ways for the code"):
            choose(**wrong)


def test_line_filter_after_reconnect_drops_repeated_lines() -> None:
    lines = LineFilter()
    one = b"2026-01-01T00:00:01.000000001Z a\n2026-01-01T00:00:01.000000001Z a\n2026-01-01T00:00:02.5Z b\n"
    assert lines.feed(one + b"2026-01-01T00:00:02.6Z cut o") == [b"a\n", b"a\n", b"b\n"]
    assert lines.since == "2026-01-01T00:00:01Z"
    lines.reconnect()
    assert lines.feed(one + b"2026-01-01T00:00:02.6Z cut off\n2026-01-01T00:00:09Z end") == [b"cut off\n"]
    assert lines.close() == [b"end"]


def _pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": {"nodeName": "n", "restartPolicy": "Never"}, "status": status}


def _ended(code: int, reason: str) -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "reason": reason}}
    return _pod(phase="Failed", containerStatuses=[{"name": "project", "state": state}])


def _job(reason: str) -> dict[str, Any]:
    condition = {"type": "Failed", "status": "True", "reason": reason, "message": "m"}
    return {"metadata": {"name": "j"}, "spec": {"activeDeadlineSeconds": 9}, "status": {"conditions": [condition]}}


@pytest.mark.parametrize(
    ("job", "pod", "ending", "text"),
    [
        (_job("BackoffLimitExceeded"), _ended(3, "Error"), "exited", "exit code 3"),
        (_job("BackoffLimitExceeded"), _ended(137, "OOMKilled"), "exited", "OOMKilled"),
        (_job("DeadlineExceeded"), _pod(phase="Failed"), "timed-out", "9 s"),
        (_job("BackoffLimitExceeded"), _pod(phase="Failed", reason="Evicted", message="disk"), "not-started", "disk"),
        (_job("BackoffLimitExceeded"), _pod(phase="Failed", reason="NodeLost"), "not-started", "NodeLost"),
    ],
)
def test_explain_end_returns_ending_and_cause(job: Any, pod: Any, ending: str, text: str) -> None:
    found = explain_end(job, [pod], "project")
    assert found.ending == ending
    assert text in found.cause


@pytest.mark.parametrize(
    ("message", "advice", "category"),
    [
        (
            "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ",
            "ephemeral-storage",
            "user-code",
        ),
        ('Container project exceeded its local ephemeral storage limit "1Gi". ', "ephemeral-storage", "user-code"),
        ('Usage of EmptyDir volume "v" exceeds the limit "1Mi". ', "sizeLimit", "user-code"),
        (
            "The node was low on resource: ephemeral-storage. Threshold: 9Gi, available: 8Gi. ",
            "The node ran",
            "preempted",
        ),
    ],
)
def test_explain_end_evicted_pod_tells_own_limit_from_the_nodes(message: str, advice: str, category: str) -> None:
    pod = _pod(phase="Failed", reason="Evicted", message=message)
    found = explain_end(_job("BackoffLimitExceeded"), [pod], "project")
    assert advice in found.advice
    assert found.category == category
    assert not found.cause.endswith(".")


def test_explain_end_pod_deleted_after_its_end_keeps_the_exit_code() -> None:
    pod = _ended(137, "Error")
    pod["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = "2026-01-01T00:00:10Z"
    deleted = {"deletionTimestamp": "2026-01-01T00:00:41Z", "deletionGracePeriodSeconds": 30}
    before = {"deletionTimestamp": "2026-01-01T00:00:39Z", "deletionGracePeriodSeconds": 30}
    after, running = ({**pod, "metadata": {"name": "p", **times}} for times in (deleted, before))
    assert explain_end(_job("BackoffLimitExceeded"), [after], "project").exit_code == 137
    assert "deleted while it ran" in explain_end(_job("BackoffLimitExceeded"), [running], "project").cause


def test_find_problem_returns_its_kind() -> None:
    job = {"metadata": {"name": "j"}, "status": {}}
    unschedulable = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}
    waiting = {"name": "project", "state": {"waiting": {"reason": "CreateContainerConfigError", "message": "secret x"}}}
    quota = {"reason": "FailedCreate", "involvedObject": {"name": "j"}, "message": "exceeded quota: q"}
    kinds = [
        find_problem(job, [_pod(phase="Pending", conditions=[unschedulable])], [], "project"),
        find_problem(job, [_pod(phase="Pending", containerStatuses=[waiting])], [], "project"),
        find_problem(job, [], [quota], "project"),
        find_problem(job, [_pod(phase="Running")], [], "project"),
    ]
    assert [each.kind if each else None for each in kinds] == [
        "Unschedulable",
        "CreateContainerConfigError",
        "QuotaExceeded",
        None,
    ]


def test_explain_refusal_missing_permission_names_verb_and_resource() -> None:
    refusal = ApiError("create jobs", 403, "Forbidden", 'User "u" cannot create resource "jobs"', namespace="ns")
    cause, advice = explain_refusal(refusal, "the cluster")
    assert "no permission to create jobs in namespace ns" in cause
    assert "'create' on 'jobs'" in advice


def test_docs_list_every_key_and_permission() -> None:
    root = Path(__file__).parents[4]
    page = (root / "docs" / "kubernetes.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    keys = {key for first, _ in rows for key in re.findall(r"`([a-z-]+)`", first)}
    assert {field.alias or name for name, field in KubernetesConfig.model_fields.items()} <= keys
    for rule in yaml.safe_load((root / "examples" / "kubernetes" / "role.yaml").read_text())["rules"]:
        for resource in rule["resources"]:
            verbs = next(verbs for first, verbs in rows if f"`{resource}`" in first)
            assert re.findall(r"`(\w+)`", verbs) == rule["verbs"]


def _event(reason: str, second: int) -> dict[str, Any]:
    time = f"2026-01-01T00:00:{second:02}Z"
    return {"reason": reason, "involvedObject": {"name": "p"}, "message": "m", "lastTimestamp": time}


def test_find_problem_resolved_mount_failure_is_none() -> None:
    job, pod = {"metadata": {"name": "j"}, "status": {}}, _pod(phase="Pending")
    failed = [_event("Scheduled", 1), _event("FailedMount", 1)]
    assert getattr(find_problem(job, [pod], failed, "project"), "kind", None) == "FailedMount"
    # The volume was mounted later, and a large image is being pulled, which may take long.
    assert find_problem(job, [pod], [*failed, _event("Pulling", 1)], "project") is None
    assert find_problem(job, [pod], [*failed, _event("Pulling", 2), _event("FailedMount", 3)], "project") is not None


def test_find_problem_crashing_neighbour_is_none_unless_sidecar() -> None:
    job = {"metadata": {"name": "j"}, "status": {}}
    crash = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 3}
    running = {"name": "project", "state": {"running": {}}}
    beside = _pod(phase="Running", containerStatuses=[running, {"name": "side", **crash}])
    assert find_problem(job, [beside], [], "project") is None
    # Kubernetes counts the project's own restarts against the backoff limit.
    assert (
        find_problem(job, [_pod(phase="Running", containerStatuses=[{"name": "project", **crash}])], [], "project")
        is None
    )
    waiting = {"name": "project", "state": {"waiting": {"reason": "PodInitializing"}}}
    held_up = _pod(phase="Pending", containerStatuses=[waiting], initContainerStatuses=[{"name": "side", **crash}])
    assert find_problem(job, [held_up], [], "project") is None
    held_up["spec"]["initContainers"] = [{"name": "side", "restartPolicy": "Always"}]
    assert getattr(find_problem(job, [held_up], [], "project"), "kind", None) == "CrashLoopBackOff"


def test_line_filter_node_message_is_a_remark() -> None:
    remarks: list[str] = []
    lines = LineFilter(remarks.append)
    assert lines.feed(b"2026-01-01T00:00:01Z a\nunable to retrieve container logs for containerd://1\n") == [b"a\n"]
    assert remarks == ["unable to retrieve container logs for containerd://1"]


def test_parse_config_unknown_key_names_the_nearest() -> None:
    parsed = parse_kubernetes_config({"kube-context": "c", "resources": {"cpu": 2}})
    assert parse_kubernetes_config(dump_config(parsed)) == parsed
    assert parsed.resources is not None
    assert parsed.resources.requests == {"cpu": "2"}
    with pytest.raises(BackendError, match="did you mean 'kube-context'"):
        parse_kubernetes_config({"kube-contex": "c"})


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("sqlite:///x.db", True),
        ("file:///x", True),
        ("http://127.0.0.1:5000", True),
        ("https://mlflow.example", False),
        ("databricks", False),
    ],
)
def test_is_on_this_machine_by_tracking_uri(uri: str, local: bool) -> None:
    assert is_on_this_machine(uri) is local
