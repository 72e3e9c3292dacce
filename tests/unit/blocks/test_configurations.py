"""Blocks keep secrets apart from what anybody may read."""

from __future__ import annotations

from pydantic import SecretStr

from prefect_mlprojects.blocks import DatabricksBackendBlock, DatabricksWorkspace, KubernetesCluster


def test_literal_secrets_of_a_databricks_configuration_are_kept_as_secrets() -> None:
    cluster = {"num_workers": 1, "spark_env_vars": {"API_KEY": "hunter2"}}
    config = {"new_cluster": cluster, "code-path": "/Workspace/x", "secrets": {"PASSWORD": "scope/password"}}
    block = DatabricksBackendBlock(
        config=config, workspace=DatabricksWorkspace(host="https://x", token=SecretStr("hunter3"))
    )
    assert set(block.config) == {"code-path", "secrets"}
    assert "hunter" not in repr(block) + block.model_dump_json()
    assert block.get_backend_config() == {**config, "credentials": {"host": "https://x", "token": "hunter3"}}
    assert "secrets.*" in block.model_json_schema()["secret_fields"]


def test_databricks_config_without_secrets_is_unchanged() -> None:
    reference = {"spark_env_vars": {"API_KEY": "{{secrets/scope/key}}"}}
    block = DatabricksBackendBlock(config={"new_cluster": reference, "credentials": "prod"})
    assert (block.config, block.secrets) == ({"new_cluster": reference, "credentials": "prod"}, None)


def test_block_credentials_omit_empty_fields() -> None:
    block = KubernetesCluster(host="https://x", token=SecretStr("hunter2"), context="")
    assert block.get_credentials() == {"host": "https://x", "token": "hunter2", "verify-tls": True}
