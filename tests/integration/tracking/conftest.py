from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.mlflow_server import MlflowServer
from tests.services.waiting import free_port

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import TrackingRequest

RequestMaker = Callable[..., TrackingRequest]


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("MLFLOW_", "PREFECT_MLPROJECTS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def request_for(tmp_path: Path) -> RequestMaker:
    copy = WorkingCopy(directory=tmp_path, uri=str(tmp_path), kind="local", source_name=str(tmp_path))

    def make(uri: str, **fields: Any) -> TrackingRequest:
        return TrackingRequest(**{"tracking_uri": Secret(uri), "working_copy": copy, "entry_point": "main", **fields})

    return make


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"), free_port())
    server.start()
    yield server
    server.stop()
