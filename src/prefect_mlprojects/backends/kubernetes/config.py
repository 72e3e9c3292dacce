"""The Kubernetes backend's configuration and job template, as users write them, and the connection that it names."""

from __future__ import annotations

import atexit
import functools
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from prefect_mlprojects._support.documents import decode, load_yaml, read_limited
from prefect_mlprojects._support.files import is_within, write_private
from prefect_mlprojects._support.process_folders import create_private_folder, remove_private_folder
from prefect_mlprojects._support.redaction import holds_secret, mark_variable, redact
from prefect_mlprojects._support.secrets import Secret, reveal, reveal_all
from prefect_mlprojects.backends.configuration import parse_config
from prefect_mlprojects.backends.contract import BackendRequest
from prefect_mlprojects.backends.kubernetes.api import Cluster, nested
from prefect_mlprojects.exceptions import BackendError

BACKEND = "kubernetes"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

DeliveryName: TypeAlias = Literal["image", "archive", "git", "none"]  # how a project's code gets into its pod


def backend_error(message: str) -> BackendError:
    """Returns an error of this backend."""
    return BackendError(message, backend=BACKEND)


def _as_resources(value: Any) -> Any:
    """Accepts ``{cpu: 2, memory: 4Gi}`` as short for ``requests``."""
    short = isinstance(value, Mapping) and value and not set(value) & {"requests", "limits"}
    return {"requests": value} if short else value


def _as_kubeconfig(value: Any) -> Any:
    """Returns a kubeconfig's content as a secret, its path as it is."""
    if isinstance(value, Mapping):
        return Secret(json.dumps(value))
    return Secret(value) if isinstance(value, str) and _is_content(value) else value


def _is_content(kubeconfig: str) -> bool:
    return "\n" in kubeconfig or kubeconfig.lstrip().startswith("{")


def _hide_user_info(value: Any) -> Any:
    return Secret(value) if isinstance(value, str) and holds_secret(value) else value


def _mark_variables(template: Any) -> Any:
    """Returns a job template with what may be secret of its containers' ``env`` as `Secret` or `Withheld`."""
    spec = nested(template, "spec.template.spec") if isinstance(template, Mapping) else None
    if not isinstance(spec, Mapping):
        return template
    kinds = [kind for kind in ("containers", "initContainers") if isinstance(spec.get(kind), list)]
    marked = {**spec, **{kind: [_mark_container(each) for each in spec[kind]] for kind in kinds}}
    job, pod = template["spec"], template["spec"]["template"]
    return {**template, "spec": {**job, "template": {**pod, "spec": marked}}}


def _mark_container(container: Any) -> Any:
    if not isinstance(container, Mapping) or not isinstance(container.get("env"), list):
        return container
    variables = [
        {**each, "value": mark_variable(str(each.get("name")), each["value"])}
        if isinstance(each, Mapping) and isinstance(each.get("value"), str)
        else each
        for each in container["env"]
    ]
    return {**container, "env": variables}


_Kubeconfig: TypeAlias = Annotated[str | Secret | None, BeforeValidator(_as_kubeconfig)]
_TrackingUri: TypeAlias = Annotated[str | Secret | None, BeforeValidator(_hide_user_info)]


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        populate_by_name=True,
        hide_input_in_errors=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )


class Resources(_Model):
    """Resources of the project's container, as Kubernetes quantities: ``{"cpu": "2", "memory": "4Gi"}``."""

    # YAML reads ``cpu: 2`` as a number.
    model_config = ConfigDict(coerce_numbers_to_str=True)

    requests: dict[str, str] = Field(default_factory=dict)
    limits: dict[str, str] = Field(default_factory=dict)


class Credentials(_Model):
    """Connection and credentials of a cluster, as the block `KubernetesCluster` documents them."""

    kubeconfig: _Kubeconfig = Field(default=None, repr=False)
    context: str | None = None
    host: str | None = None
    token: Secret | None = None
    certificate_authority: str | None = None
    verify_tls: bool = True


class KubernetesConfig(_Model):
    """The backend's configuration; the first three keys are MLflow's, and docs/kubernetes.md documents all of them."""

    kube_context: str | None = None
    kube_job_template_path: str | None = None
    repository_uri: str | None = None
    kube_job_template: Annotated[dict[str, Any] | None, BeforeValidator(_mark_variables)] = Field(
        default=None, repr=False
    )
    kubeconfig: _Kubeconfig = Field(default=None, repr=False)
    in_cluster: bool | None = None
    credentials: str | Credentials | None = Field(default=None, repr=False)
    """The name of a Kubernetes cluster block, or its content."""
    namespace: str | None = None
    image_pull_secrets: Annotated[
        list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = Field(default_factory=list)
    code_delivery: DeliveryName | None = None
    git_image: str = "alpine/git:2.47.2"
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0)
    backoff_limit: int | None = Field(default=None, ge=0)
    timeout: int | None = Field(default=None, ge=1)
    """Seconds, enforced by Kubernetes."""
    resources: Annotated[Resources | None, BeforeValidator(_as_resources)] = None
    service_account: str | None = None
    tracking_uri: _TrackingUri = Field(default=None, repr=False)
    allow_host_paths: bool = False
    start_grace: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    scheduling_grace: float = Field(default=600.0, ge=0, allow_inf_nan=False)
    termination_grace: int | None = Field(default=None, ge=0)


KubernetesRequest: TypeAlias = BackendRequest[KubernetesConfig]


def parse_kubernetes_config(config: Mapping[str, Any]) -> KubernetesConfig:
    """Returns the configuration as its model.

    Raises `BackendError` if a key is unknown (the nearest is named), a value has the wrong type, or keys contradict each other.
    """
    parsed = parse_config(KubernetesConfig, config, backend=BACKEND)
    for keys in (("kube-job-template", "kube-job-template-path"), ("kubeconfig", "in-cluster", "credentials")):
        given = [key for key in keys if getattr(parsed, key.replace("-", "_")) not in (None, False)]
        if len(given) > 1:
            raise backend_error(f"The kubernetes backend_config sets more than one of: {', '.join(given)}. Keep one.")
    return parsed


def load_template(config: KubernetesConfig, directory: Path) -> dict[str, Any] | None:
    """Returns the user's Job template, or None.

    A relative path is resolved against the working directory, then against the project's `directory`. Raises `BackendError` if
    the file can't be read or does not contain exactly one Job.
    """
    if config.kube_job_template is not None:
        return _checked(reveal_all(config.kube_job_template), "'kube-job-template'")
    if config.kube_job_template_path is None:
        return None
    import yaml

    path = Path(config.kube_job_template_path).expanduser()
    if not path.is_absolute() and not path.exists() and (directory / path).exists():
        path = directory / path
        if not is_within(path, directory):
            raise backend_error(
                f"The job template {path} ('kube-job-template-path') leads out of the project's folder."
            )
    try:
        documents = [each for each in load_yaml(decode(read_limited(path))) if each is not None]
    except OSError as error:
        reason = error.strerror or error
        raise backend_error(f"The job template {path} ('kube-job-template-path') can't be read: {reason}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = f":{mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        problem = getattr(error, "problem", None) or error
        raise backend_error(f"{path}{line}: The job template is not valid YAML: {problem}.") from None
    if len(documents) != 1:
        raise backend_error(f"The job template {path} must contain one Job, not {len(documents)} documents.")
    return _checked(documents[0], f"The job template {path}")


def _checked(template: Any, what: str) -> dict[str, Any]:
    if not isinstance(template, dict):
        raise backend_error(f"{what} must be a mapping, not {type(template).__name__}.")
    kind, version = template.get("kind", "Job"), template.get("apiVersion", "batch/v1")
    if (kind, version) != ("Job", "batch/v1"):
        raise backend_error(f"{what} must be a Job of batch/v1, not a {kind} of {version}.")
    for path in ("metadata", "spec", "spec.template", "spec.template.spec"):
        value = nested(template, path)
        if value is not None and not isinstance(value, dict):
            raise backend_error(f"{what}: {path} must be a mapping.")
    containers = nested(template, "spec.template.spec.containers") or []
    if not isinstance(containers, list) or not all(isinstance(each, dict) for each in containers):
        raise backend_error(f"{what}: spec.template.spec.containers must be a list of mappings.")
    return template


def connect(config: KubernetesConfig, namespace: str | None = None) -> Cluster:
    """Returns the cluster that the configuration names; sends no request.

    Precedence as in MLflow and kubectl: the configuration, then ``KUBECONFIG`` or ``~/.kube/config``, then the service account of
    the pod that this process runs in. The namespace is the configuration's, else `namespace`, else the context's, else ``default``.
    Raises `BackendError` if the context or file does not exist, or nothing names a cluster.
    """
    from kubernetes import client
    from kubernetes.config.config_exception import ConfigException

    settings = client.Configuration()
    # `Cluster.call` retries; urllib3's own retries would sleep as long as the server asks and can't be stopped.
    settings.retries = False
    try:
        context_namespace, name = _load_connection(config, settings)
        api_client = client.ApiClient(settings)
    except ConfigException as error:
        raise backend_error(
            f"The Kubernetes cluster can't be reached: {redact(str(error)).rstrip('.')}. Check 'kube-context' and "
            "'kubeconfig' of the backend configuration, or the variable KUBECONFIG."
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        # The client fails in many ways on a malformed kubeconfig; its messages may quote secrets.
        raise backend_error(f"The kubeconfig is invalid ({type(error).__name__}): see 'kubectl config view'.") from None
    return Cluster(api_client, config.namespace or namespace or context_namespace or "default", name)


def _load_connection(config: KubernetesConfig, settings: Any) -> tuple[str | None, str]:
    """Sets the client's settings; returns the namespace that belongs to the connection and the cluster's name in messages."""
    if isinstance(config.credentials, str):
        raise backend_error(
            f"The Kubernetes cluster block {config.credentials!r} ('credentials') was not loaded: pass its name to a run or "
            "deployment of the flow."
        )
    secrets = config.credentials or Credentials()
    if secrets.host:
        return _load_token(secrets, secrets.host, settings)
    kubeconfig = config.kubeconfig if config.kubeconfig is not None else secrets.kubeconfig
    context = config.kube_context or secrets.context
    in_cluster = config.in_cluster
    if in_cluster is None and kubeconfig is None and not context:
        paths = (os.environ.get("KUBECONFIG", "") or "~/.kube/config").split(os.pathsep)
        exists = any(Path(path).expanduser().exists() for path in paths if path)
        in_cluster = not exists and bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    if kubeconfig is None and in_cluster:
        from kubernetes.config import load_incluster_config

        load_incluster_config(client_configuration=settings)
        namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip() if _NAMESPACE_FILE.exists() else None
        return namespace, "the cluster of this pod"
    return _load_kubeconfig(reveal_all(kubeconfig), context, settings)


def _load_kubeconfig(kubeconfig: str | None, context: str | None, settings: Any) -> tuple[str | None, str]:
    from kubernetes import config
    from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION

    options = {"context": context, "client_configuration": settings, "persist_config": False}
    # The library writes certificates and keys of a kubeconfig to files.
    options["temp_file_path"] = str(_key_folder())
    if kubeconfig is not None and _is_content(kubeconfig):
        mapping = _parse_kubeconfig(kubeconfig)
        config.load_kube_config_from_dict(mapping, **options)
        contexts, active = mapping.get("contexts") or [], mapping.get("current-context")
    else:
        path = Path(kubeconfig).expanduser() if kubeconfig is not None else None
        if path is not None and not path.is_file():
            raise backend_error(f"The kubeconfig {path} ('kubeconfig') does not exist.")
        # The library reads KUBECONFIG on import, which may have been before it was set.
        file = str(path) if path else os.environ.get("KUBECONFIG") or KUBE_CONFIG_DEFAULT_LOCATION
        config.load_kube_config(config_file=file, **options)
        contexts, current = config.list_kube_config_contexts(config_file=file)
        active = current["name"] if current else None
    name = context or active or ""
    entry: dict[str, Any] = next((each for each in contexts if each.get("name") == name), {})
    return (entry.get("context") or {}).get("namespace"), f"the cluster of context '{name}'"


def _parse_kubeconfig(text: str) -> dict[str, Any]:
    import yaml

    try:
        loaded = next(iter(load_yaml(text)), None)
    except yaml.YAMLError:
        loaded = None
    if not isinstance(loaded, dict):
        # The text is not quoted: it contains secrets.
        raise backend_error("The text of 'kubeconfig' is not a kubeconfig: it is not a YAML mapping.")
    return loaded


def _load_token(secrets: Credentials, host: str, settings: Any) -> tuple[None, str]:
    settings.host = host.rstrip("/")
    settings.verify_ssl = secrets.verify_tls
    if secrets.token is not None:
        settings.api_key = {"authorization": f"Bearer {reveal(secrets.token)}"}
    if secrets.certificate_authority:
        file = _key_folder() / f"{uuid.uuid4().hex}.pem"
        write_private(file, secrets.certificate_authority)
        settings.ssl_ca_cert = str(file)
    return None, f"the cluster at {redact(settings.host)}"


@functools.cache
def _key_folder() -> Path:
    """Returns this process's folder for certificates and keys, which connection pools read on each connect."""
    folder = create_private_folder()
    atexit.register(remove_private_folder, folder)
    return folder
