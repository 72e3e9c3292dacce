"""A short, repeatable form of ``scripts/fuzz``."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from tests.security.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"template"}))  # test_shell_values.py fuzzes the template
def test_hostile_input_works_or_is_an_error_of_ours(name: str) -> None:
    function, strategies = TARGETS[name]
    settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))(
        given(**strategies)(function)
    )()
