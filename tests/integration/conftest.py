from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test below this folder; pytest passes the items of the other folders too."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)
            # The clients of the real services warn: of their own deprecations, and of sockets when a server is gone.
            item.add_marker(pytest.mark.filterwarnings("default"))
