from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test below this folder; pytest passes the items of the other folders too."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)
            # Prefect leaves a client open for each flow run (prefect/results.py, the default result storage).
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
