"""The way into a cluster: a context, a kubeconfig, the pod's own service account or a cluster block."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import reveal, reveal_all
from prefect_mlprojects.backends.kubernetes.config import BACKEND, KubernetesConfig
from prefect_mlprojects.exceptions import BackendError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SERVICE_HOST_VARIABLE = "KUBERNETES_SERVICE_HOST"


def connect(config: KubernetesConfig) -> tuple[ApiClient, str, str]:
    """Returns a client of the cluster that the configuration names; the cluster is not asked anything yet.

    The order is that of MLflow and kubectl: what the configuration says, else ``KUBECONFIG`` or ``~/.kube/config``, else the
    service account of the pod that we run in.

    Args:
        config: The configuration.

    Returns:
        The client, the namespace to use, and what the cluster is called in messages.

    Raises:
        BackendError: There is no such context or file, or nothing names a cluster.
    """
    from kubernetes.config.config_exception import ConfigException

    try:
        client, namespace, name = _connect(config)
    except ConfigException as error:
        raise BackendError(
            f"The Kubernetes cluster can't be reached: {redact(str(error)).rstrip('.')}. Check 'kube-context' and "
            "'kubeconfig' of the backend configuration, or the variable KUBECONFIG.",
            backend=BACKEND,
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        # A malformed kubeconfig makes the client fail in many ways; its own text may quote secrets.
        raise BackendError(
            f"The kubeconfig can't be used ({type(error).__name__}). Check it with 'kubectl config view'.",
            backend=BACKEND,
        ) from None
    return client, config.namespace or namespace or "default", name


def _connect(config: KubernetesConfig) -> tuple[ApiClient, str | None, str]:
    if isinstance(config.credentials, str):
        raise BackendError(
            f"The credentials {config.credentials!r} name a block, which was not resolved: give the block's name to a run "
            "or deployment of the flow.",
            backend=BACKEND,
        )
    secrets = config.secrets
    if secrets.host:
        return _from_token(config)
    kubeconfig = config.kubeconfig if config.kubeconfig is not None else secrets.kubeconfig
    context = config.kube_context or secrets.context
    if kubeconfig is not None:
        return _from_kubeconfig(reveal_all(kubeconfig), context)
    if config.in_cluster or (config.in_cluster is None and not context and not _has_kubeconfig() and _in_pod()):
        return _from_pod()
    return _from_kubeconfig(None, context)


def _has_kubeconfig() -> bool:
    paths = os.environ.get("KUBECONFIG", "") or "~/.kube/config"
    return any(Path(path).expanduser().exists() for path in paths.split(os.pathsep) if path)


def _in_pod() -> bool:
    return bool(os.environ.get(_SERVICE_HOST_VARIABLE))


def _from_pod() -> tuple[ApiClient, str | None, str]:
    from kubernetes import client, config

    settings = _settings()
    config.load_incluster_config(client_configuration=settings)
    namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip() if _NAMESPACE_FILE.exists() else None
    return client.ApiClient(settings), namespace, "the cluster of this pod"


def _from_kubeconfig(content: str | None, context: str | None) -> tuple[ApiClient, str | None, str]:
    from kubernetes import client, config
    from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION

    mapping, path = _kubeconfig_source(content)
    settings = _settings()
    if mapping is not None:
        config.load_kube_config_from_dict(mapping, context=context, client_configuration=settings, persist_config=False)
        contexts, active = mapping.get("contexts") or [], mapping.get("current-context")
    else:
        # The library reads KUBECONFIG when it is imported, which may have been earlier.
        file = path or os.environ.get("KUBECONFIG") or KUBE_CONFIG_DEFAULT_LOCATION
        config.load_kube_config(config_file=file, context=context, client_configuration=settings, persist_config=False)
        contexts, current = config.list_kube_config_contexts(config_file=file)
        active = current["name"] if current else None
    name = context or active or ""
    entry: dict[str, Any] = next((each for each in contexts if each.get("name") == name), {})
    return client.ApiClient(settings), (entry.get("context") or {}).get("namespace"), f"the cluster of context '{name}'"


def _kubeconfig_source(content: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """Tells a kubeconfig's text from its path; returns the mapping or the path."""
    if content is None:
        return None, None
    if "\n" not in content and not content.lstrip().startswith("{"):
        path = Path(content).expanduser()
        if not path.is_file():
            raise BackendError(f"The kubeconfig {path} ('kubeconfig') does not exist.", backend=BACKEND)
        return None, str(path)
    import yaml

    try:
        loaded = yaml.safe_load(content)
    except yaml.YAMLError:
        loaded = None
    if not isinstance(loaded, dict):
        # Its text is not shown: it holds secrets.
        raise BackendError("The text of 'kubeconfig' is not a kubeconfig: not a YAML mapping.", backend=BACKEND)
    return loaded, None


def _from_token(config: KubernetesConfig) -> tuple[ApiClient, str | None, str]:
    from kubernetes import client

    secrets, settings = config.secrets, _settings()
    assert secrets.host is not None
    settings.host = secrets.host.rstrip("/")
    settings.verify_ssl = secrets.verify_tls
    if secrets.token is not None:
        settings.api_key = {"authorization": f"Bearer {reveal(secrets.token)}"}
    if secrets.certificate_authority:
        with tempfile.NamedTemporaryFile("w", suffix=".pem", delete=False) as file:
            file.write(secrets.certificate_authority)
        settings.ssl_ca_cert = file.name
        api_client = client.ApiClient(settings)
        # The connection pool has to find the file when it connects; the library keeps such files to the process's end too.
        import atexit

        atexit.register(Path(file.name).unlink, missing_ok=True)
        return api_client, None, f"the cluster at {redact(settings.host)}"
    return client.ApiClient(settings), None, f"the cluster at {redact(settings.host)}"


def _settings() -> Any:
    from kubernetes import client

    settings = client.Configuration()
    # Ours are the retries: urllib3's would sleep for as long as a server says, and could not be stopped.
    settings.retries = False
    return settings
