from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import TrackingRequest
from prefect_mlprojects.tracking.uris import sqlite_uri

RequestMaker = Callable[..., TrackingRequest]


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("MLFLOW_", "PREFECT_MLPROJECTS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def database_template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A new MLflow database: creating one takes seconds."""
    from prefect_mlprojects.tracking import Tracker

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    Tracker().warm_up(Secret(sqlite_uri(path)))
    return path.read_bytes()


@pytest.fixture
def uri(database_template: bytes, tmp_path: Path) -> str:
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    path.write_bytes(database_template)
    return sqlite_uri(path)


@pytest.fixture
def request_for(tmp_path: Path) -> RequestMaker:
    copy = WorkingCopy(directory=tmp_path, uri=str(tmp_path), kind="local", source_name=str(tmp_path))

    def make(uri: str, **fields: Any) -> TrackingRequest:
        return TrackingRequest(**{"tracking_uri": Secret(uri), "working_copy": copy, "entry_point": "main", **fields})

    return make
