from __future__ import annotations

from typing import Any

import pytest

from prefect_mlprojects._support.secrets import MASK, without_secrets
from prefect_mlprojects.backends.configuration import split_config
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
def test_invalid_config_is_rejected_with_reason(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        parse_databricks_config(config)


def test_credentials_are_not_shown() -> None:
    assert "geheim" not in repr(parse_databricks_config({"credentials": {"token": "geheim"}}))
    with pytest.raises(BackendError) as caught:
        parse_databricks_config({"credentials": ["geheim"]})
    assert "geheim" not in caught.value.message


REGISTRY = {"url": "acme/runtime", "basic_auth": {"username": "ci", "password": "geheim"}}
INDEX = "https://ci:geheim@index.invalid/simple"


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (
            {"docker_image": REGISTRY},
            {"docker_image": {**REGISTRY, "basic_auth": {"username": "ci", "password": MASK}}},
        ),
        ({"spark_env_vars": {"DB_PASSWORD": "geheim"}}, {"spark_env_vars": {"DB_PASSWORD": MASK}}),
        ({"spark_env_vars": {"API_KEY": 4711}}, {"spark_env_vars": {"API_KEY": MASK}}),
        ({"spark_env_vars": {"X": "dapi0123456789abcdef0123"}}, {"spark_env_vars": {"X": MASK}}),
        ({"spark_env_vars": {"INDEX": INDEX}}, {"spark_env_vars": {"INDEX": MASK}}),
        (
            {"spark_conf": {"fs.azure.account.key.a.net": "geheim"}},
            {"spark_conf": {"fs.azure.account.key.a.net": MASK}},
        ),
        (
            {"azure_attributes": {"log_analytics_info": {"log_analytics_primary_key": "geheim"}}},
            {"azure_attributes": {"log_analytics_info": {"log_analytics_primary_key": MASK}}},
        ),
    ],
)
def test_literal_secrets_of_a_cluster_stay_in_memory(config: dict[str, Any], shown: dict[str, Any]) -> None:
    parsed = parse_databricks_config({"new_cluster": {**CLUSTER, **config}, "run-name": "nightly"})

    public, secret = split_config(parsed)

    assert public == {"run-name": "nightly", "new-cluster": {**CLUSTER, **shown}}
    assert without_secrets(secret) == {"new-cluster": {**CLUSTER, **shown}}


@pytest.mark.parametrize(
    "config",
    [
        {
            "spark_env_vars": {
                "DB_PASSWORD": "{{secrets/scope/key}}",
                "PYSPARK_PYTHON": "/databricks/python3/bin/python3",
            }
        },
        {"spark_conf": {"spark.databricks.delta.preview.enabled": "true", "spark.password": "{{secrets/scope/key}}"}},
        {"docker_image": {"url": "acme/runtime", "basic_auth": {"username": "ci", "password": "{{secrets/s/k}}"}}},
        {"ssh_public_keys": ["ssh-ed25519 AAAA"], "custom_tags": {"team": "churn"}},
    ],
)
def test_references_and_plain_values_of_a_cluster_are_stored_as_written(config: dict[str, Any]) -> None:
    public, secret = split_config(parse_databricks_config({"new_cluster": {**CLUSTER, **config}}))

    assert public == {"new-cluster": {**CLUSTER, **config}}
    assert not secret


@pytest.mark.parametrize(
    "config",
    [
        {"libraries": [{"pypi": {"package": "six", "repo": INDEX}}]},
        {"environment": {"environment_version": "2", "dependencies": [f"--index-url {INDEX}", "six"]}},
        {"credentials": {"host": "https://acme.invalid", "token": "geheim"}},
        {"credentials": {"client_id": "robot", "client_secret": "geheim"}},
    ],
)
def test_fields_with_secrets_stay_in_memory(config: dict[str, Any]) -> None:
    parsed = parse_databricks_config(config)

    public, secret = split_config(parsed)

    assert set(public) == set(secret) == set(config)
    assert "geheim" not in str(public)
    assert "geheim" not in repr(parsed)
    assert "geheim" not in parsed.redact("Databricks refused 'geheim' and " + INDEX)
