"""Runs as Jobs: on the double, or unchanged on a real cluster."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import pytest

from prefect_mlprojects.exceptions import BackendError


def test_command_gets_project_and_variables_unchanged(cluster: Any) -> None:
    outcome = cluster.run("""cat "hello ä.txt"; pwd; echo "$TOKEN"; echo '$$ $(HOME)' "$(echo inner)" """)
    assert outcome.succeeded
    expected = ["hello", "/mlflow/projects/code", "it's a $(HOME) $$ secret", "$$ $(HOME) inner"]
    assert cluster.recorder.data.decode().splitlines() == expected


def test_exit_code_is_reported(cluster: Any) -> None:
    outcome = cluster.run("echo oops; exit 3")
    assert (outcome.ending, outcome.exit_code, outcome.cause) == ("exited", 3, "exit code 3")
    assert outcome.output_tail == ("oops",)


def test_job_contains_no_secret(cluster: Any) -> None:
    cluster.run("true")
    (job,) = cluster.batch.list_namespaced_job(cluster.namespace).items
    assert "secret" not in str(job.spec.template.spec.containers[0].env).replace("secret_key_ref", "")
    (secret,) = [each for each in cluster.core.list_namespaced_secret(cluster.namespace).items if each.type == "Opaque"]
    assert secret.metadata.owner_references[0].uid == job.metadata.uid


def test_output_of_ten_thousand_lines_is_complete(cluster: Any) -> None:
    assert cluster.run("seq 10000").succeeded
    assert cluster.recorder.data.split() == [str(each).encode() for each in range(1, 10001)]


def test_stop_leaves_no_pod(cluster: Any) -> None:
    outcome = cluster.run_and_stop("enough")
    assert (outcome.ending, outcome.cause) == ("stopped", "enough")
    assert not cluster.core.list_namespaced_pod(cluster.namespace).items
    assert not cluster.batch.list_namespaced_job(cluster.namespace).items


def test_timeout_leaves_no_pod(cluster: Any) -> None:
    outcome = cluster.run("sleep 1000", timeout=4)
    assert outcome.ending == "timed-out"
    assert not cluster.core.list_namespaced_pod(cluster.namespace).items


def test_unknown_image_is_not_started(cluster: Any) -> None:
    outcome = cluster.run("true", image="registry.invalid/none:1", **{"start-grace": 1})
    assert outcome.ending == "not-started"
    assert "registry.invalid/none:1" in outcome.cause
    assert not cluster.core.list_namespaced_pod(cluster.namespace).items


def test_run_without_fitting_node_is_not_started(cluster: Any) -> None:
    outcome = cluster.run("true", resources={"cpu": 5000}, **{"scheduling-grace": 1})
    assert outcome.ending == "not-started"
    assert "Insufficient cpu" in outcome.cause


def test_invalid_template_names_the_field(cluster: Any) -> None:
    template = {"spec": {"template": {"spec": {"containers": [{"name": "project", "comand": ["x"]}]}}}}
    with pytest.raises(BackendError, match="comand"):
        cluster.run("true", **{"kube-job-template": template})
    assert not cluster.batch.list_namespaced_job(cluster.namespace).items


def test_second_process_attaches_to_the_job(cluster: Any) -> None:
    flow_run_id = str(uuid.uuid4())
    first = threading.Thread(target=cluster.run, args=("echo begun; sleep 3; echo done", flow_run_id))
    first.start()
    cluster.wait_for(lambda: b"begun" in cluster.recorder.data)
    outcome = cluster.run("echo another command", flow_run_id)
    first.join()
    assert outcome.output_tail == ("begun", "done")
    assert len(cluster.batch.list_namespaced_job(cluster.namespace).items) == 1
