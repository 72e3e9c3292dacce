"""Kubernetes blocks: the way into a cluster, and defaults for Jobs."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from prefect_mlprojects.blocks import logos


class KubernetesCluster(Block):
    """The way into a Kubernetes cluster: a kubeconfig, or an API server's address with a token.

    Attributes:
        kubeconfig: A kubeconfig's text.
        context: The context in it; by default its current one.
        host: The API server's URL, instead of a kubeconfig.
        token: A bearer token for it.
        certificate_authority: Its certificate authority, PEM.
        verify_tls: Whether its certificate is checked.
    """

    _block_type_name = "Kubernetes Cluster (MLproject)"
    _block_type_slug = "kubernetes-cluster"
    _logo_url = logos.KUBERNETES
    _description = "The way into a Kubernetes cluster on which projects run as Jobs."

    kubeconfig: SecretStr | None = Field(default=None, description="A kubeconfig's text.")
    context: str | None = Field(default=None, description="The context in it; by default its current one.")
    host: str | None = Field(default=None, description="The API server's URL, instead of a kubeconfig.")
    token: SecretStr | None = Field(default=None, description="A bearer token for it.")
    certificate_authority: str | None = Field(default=None, description="Its certificate authority, PEM.")
    verify_tls: bool = Field(default=True, description="Whether its certificate is checked.")

    def get_credentials(self) -> dict[str, Any]:
        """Returns what the backend's ``credentials`` take: plain values, for memory only."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name.replace("_", "-"): value.get_secret_value() if isinstance(value, SecretStr) else value
            for name, value in values.items()
            if value is not None
        }

    def test_connection(self) -> str:
        """Asks the cluster for its version and returns it.

        Raises:
            BackendError: It can't be reached.
        """
        from kubernetes.client import VersionApi

        from prefect_mlprojects.backends.kubernetes.api import ApiRefusal, Cluster
        from prefect_mlprojects.backends.kubernetes.config import BACKEND, parse_kubernetes_config
        from prefect_mlprojects.backends.kubernetes.connection import connect
        from prefect_mlprojects.backends.kubernetes.diagnosis import explain_refusal
        from prefect_mlprojects.exceptions import BackendError

        cluster = Cluster(*connect(parse_kubernetes_config({"credentials": self.get_credentials()})))
        try:
            return str(cluster.call("get version", VersionApi(cluster.client).get_code, patience=5.0).get("gitVersion"))
        except ApiRefusal as refusal:
            raise BackendError(". ".join(explain_refusal(refusal, cluster.name)), backend=BACKEND) from None


class KubernetesJobDefaults(Block):
    """Defaults for Jobs: a configuration of the Kubernetes backend, without secrets.

    Attributes:
        config: The configuration, by the keys that ``docs/kubernetes.md`` lists.
        credentials: The name of a Kubernetes cluster block.
    """

    _block_type_name = "Kubernetes Backend (MLproject)"
    _block_type_slug = "kubernetes-backend"
    _logo_url = logos.KUBERNETES
    _description = "Defaults for projects that run as Kubernetes Jobs."

    config: dict[str, Any] = Field(default_factory=dict, description="The Kubernetes backend's configuration.")
    credentials: str | None = Field(default=None, description="The name of a Kubernetes cluster block.")

    def get_backend_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        return {**self.config, **({"credentials": self.credentials} if self.credentials else {})}
