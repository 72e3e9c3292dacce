from __future__ import annotations

from itertools import product

import pytest
from databricks.sdk.service import jobs

from prefect_mlprojects.backends.databricks import states

# What each word of the SDK means to us. A word that a new SDK brings is in none of these lists and fails the tests below.
RUNNING = {"BLOCKED", "PENDING", "QUEUED", "RUNNING", "TERMINATING", "WAITING", "WAITING_FOR_RETRY"}
ENDED = {"TERMINATED", "SKIPPED", "INTERNAL_ERROR"}
RESULTS = {
    "SUCCESS": "succeeded",
    "SUCCESS_WITH_FAILURES": "succeeded",
    "FAILED": "failed",
    "TIMEDOUT": "timed-out",
    "CANCELED": "cancelled",
    "UPSTREAM_CANCELED": "cancelled",
    "MAXIMUM_CONCURRENT_RUNS_REACHED": "not-started",
    "EXCLUDED": "not-started",
    "DISABLED": "not-started",
    "UPSTREAM_FAILED": "not-started",
}
CODES = {
    "SUCCESS": ("succeeded", "succeeded"),
    "SUCCESS_WITH_FAILURES": ("succeeded", "with failures"),
    "USER_CANCELED": ("cancelled", "a user cancelled"),
    "CANCELED": ("cancelled", "Databricks cancelled"),
    "SKIPPED": ("not-started", "skipped"),
    "DRIVER_ERROR": ("failed", "driver died"),
    "CLUSTER_ERROR": ("not-started", "cluster failed to start"),
    "CLUSTER_TERMINATED_BY_USER": ("failed", "terminated the cluster"),
    "REPOSITORY_CHECKOUT_FAILED": ("not-started", "check the repository out"),
    "INVALID_CLUSTER_REQUEST": ("not-started", "specification is invalid"),
    "WORKSPACE_RUN_LIMIT_EXCEEDED": ("not-started", "limit of concurrent runs"),
    "FEATURE_DISABLED": ("not-started", "switched off"),
    "CLUSTER_REQUEST_LIMIT_EXCEEDED": ("not-started", "too many clusters"),
    "STORAGE_ACCESS_ERROR": ("failed", "storage"),
    "RUN_EXECUTION_ERROR": ("failed", "task failed"),
    "UNAUTHORIZED_ERROR": ("not-started", "permission"),
    "LIBRARY_INSTALLATION_ERROR": ("not-started", "library"),
    "MAX_CONCURRENT_RUNS_EXCEEDED": ("not-started", "too many runs"),
    "MAX_SPARK_CONTEXTS_EXCEEDED": ("not-started", "Spark contexts"),
    "RESOURCE_NOT_FOUND": ("not-started", "does not exist"),
    "INVALID_RUN_CONFIGURATION": ("not-started", "configuration is invalid"),
    "INTERNAL_ERROR": ("failed", "internal error of Databricks"),
    "CLOUD_FAILURE": ("not-started", "cloud provider failed"),
    "MAX_JOB_QUEUE_SIZE_EXCEEDED": ("not-started", "queue is full"),
    "DISABLED": ("not-started", "disabled"),
    "BREAKING_CHANGE": ("not-started", "removed"),
    "BUDGET_POLICY_LIMIT_EXCEEDED": ("not-started", "budget policy"),
}
TYPES = {"SUCCESS", "CLIENT_ERROR", "CLOUD_FAILURE", "INTERNAL_ERROR"}
NEEDS_NO_ADVICE = {"SUCCESS", "SUCCESS_WITH_FAILURES", "RUN_EXECUTION_ERROR", "DISABLED"}


def test_state_tables_cover_all_sdk_values() -> None:
    life_cycles = {each.value for each in jobs.RunLifeCycleState} | {
        each.value for each in jobs.RunLifecycleStateV2State
    }
    # Each version of the SDK has its own words.
    assert life_cycles <= RUNNING | ENDED == set(states.LIFE_CYCLES)
    assert {each.value for each in jobs.RunResultState} <= set(RESULTS) == set(states.RESULTS)
    assert {each.value for each in jobs.TerminationCodeCode} <= set(CODES) == set(states.CODES)
    assert {each.value for each in jobs.TerminationTypeType} <= TYPES == set(states.TYPES)


@pytest.mark.parametrize("life_cycle", sorted(RUNNING))
def test_active_life_cycle_is_not_final(life_cycle: str) -> None:
    for result, code in product(["", *RESULTS], ["", *CODES]):
        assert not states.explain(life_cycle, result, code).ended


@pytest.mark.parametrize("life_cycle", sorted(ENDED))
def test_final_life_cycle_has_diagnosis(life_cycle: str) -> None:
    for result, code, kind in product(["", *RESULTS], ["", *CODES], ["", *TYPES]):
        found = states.explain(life_cycle, result, code, kind, "its own words")
        assert found.ended
        assert found.cause
        assert (found.status == "succeeded") or "its own words" in found.cause


@pytest.mark.parametrize(("result", "status"), RESULTS.items())
def test_result_maps_to_status(result: str, status: str) -> None:
    assert states.explain("TERMINATED", result).status == status


@pytest.mark.parametrize(("code", "expected"), CODES.items())
def test_termination_code_maps_to_diagnosis(code: str, expected: tuple[str, str]) -> None:
    status, words = expected
    result = {"succeeded": "SUCCESS", "cancelled": "CANCELED"}.get(status, "FAILED")

    for found in (states.explain("TERMINATED", result, code), states.explain("TERMINATED", "", code)):
        assert found.status == status
        assert words in found.cause
        assert bool(found.advice) != (code in NEEDS_NO_ADVICE)


@pytest.mark.parametrize("kind", sorted(TYPES - {"SUCCESS"}))
def test_termination_type_names_responsible_party(kind: str) -> None:
    assert f"({states.TYPES[kind]})" in states.explain("TERMINATED", "FAILED", "CLUSTER_ERROR", kind).cause


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("TERMINATED", "TIMEDOUT", "CANCELED"), "timed-out"),
        (("INTERNAL_ERROR", "FAILED", "CLUSTER_ERROR"), "not-started"),
        (("SKIPPED",), "not-started"),
        (("INTERNAL_ERROR",), "failed"),
        (("INTERNAL_ERROR", "", "SUCCESS"), "failed"),
        (("TERMINATED", "FAILED", "SUCCESS"), "failed"),
        (("TERMINATED", "CANCELED", "RUN_EXECUTION_ERROR"), "cancelled"),
        (("NEW_WORD",), "running"),
        (("NEW_WORD", "NEW_RESULT"), "failed"),
        (("TERMINATED", "NEW_RESULT", "NEW_CODE", "NEW_TYPE"), "failed"),
    ],
)
def test_state_combination_maps_to_status(words: tuple[str, ...], status: str) -> None:
    assert states.explain(*words).status == status


def test_cloud_provider_message_is_included_in_cause() -> None:
    found = states.explain("INTERNAL_ERROR", "FAILED", "CLOUD_FAILURE", "CLOUD_FAILURE", "AWS: no capacity.")

    assert found.cause == "the cloud provider failed (caused by the cloud provider): AWS: no capacity"
    assert "another node type" in found.advice


def test_diagnose_accepts_both_api_versions() -> None:
    old = jobs.Run.from_dict({"state": {"life_cycle_state": "TERMINATED", "result_state": "SUCCESS"}})
    new = jobs.Run.from_dict({"status": {"state": "TERMINATED", "termination_details": {"code": "SUCCESS"}}})

    assert states.diagnose(old).status == states.diagnose(new).status == "succeeded"
    assert states.diagnose(jobs.Run()).status == "running"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"state": {"life_cycle_state": "PENDING", "state_message": "Waiting for cluster"}}, "Waiting for cluster"),
        (
            {"status": {"state": "QUEUED", "queue_details": {"code": "ACTIVE_RUNS_LIMIT_REACHED"}}},
            "active runs limit reached",
        ),
        ({"state": {"life_cycle_state": "RUNNING"}}, ""),
    ],
)
def test_waiting_for_returns_reason_of_pending_run(answer: dict[str, object], said: str) -> None:
    assert states.waiting_for(jobs.Run.from_dict(answer)) == said
