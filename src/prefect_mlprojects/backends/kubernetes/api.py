"""The Kubernetes API: the client from the configuration, and requests as plain JSON with retries and typed errors."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.retry import retry
from prefect_mlprojects._support.secrets import reveal, reveal_all
from prefect_mlprojects.backends.kubernetes.config import KubernetesConfig, backend_error
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
RETRY_SECONDS = 90.0
"""How long a request is retried while the server is unreachable or overloaded."""

NO_ANSWER = 0
"""The status of an `ApiError` when no answer came."""
_TRANSIENT_STATUSES = frozenset({NO_ANSWER, 429, 500, 502, 503, 504})
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass
class ApiError(Exception):
    """Raised when the API server refuses a request or does not answer.

    Attributes:
        action: Verb and resource as RBAC names them, such as ``create jobs``.
        status: The HTTP status, or `NO_ANSWER`.
        reason: Kubernetes' reason, such as ``Forbidden`` or ``Invalid``.
        message: The server's message.
        retry_after: Seconds after which the server asks for a retry, if it does.
        namespace: The namespace of the request.
    """

    action: str
    status: int
    reason: str
    message: str
    retry_after: float | None = None
    namespace: str = ""

    def __post_init__(self) -> None:
        super().__init__(self.action, self.status, self.message)

    @property
    def transient(self) -> bool:
        """Whether a retry may succeed."""
        return self.status in _TRANSIENT_STATUSES


class Cluster:
    """A namespace of a cluster; thread-safe. `name` is the cluster's name in messages."""

    def __init__(self, client: ApiClient, namespace: str, name: str) -> None:
        from kubernetes.client import BatchV1Api, CoreV1Api

        self.client = client
        self.namespace = namespace
        self.name = name
        self.batch: Any = BatchV1Api(client)
        self.core: Any = CoreV1Api(client)

    def call(
        self,
        action: str,
        function: Callable[..., Any],
        *arguments: Any,
        stop: StopSignal | None = None,
        retry_seconds: float = RETRY_SECONDS,
        on_retry: Callable[[Any, float], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Sends an idempotent request and returns the JSON body.

        Args:
            action: Verb and resource, for messages.
            function: A method of `batch` or `core`.
            arguments: Its arguments.
            stop: Ends the retries; the last error is raised then.
            retry_seconds: How long to retry.
            on_retry: Called with the error and the delay in seconds before each retry.
            options: Its keyword arguments.

        Raises:
            ApiError: The server refused it, or the retries were used up.
        """
        return retry(
            lambda: self._request(action, function, *arguments, **options),
            is_transient=lambda error: isinstance(error, ApiError) and error.transient,
            seconds=retry_seconds,
            stop=stop,
            on_retry=on_retry,
        )

    def _request(self, action: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        options.setdefault("_request_timeout", (CONNECT_SECONDS, READ_SECONDS))
        with _translated_errors(action, self.namespace):
            response = function(*arguments, _preload_content=False, **options)
            try:
                answer = json.loads(response.data)
            finally:
                response.release_conn()
        if not isinstance(answer, dict):
            raise ApiError(action, NO_ANSWER, "", "the answer was not a JSON object", namespace=self.namespace)
        return answer

    def list_pods(self, **options: Any) -> list[dict[str, Any]]:
        """Returns the pods that a selector matches.

        Raises:
            ApiError: The server refused it.
        """
        answer = self.call("list pods", self.core.list_namespaced_pod, self.namespace, **options)
        return answer.get("items") or []

    def open(self, action: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Stream:
        """Opens a stream (a watch or a followed log), without retries.

        Raises:
            ApiError: The server refused it.
        """
        with _translated_errors(action, self.namespace):
            return Stream(function(*arguments, _preload_content=False, **options), action, self.namespace)

    def open_log(self, pod: str, query: Mapping[str, str], *, read_timeout: float) -> Stream:
        """Opens a container's log; the client's own method lacks ``sinceTime``.

        Args:
            pod: The pod's name.
            query: The query parameters of the API (``container``, ``follow``, ``sinceTime`` ...).
            read_timeout: Seconds without a byte after which the connection counts as lost.

        Raises:
            ApiError: The server refused it.
        """

        def read(**options: Any) -> Any:
            return self.client.call_api(
                "/api/v1/namespaces/{namespace}/pods/{name}/log",
                "GET",
                {"namespace": self.namespace, "name": pod},
                list(query.items()),
                {"Accept": "*/*"},
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                **options,
            )

        return self.open("get pods/log", read, _request_timeout=(CONNECT_SECONDS, read_timeout))


class Stream:
    """A response that is read while it arrives; `abort` may be called from another thread."""

    def __init__(self, response: Any, action: str, namespace: str) -> None:
        self._response = response
        self._action = action
        self._namespace = namespace

    def chunks(self) -> Iterator[bytes]:
        """Yields bytes as they arrive, until the server closes the stream.

        Raises:
            ApiError: The connection was lost.
        """
        with _translated_errors(self._action, self._namespace):
            yield from self._response.stream(65536)

    def abort(self) -> None:
        """Shuts the socket down, which ends a reader in another thread at once."""
        connection = getattr(self._response, "connection", None) or getattr(self._response, "_connection", None)
        # For a response with "Connection: close", urllib3 detaches the socket from the connection.
        raw = getattr(getattr(getattr(self._response, "_fp", None), "fp", None), "raw", None)
        sock = getattr(connection, "sock", None) or getattr(raw, "_sock", None)
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection: after a partly read response it can't be reused."""
        self._response.close()


@contextmanager
def _translated_errors(action: str, namespace: str) -> Iterator[None]:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise _api_error(action, error, namespace) from None
    except (HTTPError, OSError, ValueError) as error:
        # ValueError: urllib3 raises it for a read on an aborted response, json for a truncated body.
        text = f"{type(error).__name__}: {error}"
        raise ApiError(action, NO_ANSWER, "", text, namespace=namespace) from None


def _api_error(action: str, error: Any, namespace: str) -> ApiError:
    body: dict[str, Any] = {}
    with suppress(ValueError, TypeError):
        loaded = json.loads(error.body)
        body = loaded if isinstance(loaded, dict) else {}
    retry_after: float | None = None
    with suppress(ValueError, TypeError, KeyError):
        retry_after = float((error.headers or {})["Retry-After"])
    message = body.get("message") or str(error.body or error.reason or "").strip()[:500]
    # The client reports a failed TLS handshake as an exception of status 0.
    status = int(error.status or NO_ANSWER)
    return ApiError(action, status, body.get("reason") or "", message, retry_after, namespace)


def connect(config: KubernetesConfig, namespace: str | None = None) -> Cluster:
    """Returns the cluster that the configuration names; sends no request.

    Precedence as in MLflow and kubectl: the configuration, then ``KUBECONFIG`` or ``~/.kube/config``, then the service account of
    the pod that this process runs in.

    Args:
        config: The configuration.
        namespace: The namespace if the configuration names none. Default: the context's, else ``default``.

    Raises:
        BackendError: The context or file does not exist, or nothing names a cluster.
    """
    from kubernetes.config.config_exception import ConfigException

    try:
        client, context_namespace, name = _connect(config)
    except ConfigException as error:
        raise backend_error(
            f"The Kubernetes cluster can't be reached: {redact(str(error)).rstrip('.')}. Check 'kube-context' and "
            "'kubeconfig' of the backend configuration, or the variable KUBECONFIG."
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        # The client fails in many ways on a malformed kubeconfig; its messages may quote secrets.
        raise backend_error(
            f"The kubeconfig can't be used ({type(error).__name__}). Check it with 'kubectl config view'."
        ) from None
    return Cluster(client, config.namespace or namespace or context_namespace or "default", name)


def _connect(config: KubernetesConfig) -> tuple[ApiClient, str | None, str]:
    if isinstance(config.credentials, str):
        raise backend_error(
            f"The Kubernetes cluster block {config.credentials!r} ('credentials') was not loaded: pass its name to a run or "
            "deployment of the flow."
        )
    secrets = config.secrets
    if secrets.host:
        return _connect_with_token(config)
    kubeconfig = config.kubeconfig if config.kubeconfig is not None else secrets.kubeconfig
    context = config.kube_context or secrets.context
    if kubeconfig is not None:
        return _connect_with_kubeconfig(reveal_all(kubeconfig), context)
    in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    if config.in_cluster or (config.in_cluster is None and not context and not _has_kubeconfig() and in_pod):
        return _connect_in_pod()
    return _connect_with_kubeconfig(None, context)


def _has_kubeconfig() -> bool:
    paths = os.environ.get("KUBECONFIG", "") or "~/.kube/config"
    return any(Path(path).expanduser().exists() for path in paths.split(os.pathsep) if path)


def _connect_in_pod() -> tuple[ApiClient, str | None, str]:
    from kubernetes import client, config

    settings = _settings()
    config.load_incluster_config(client_configuration=settings)
    namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip() if _NAMESPACE_FILE.exists() else None
    return client.ApiClient(settings), namespace, "the cluster of this pod"


def _connect_with_kubeconfig(content: str | None, context: str | None) -> tuple[ApiClient, str | None, str]:
    from kubernetes import client, config
    from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION

    mapping, path = _kubeconfig_source(content)
    settings = _settings()
    if mapping is not None:
        config.load_kube_config_from_dict(mapping, context=context, client_configuration=settings, persist_config=False)
        contexts, active = mapping.get("contexts") or [], mapping.get("current-context")
    else:
        # The library reads KUBECONFIG on import, which may have been before it was set.
        file = path or os.environ.get("KUBECONFIG") or KUBE_CONFIG_DEFAULT_LOCATION
        config.load_kube_config(config_file=file, context=context, client_configuration=settings, persist_config=False)
        contexts, current = config.list_kube_config_contexts(config_file=file)
        active = current["name"] if current else None
    name = context or active or ""
    entry: dict[str, Any] = next((each for each in contexts if each.get("name") == name), {})
    return client.ApiClient(settings), (entry.get("context") or {}).get("namespace"), f"the cluster of context '{name}'"


def _kubeconfig_source(content: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the mapping of a kubeconfig given as text, or the path of one given as path."""
    if content is None:
        return None, None
    if "\n" not in content and not content.lstrip().startswith("{"):
        path = Path(content).expanduser()
        if not path.is_file():
            raise backend_error(f"The kubeconfig {path} ('kubeconfig') does not exist.")
        return None, str(path)
    import yaml

    try:
        loaded = yaml.safe_load(content)
    except yaml.YAMLError:
        loaded = None
    if not isinstance(loaded, dict):
        # The text is not quoted: it contains secrets.
        raise backend_error("The text of 'kubeconfig' is not a kubeconfig: it is not a YAML mapping.")
    return loaded, None


def _connect_with_token(config: KubernetesConfig) -> tuple[ApiClient, str | None, str]:
    from kubernetes import client

    secrets, settings = config.secrets, _settings()
    assert secrets.host is not None
    settings.host = secrets.host.rstrip("/")
    settings.verify_ssl = secrets.verify_tls
    if secrets.token is not None:
        settings.api_key = {"authorization": f"Bearer {reveal(secrets.token)}"}
    name = f"the cluster at {redact(settings.host)}"
    if not secrets.certificate_authority:
        return client.ApiClient(settings), None, name
    with tempfile.NamedTemporaryFile("w", suffix=".pem", delete=False) as file:
        file.write(secrets.certificate_authority)
    settings.ssl_ca_cert = file.name
    api_client = client.ApiClient(settings)
    # The connection pool opens the file on each connect, so it is kept until the process exits, as the library keeps its own.
    import atexit

    atexit.register(Path(file.name).unlink, missing_ok=True)
    return api_client, None, name


def _settings() -> Any:
    from kubernetes import client

    settings = client.Configuration()
    # `Cluster.call` retries; urllib3's own retries would sleep as long as the server asks and can't be stopped.
    settings.retries = False
    return settings
