from __future__ import annotations

from typing import Any

import pytest

from prefect_mlprojects.backends.databricks.config import parse_databricks_config
from prefect_mlprojects.exceptions import BackendError

CLUSTER = {"spark_version": "7.3.x-scala2.12", "num_workers": 1}


@pytest.mark.parametrize(
    "config",
    [
        {"job_cluster": CLUSTER},
        {"job-cluster": {"new_cluster": CLUSTER}},
        CLUSTER,
        {"new_cluster": CLUSTER},
        {"cluster_spec": CLUSTER},
        {"cluster_spec": {"new_cluster": CLUSTER}},
    ],
)
def test_mlflows_forms_mean_the_same(config: dict[str, Any]) -> None:
    assert parse_databricks_config(config).new_cluster == CLUSTER


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"existing-cluster": "x"}, "did you mean 'existing-cluster-id'"),
        ({"new_cluster": {"spark_versoin": "1"}}, "did you mean 'spark_version'"),
        ({"environment": {"dependencys": []}}, "did you mean 'dependencies'"),
        ({**CLUSTER, "libraries": [{"pypy": {}}]}, "libraries: unknown key 'pypy' .did you mean 'pypi'"),
        ({**CLUSTER, "access-control": [{"user": "a"}]}, "did you mean 'user_name'"),
        ({"cluster_spec": "c-1"}, "must be a mapping"),
        ({"job_cluster": "c-1"}, "new_cluster"),
        ({"new_cluster": CLUSTER, "existing-cluster-id": "x"}, "exclude each other"),
        ({"environment": {}, "libraries": [{"pypi": {"package": "six"}}]}, "takes no libraries"),
        ({"code-path": "/tmp/x"}, "must be an absolute path that begins with"),
        ({"code-path": "/Volumes/main"}, "must name a volume"),
        ({"secrets": {"A": "b"}}, "scope/key"),
        ({"timeout": 0}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        parse_databricks_config(config)


def test_credentials_are_not_shown() -> None:
    assert "geheim" not in repr(parse_databricks_config({"credentials": {"token": "geheim"}}))
    with pytest.raises(BackendError) as caught:
        parse_databricks_config({"credentials": ["geheim"]})
    assert "geheim" not in caught.value.message
