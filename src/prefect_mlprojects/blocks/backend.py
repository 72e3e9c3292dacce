"""A configuration for any backend."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from prefect.types import SecretDict
from pydantic import Field

from prefect_mlprojects.blocks import logos


class MLprojectBackend(Block):
    """A backend's configuration under a name, with what is secret in it kept apart.

    Example:
        Give a patient grace period to every run that names it::

            from prefect_mlprojects.blocks import MLprojectBackend

            MLprojectBackend(config={"grace-period": 60}).save("patient")
            run("project", backend_config="mlproject-backend/patient")
    """

    _block_type_name = "MLproject Backend"
    _block_type_slug = "mlproject-backend"
    _logo_url = logos.MLFLOW
    _description = "The configuration of a backend of prefect-mlprojects, with its secrets."

    config: dict[str, Any] = Field(
        default_factory=dict,
        title="Configuration",
        description="The keys that the backend knows, as in --backend-config.",
    )
    secrets: SecretDict | None = Field(default=None, description="Further keys, which nobody sees.")

    def get_backend_config(self) -> dict[str, Any]:
        """Returns the configuration with its secrets, for use in memory."""
        secrets = self.secrets.get_secret_value() if self.secrets is not None else {}
        return {**self.config, **secrets}
