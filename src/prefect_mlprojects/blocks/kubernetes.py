"""Kubernetes blocks: a cluster's connection, and defaults for Jobs."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from prefect_mlprojects.blocks import logos


class KubernetesCluster(Block):
    """Connection and credentials of a Kubernetes cluster: a kubeconfig, or an API server's URL with a token.

    Attributes:
        kubeconfig: Text of a kubeconfig.
        context: A context of `kubeconfig`. Default: its current context.
        host: URL of the API server, instead of a kubeconfig.
        token: Bearer token for `host`.
        certificate_authority: Certificate authority of `host`, PEM.
        verify_tls: Whether the certificate of `host` is verified.
    """

    _block_type_name = "Kubernetes Cluster (MLproject)"
    _block_type_slug = "kubernetes-cluster"
    _logo_url = logos.KUBERNETES
    _description = "Connection and credentials of a Kubernetes cluster on which projects run as Jobs."

    kubeconfig: SecretStr | None = Field(default=None, description="Text of a kubeconfig.")
    context: str | None = Field(default=None, description="A context of the kubeconfig. Default: its current context.")
    host: str | None = Field(default=None, description="URL of the API server, instead of a kubeconfig.")
    token: SecretStr | None = Field(default=None, description="Bearer token for the API server.")
    certificate_authority: str | None = Field(default=None, description="Certificate authority of the API server, PEM.")
    verify_tls: bool = Field(default=True, description="Whether the certificate of the API server is verified.")

    def get_credentials(self) -> dict[str, Any]:
        """Returns the value of the backend's ``credentials`` key: plain text, not to be stored."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name.replace("_", "-"): value.get_secret_value() if isinstance(value, SecretStr) else value
            for name, value in values.items()
            if value is not None
        }

    def test_connection(self) -> str:
        """Returns the version of the cluster.

        Raises:
            BackendError: The cluster can't be reached.
        """
        from kubernetes.client import VersionApi

        from prefect_mlprojects.backends.kubernetes.api import ApiError
        from prefect_mlprojects.backends.kubernetes.config import connect, parse_kubernetes_config
        from prefect_mlprojects.backends.kubernetes.diagnosis import refused

        cluster = connect(parse_kubernetes_config({"credentials": self.get_credentials()}))
        get_version = VersionApi(cluster.client).get_code
        try:
            return str(cluster.call("get version", function=get_version, retry_seconds=5.0).get("gitVersion"))
        except ApiError as error:
            raise refused(error, cluster.name) from None


class KubernetesJobDefaults(Block):
    """Defaults for Jobs: a configuration of the Kubernetes backend, without secrets.

    Attributes:
        config: The configuration; ``docs/kubernetes.md`` lists its keys.
        credentials: Name of a Kubernetes cluster block.
    """

    _block_type_name = "Kubernetes Backend (MLproject)"
    _block_type_slug = "kubernetes-backend"
    _logo_url = logos.KUBERNETES
    _description = "Defaults for projects that run as Kubernetes Jobs."

    config: dict[str, Any] = Field(default_factory=dict, description="The Kubernetes backend's configuration.")
    credentials: str | None = Field(default=None, description="Name of a Kubernetes cluster block.")

    def get_backend_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        return {**self.config, **({"credentials": self.credentials} if self.credentials else {})}
