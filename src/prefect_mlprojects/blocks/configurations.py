"""Projects and configurations of backends as blocks."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from prefect.types import SecretDict
from pydantic import ConfigDict, Field, field_validator, model_validator

from prefect_mlprojects._support.redaction import holds_secret
from prefect_mlprojects.blocks.credentials import DATABRICKS_LOGO, KUBERNETES_LOGO, MLFLOW_LOGO, DatabricksWorkspace
from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.request import options_of, secret_uri_problem


def _option_fields() -> dict[str, Any]:
    fields = {
        option.name: {**option.json_schema(), "position": position}
        for position, option in enumerate(options_of("block"))
    }
    # Prefect knows a block's schema by its digest, which must not depend on which packages add backends here.
    del fields["backend"]["enum"]
    return fields


class MLflowProject(Block):
    """A project's URI with a version and defaults; ``block://NAME`` refers to it.

    Example:
        Save it once, and run it by its name::

            from prefect_mlprojects.blocks import MLflowProject

            MLflowProject(uri="https://github.com/acme/churn", version="v2").save("churn")
            run("block://churn", parameters={"alpha": 0.1})
    """

    _block_type_name = "MLflow Project"
    _block_type_slug = "mlflow-project"
    _logo_url = MLFLOW_LOGO
    _description = "The URI of an MLflow project, with a version and defaults."

    model_config = ConfigDict(hide_input_in_errors=True)

    uri: str = Field(title="URI", description="Folder, git repository or zip archive, with an optional #sub/directory.")
    version: str | None = Field(default=None, description="Branch, tag or commit of a git project.")
    entry_point: str = Field(default="main", description="Entry point that runs by default.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Default parameter values.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Default run options.",
        json_schema_extra={"properties": _option_fields()},
    )

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str) -> str:
        if holds_secret(uri):
            # Anyone who may read the block sees its URI.
            raise ValueError(str(secret_uri_problem(uri)))
        return uri

    @model_validator(mode="after")
    def _fields_hold_no_secret(self) -> MLflowProject:
        from prefect_mlprojects.request.secrets import split_parameters, storable_options

        if names := split_parameters(self.parameters)[1]:
            raise ValueError(
                f"the parameters hold secrets ({', '.join(names)}), which whoever may read the block would see; declare them with "
                "'secret: true' in the MLproject file, and refer to blocks: block://secret/NAME"
            )
        try:
            storable_options("The project block can't be created", self.options)
        except ExecutionException as error:
            raise ValueError(error.message) from None
        return self


class MLprojectBackend(Block):
    """A configuration for any backend, with its secrets kept apart.

    Example:
        Give a longer grace period to every run that names it::

            from prefect_mlprojects.blocks import MLprojectBackend

            MLprojectBackend(config={"grace-period": 60}).save("patient")
            run("project", backend_config="mlproject-backend/patient")
    """

    _block_type_name = "MLproject Backend"
    _block_type_slug = "mlproject-backend"
    _logo_url = MLFLOW_LOGO
    _description = "The configuration of a backend of prefect-mlprojects, with its secrets."

    config: dict[str, Any] = Field(
        default_factory=dict,
        title="Configuration",
        description="Keys of the backend's configuration, as in --backend-config.",
    )
    secrets: SecretDict | None = Field(default=None, description="Further keys, whose values are secret.")

    def get_backend_config(self) -> dict[str, Any]:
        """Returns the configuration with its secrets, for use in memory."""
        return {**self.config, **_revealed(self.secrets)}


class KubernetesJobDefaults(Block):
    """Defaults for Jobs: a configuration of the Kubernetes backend, without secrets."""

    _block_type_name = "Kubernetes Backend (MLproject)"
    _block_type_slug = "kubernetes-backend"
    _logo_url = KUBERNETES_LOGO
    _description = "Defaults for projects that run as Kubernetes Jobs."

    config: dict[str, Any] = Field(default_factory=dict, description="The Kubernetes backend's configuration.")
    credentials: str | None = Field(default=None, description="Name of a Kubernetes cluster block.")

    def get_backend_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        return {**self.config, **({"credentials": self.credentials} if self.credentials else {})}


class DatabricksBackendBlock(Block):
    """The configuration of runs on Databricks, with its secrets kept apart.

    Keys of ``config`` that hold a literal secret, such as a ``new_cluster`` with a password, are moved to ``secrets``.
    """

    _block_type_name = "Databricks Backend"
    _block_type_slug = "databricks-backend"
    _logo_url = DATABRICKS_LOGO
    _description = "The configuration of the databricks backend of prefect-mlprojects."

    config: dict[str, Any] = Field(
        default_factory=dict, title="Configuration", description="The keys of --backend-config, such as new_cluster."
    )
    secrets: SecretDict | None = Field(default=None, description="Further keys, whose values are secret.")
    workspace: DatabricksWorkspace | None = Field(default=None, description="The workspace and its credentials.")

    @model_validator(mode="after")
    def _keep_secrets_apart(self) -> DatabricksBackendBlock:
        from prefect_mlprojects.backends.databricks.config import secret_keys

        if moved := secret_keys(self.config):
            self.secrets = SecretDict({**_revealed(self.secrets), **{key: self.config[key] for key in moved}})
            self.config = {key: value for key, value in self.config.items() if key not in moved}
        return self

    def get_backend_config(self) -> dict[str, Any]:
        """Returns the configuration with its secrets and credentials, for use in memory."""
        credentials = {"credentials": self.workspace.get_credentials()} if self.workspace else {}
        return {**self.config, **_revealed(self.secrets), **credentials}


def _revealed(secrets: SecretDict | None) -> dict[str, Any]:
    return secrets.get_secret_value() if secrets is not None else {}
