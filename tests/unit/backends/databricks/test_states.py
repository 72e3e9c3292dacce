from __future__ import annotations

import pytest
from databricks.sdk.service import jobs

from prefect_mlprojects.backends.databricks import states


@pytest.mark.parametrize(
    ("enum", "table"),
    [
        (jobs.RunResultState, states.RESULTS),
        (jobs.TerminationCodeCode, states.CODES),
        (jobs.TerminationTypeType, states.TYPES),
    ],
)
def test_every_word_of_the_sdk_has_a_meaning(enum: type, table: dict[str, object]) -> None:
    assert {each.value for each in enum} == set(table)  # type: ignore[attr-defined]


def test_every_life_cycle_of_the_sdk_has_a_meaning() -> None:
    words = {each.value for each in jobs.RunLifeCycleState} | {each.value for each in jobs.RunLifecycleStateV2State}
    assert words == set(states.LIFE_CYCLES)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("RUNNING",), "running"),
        (("TERMINATING", "CANCELED"), "running"),
        (("TERMINATED", "SUCCESS", "SUCCESS"), "succeeded"),
        (("TERMINATED", "FAILED", "RUN_EXECUTION_ERROR"), "failed"),
        (("TERMINATED", "CANCELED", "USER_CANCELED"), "cancelled"),
        (("TERMINATED", "TIMEDOUT", "CANCELED"), "timed-out"),
        (("INTERNAL_ERROR", "FAILED", "CLUSTER_ERROR"), "not-started"),
        (("SKIPPED",), "not-started"),
        (("INTERNAL_ERROR",), "failed"),
        (("NEW_WORD",), "running"),
        (("NEW_WORD", "NEW_RESULT"), "failed"),
    ],
)
def test_states_mean_an_ending(words: tuple[str, ...], status: str) -> None:
    assert states.explain(*words).status == status


def test_the_clouds_words_are_passed_on() -> None:
    found = states.explain("INTERNAL_ERROR", "FAILED", "CLOUD_FAILURE", "CLOUD_FAILURE", "AWS: no capacity.")

    assert found.cause == "the cloud provider failed (caused by the cloud provider): AWS: no capacity"
    assert "another node type" in found.advice
