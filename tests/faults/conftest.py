"""Deployments and workers, as the integration tests have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.deployments.conftest import call, pool, project

__all__ = ["call", "pool", "project"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allows what Prefect leaves open, as for the integration tests; pytest passes the items of the other folders too."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
