"""Credentials as blocks: git hosts, image registries, Docker engines, clusters, Databricks workspaces, tracking servers."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlunsplit

from prefect.blocks.core import Block
from pydantic import Field, SecretStr, field_validator

from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.blocks.resolution import plain_values
from prefect_mlprojects.sources.git import GitCredentials, host_origins, parse_git_url

# The pictures that Prefect's own packages show for the same services.
# Any: Prefect declares a URL type and converts a text itself.
GIT_LOGO: Any = "https://git-scm.com/images/logos/downloads/Git-Icon-1788C.png"
DOCKER_LOGO: Any = (
    "https://cdn.sanity.io/images/3ugk85nk/production/14a315b79990200db7341e42553e23650b34bb96-250x250.png"
)
KUBERNETES_LOGO: Any = "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/kubernetes.png"
DATABRICKS_LOGO: Any = (
    "https://images.ctfassets.net/gm98wzqotmnx/5GTHI1PH2dTiantfps6Fnc/1c750fab7f4c14ea1b93a62b9fea6a94/"
    "databricks_logo_icon_170295.png?h=250"
)
MLFLOW_LOGO: Any = "https://raw.githubusercontent.com/mlflow/mlflow/refs/heads/master/assets/logo.svg"


class GitCredentialsBlock(Block):
    """A user name and token, or an SSH key, for the git repositories of some hosts.

    Example:
        Every project that is fetched from the host uses the token::

            from prefect_mlprojects.blocks import GitCredentialsBlock

            GitCredentialsBlock(token="…", hosts=["github.com"]).save("github")
    """

    _block_type_name = "Git Credentials"
    _block_type_slug = "git-credentials"
    _logo_url = GIT_LOGO
    _description = "A user name and token, or an SSH key, for the git repositories of some hosts."

    username: str | None = Field(default=None, description="User name for the token; most services accept any.")
    token: SecretStr | None = Field(default=None, description="Password or access token for https:// and http://.")
    ssh_private_key: SecretStr | None = Field(
        default=None,
        title="SSH private key",
        description="Unencrypted private key for ssh://, with its BEGIN and END lines.",
    )
    known_hosts: str | None = Field(
        default=None, description="Lines of a known_hosts file for ssh://. Default: the worker's own file."
    )
    hosts: list[str] = Field(
        default_factory=list,
        description="Hosts, such as github.com, git.example.com:8443 (https and ssh) or http://git.internal:3000. Default: the "
        "host of the project's own URL, and none of its submodules elsewhere.",
    )

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if not host_origins(host):
                raise ValueError(
                    f"{host!r} is no host: write github.com, git.example.com:8443 or http://git.internal:3000"
                )
        return hosts

    def get_credentials(self) -> GitCredentials:
        """Returns the credentials with their secrets, for use in memory."""
        return GitCredentials(**{**plain_values(self), "hosts": tuple(self.hosts)})

    def test_connection(self, url: str) -> None:
        """Lists the branches of the repository at `url` with these credentials.

        Raises:
            FetchError: Authentication failed, or the repository can't be reached.
        """
        from prefect_mlprojects.exceptions import FetchError
        from prefect_mlprojects.sources.git.program import explain_failure, use_git
        from prefect_mlprojects.types import StopSignal

        address = parse_git_url(url)
        if address is None:
            raise FetchError(f"{url!r} is not the URL of a git repository.", uri=url)
        with use_git(address, self.get_credentials(), StopSignal(), address.url) as git:
            answer = git.run("ls-remote", "--heads", "--", address.url)
        if not answer.succeeded:
            failure = explain_failure(answer.text, scheme=address.scheme, host=address.host)
            raise FetchError(f"{address.url!r} can't be reached: {failure.text}. {failure.advice}", uri=address.url)


class DockerRegistry(Block):
    """A user name and password for an image registry.

    Example:
        Pull a project's image with them::

            from prefect_mlprojects.blocks import DockerRegistry

            DockerRegistry(username="ci", password="…", registry="registry.example.com").save("prod")
            run("project", backend_config={"credentials": "prod"})
    """

    _block_type_name = "Docker Registry (MLproject)"
    _block_type_slug = "docker-registry"
    _logo_url = DOCKER_LOGO
    _description = "A user name and password for an image registry, for projects that run in containers."

    username: str = Field(description="User name.")
    password: SecretStr = Field(description="Password or access token.")
    registry: str | None = Field(default=None, description="Host of the registry. Default: Docker Hub.")

    def get_credentials(self) -> dict[str, Any]:
        """Returns the credentials with their secret, for use in memory."""
        return plain_values(self)

    def test_connection(self) -> None:
        """Logs in to the registry through the Docker engine.

        Raises:
            docker.errors.DockerException: Authentication failed, or no engine can be reached.
        """
        import docker

        docker.from_env().login(self.username, self.password.get_secret_value(), registry=self.registry)


class DockerEngine(Block):
    """The address of a Docker engine, and the TLS certificates to connect with.

    Example:
        Run a project on an engine that is reached by TCP with TLS::

            from prefect_mlprojects.blocks import DockerEngine

            DockerEngine(
                host="tcp://gpu-box:2376",
                ca_certificate=Path("ca.pem").read_text(),
                client_certificate=Path("cert.pem").read_text(),
                client_key=Path("key.pem").read_text(),
            ).save("gpu-box")
            run("project", backend_config={"docker-engine": "gpu-box"})
    """

    _block_type_name = "Docker Engine (MLproject)"
    _block_type_slug = "docker-engine"
    _logo_url = DOCKER_LOGO
    _description = "The address of a Docker engine with its TLS certificates, for projects that run in containers."

    host: str = Field(
        description="unix:///path, tcp://host:port or ssh://user@host. For ssh, the worker's own keys are used."
    )
    ca_certificate: str | None = Field(
        default=None, description="Certificate authority of the engine's certificate (PEM)."
    )
    client_certificate: str | None = Field(default=None, description="Client certificate (PEM).")
    client_key: SecretStr | None = Field(default=None, description="Key of the client certificate (PEM).")

    def get_credentials(self) -> dict[str, Any]:
        """Returns the address and the certificates with their key, for use in memory."""
        return plain_values(self)

    def test_connection(self) -> None:
        """Connects to the engine.

        Raises:
            BackendError: The engine does not answer.
        """
        from prefect_mlprojects.backends.containers.engine import LocalConfig, connect

        connect(LocalConfig.model_validate({"docker-engine": self.get_credentials()})).close()


class KubernetesCluster(Block):
    """Connection and credentials of a Kubernetes cluster: a kubeconfig, or an API server's URL with a token."""

    _block_type_name = "Kubernetes Cluster (MLproject)"
    _block_type_slug = "kubernetes-cluster"
    _logo_url = KUBERNETES_LOGO
    _description = "Connection and credentials of a Kubernetes cluster on which projects run as Jobs."

    kubeconfig: SecretStr | None = Field(default=None, description="Text of a kubeconfig.")
    context: str | None = Field(default=None, description="A context of the kubeconfig. Default: its current context.")
    host: str | None = Field(default=None, description="URL of the API server, instead of a kubeconfig.")
    token: SecretStr | None = Field(default=None, description="Bearer token for the API server.")
    certificate_authority: str | None = Field(default=None, description="Certificate authority of the API server, PEM.")
    verify_tls: bool = Field(default=True, description="Whether the certificate of the API server is verified.")

    def get_credentials(self) -> dict[str, Any]:
        """Returns the value of the backend's ``credentials`` key: plain text, not to be stored."""
        return {name.replace("_", "-"): value for name, value in plain_values(self).items()}

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


class DatabricksWorkspace(Block):
    """Credentials for a Databricks workspace: a personal access token, or a service principal's OAuth client."""

    _block_type_name = "Databricks Workspace"
    _block_type_slug = "databricks-workspace"
    _logo_url = DATABRICKS_LOGO
    _description = "Credentials for a Databricks workspace."

    host: str = Field(description="URL of the workspace, https://….")
    token: SecretStr | None = Field(default=None, description="Personal access token.")
    client_id: str | None = Field(default=None, title="Client ID", description="OAuth client of a service principal.")
    client_secret: SecretStr | None = Field(default=None, description="Secret of the OAuth client.")

    def get_credentials(self) -> dict[str, Any]:
        """Returns the fields of the SDK's ``Config``, secrets included, for use in memory."""
        return plain_values(self)

    def test_connection(self) -> str:
        """Returns the name of the authenticated user.

        Raises:
            BackendError: Authentication failed.
        """
        from prefect_mlprojects.backends.databricks.config import DatabricksConfig, connect, refused

        config = DatabricksConfig(credentials=self.get_credentials())
        client = connect(config, "")
        try:
            return str(client.current_user.me().user_name)
        except Exception as error:  # noqa: BLE001 - the SDK raises many kinds
            raise refused("The Databricks workspace can't be used", error, config) from None


class MLflowTrackingServer(Block):
    """The address of an MLflow tracking server or store, with user name and password.

    Example:
        Runs that name it are tracked there::

            from prefect_mlprojects.blocks import MLflowTrackingServer

            MLflowTrackingServer(uri="https://mlflow.example.com", username="ci", password="…").save("prod")
            run("https://github.com/acme/churn", tracking="prod")
    """

    _block_type_name = "MLflow Tracking Server"
    _block_type_slug = "mlflow-tracking-server"
    _logo_url = MLFLOW_LOGO
    _description = "The address of an MLflow tracking server or store, with user name and password."

    uri: str = Field(title="Tracking URI", description="As in MLFLOW_TRACKING_URI, such as https://mlflow.example.com.")
    username: str | None = Field(default=None, description="For servers with basic authentication.")
    password: SecretStr | None = Field(default=None, description="For servers with basic authentication.")

    def tracking_uri(self) -> str:
        """Returns the tracking URI with user name and password in it, for use in memory."""
        if self.username is None:
            return self.uri
        parts = split_url(self.uri)
        secret = self.password.get_secret_value() if self.password is not None else ""
        user = f"{quote(self.username, safe='')}:{quote(secret, safe='')}"
        return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}"))

    def test_connection(self) -> None:
        """Reads the first experiment of the store.

        Raises:
            MlflowException: Authentication failed, or the store can't be reached.
        """
        from prefect_mlprojects._support.secrets import Secret
        from prefect_mlprojects.tracking.stores import check_store

        check_store(Secret(self.tracking_uri()))
