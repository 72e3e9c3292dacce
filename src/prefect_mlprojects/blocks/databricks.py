"""A Databricks workspace, and the configuration of runs on it."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from prefect_mlprojects.blocks import logos


class DatabricksWorkspace(Block):
    """Credentials for a Databricks workspace: a personal access token, or a service principal's OAuth client."""

    _block_type_name = "Databricks Workspace"
    _block_type_slug = "databricks-workspace"
    _logo_url = logos.DATABRICKS
    _description = "Credentials for a Databricks workspace."

    host: str = Field(description="The workspace's address, https://….")
    token: SecretStr | None = Field(default=None, description="A personal access token.")
    client_id: str | None = Field(default=None, title="Client ID", description="A service principal's OAuth client.")
    client_secret: SecretStr | None = Field(default=None, description="The OAuth client's secret.")

    def get_credentials(self) -> dict[str, Any]:
        """Returns the fields of the SDK's ``Config``, secrets included, for use in memory."""
        values: dict[str, Any] = {"host": self.host, "client_id": self.client_id}
        values["token"] = self.token.get_secret_value() if self.token else None
        values["client_secret"] = self.client_secret.get_secret_value() if self.client_secret else None
        return {name: value for name, value in values.items() if value}

    def test_connection(self) -> str:
        """Returns the name of the user that the workspace takes the credentials for.

        Raises:
            BackendError: It refuses them.
        """
        from prefect_mlprojects.backends.databricks.config import DatabricksConfig
        from prefect_mlprojects.backends.databricks.connection import connect, refused

        client = connect(DatabricksConfig(credentials=self.get_credentials()), "")
        try:
            return str(client.current_user.me().user_name)
        except Exception as error:  # noqa: BLE001 - the SDK raises many kinds
            raise refused("The Databricks workspace can't be used", error) from None


class DatabricksBackendBlock(Block):
    """The configuration of runs on Databricks."""

    _block_type_name = "Databricks Backend"
    _block_type_slug = "databricks-backend"
    _logo_url = logos.DATABRICKS
    _description = "The configuration of the databricks backend of prefect-mlprojects."

    config: dict[str, Any] = Field(
        default_factory=dict, title="Configuration", description="The keys of --backend-config, such as new_cluster."
    )
    workspace: DatabricksWorkspace | None = Field(default=None, description="The workspace and its credentials.")

    def get_backend_config(self) -> dict[str, Any]:
        """Returns the configuration with its credentials, for use in memory."""
        credentials = {"credentials": self.workspace.get_credentials()} if self.workspace else {}
        return {**self.config, **credentials}
