"""An MLflow tracking server."""

from __future__ import annotations

from urllib.parse import quote, urlsplit, urlunsplit

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from prefect_mlprojects.blocks import logos


class MLflowTrackingServer(Block):
    """The address of an MLflow tracking server, and how to get in.

    Example:
        Runs that name it are tracked there::

            from prefect_mlprojects.blocks import MLflowTrackingServer

            MLflowTrackingServer(uri="https://mlflow.example.com", username="ci", password="…").save("prod")
            run("https://github.com/acme/churn", tracking="prod")
    """

    _block_type_name = "MLflow Tracking Server"
    _block_type_slug = "mlflow-tracking-server"
    _logo_url = logos.MLFLOW
    _description = "The address of an MLflow tracking server or store, with user name and password."

    uri: str = Field(title="Tracking URI", description="As in MLFLOW_TRACKING_URI, such as https://mlflow.example.com.")
    username: str | None = Field(default=None, description="For servers with basic authentication.")
    password: SecretStr | None = Field(default=None, description="For servers with basic authentication.")

    def tracking_uri(self) -> str:
        """Returns the tracking URI with user name and password in it, for use in memory."""
        if self.username is None:
            return self.uri
        parts = urlsplit(self.uri)
        secret = self.password.get_secret_value() if self.password is not None else ""
        user = f"{quote(self.username, safe='')}:{quote(secret, safe='')}"
        return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}"))

    def test_connection(self) -> None:
        """Asks the store for its first experiment.

        Raises:
            MlflowException: It refused, or could not be reached.
        """
        from prefect_mlprojects.tracking.artifacts import check_store

        check_store(self.tracking_uri())
