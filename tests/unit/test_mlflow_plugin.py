"""The options of MLflow's backend plugin."""

from __future__ import annotations

from typing import Any

import pytest
from mlflow.exceptions import ExecutionException

from prefect_mlprojects.mlflow_plugin import PrefectProjectBackend


@pytest.mark.parametrize("where", ["deployment", "work-pool"])
def test_docker_auth_for_a_work_pool_is_refused(where: str) -> None:
    config: dict[str, Any] = {where: "x", "docker_auth": {"username": "ci", "password": "s3cret"}}

    with pytest.raises(ExecutionException, match="docker-registry block") as caught:
        PrefectProjectBackend().run("p", "main", {}, None, config, "", None)
    assert "s3cret" not in str(caught.value)


def test_unknown_backend_option_suggests_nearest_name() -> None:
    with pytest.raises(ExecutionException, match=r"unknown key 'retrys'.*did you mean 'retries'"):
        PrefectProjectBackend().run("p", "main", {}, None, {"retrys": 1}, "", None)
