"""The Kubernetes backend's configuration and job template, as users write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from prefect_mlprojects._support.redaction import holds_secret
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.configuration import parse_config
from prefect_mlprojects.backends.contract import BackendRequest
from prefect_mlprojects.exceptions import BackendError

BACKEND = "kubernetes"

DeliveryName: TypeAlias = Literal["image", "archive", "git", "none"]
"""How a project's code gets into its pod."""


def backend_error(message: str) -> BackendError:
    """Returns an error of this backend."""
    return BackendError(message, backend=BACKEND)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_quantities(value: Any) -> Any:
    """Accepts ``cpu: 2`` as YAML reads it, a number; Kubernetes requires text."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: str(each) if isinstance(each, int | float) and not isinstance(each, bool) else each
        for key, each in value.items()
    }


def _as_resources(value: Any) -> Any:
    """Accepts ``{cpu: 2, memory: 4Gi}`` as short for ``requests``."""
    if isinstance(value, Mapping) and value and not set(value) & {"requests", "limits"}:
        return {"requests": value}
    return value


_Quantities: TypeAlias = Annotated[dict[str, str], BeforeValidator(_as_quantities)]


def _as_kubeconfig(value: Any) -> Any:
    """Returns a kubeconfig's content as a secret, its path as it is."""
    if isinstance(value, Mapping):
        return Secret(json.dumps(value))
    if isinstance(value, str) and ("\n" in value or value.lstrip().startswith("{")):
        return Secret(value)
    return value


def _hide_user_info(value: Any) -> Any:
    return Secret(value) if isinstance(value, str) and holds_secret(value) else value


class Resources(BaseModel):
    """Resources of the project's container, as Kubernetes quantities: ``{"cpu": "2", "memory": "4Gi"}``."""

    model_config = ConfigDict(extra="forbid")

    requests: _Quantities = Field(default_factory=dict)
    limits: _Quantities = Field(default_factory=dict)


class Credentials(BaseModel):
    """Connection and credentials of a cluster, as a Kubernetes cluster block holds them.

    Attributes:
        kubeconfig: A kubeconfig as text or mapping.
        context: A context of `kubeconfig`. Default: its current context.
        host: URL of the API server, instead of a kubeconfig.
        token: Bearer token for `host`.
        certificate_authority: Certificate authority of `host`, PEM.
        verify_tls: Whether the certificate of `host` is verified.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    kubeconfig: Annotated[str | Secret | None, BeforeValidator(_as_kubeconfig)] = Field(default=None, repr=False)
    context: str | None = None
    host: str | None = None
    token: Secret | None = None
    certificate_authority: str | None = Field(default=None, alias="certificate-authority")
    verify_tls: bool = Field(default=True, alias="verify-tls")


class KubernetesConfig(BaseModel):
    """The backend's configuration; the first three keys are MLflow's.

    Attributes:
        kube_context: Context of the kubeconfig. Default: its current context.
        kube_job_template_path: Path of a YAML or JSON file with a ``batch/v1`` Job.
        repository_uri: Image repository to push to, without a tag.
        kube_job_template: The Job itself, instead of a file.
        kubeconfig: Path, text or mapping of a kubeconfig.
        in_cluster: Whether to use the pod's service account. Default: if no kubeconfig exists.
        credentials: Name of a Kubernetes cluster block, or its content.
        namespace: Namespace of the Job.
        image_pull_secrets: Names of Secrets in that namespace for pulling images.
        code_delivery: How the project's code gets into the pod. Default: what fits.
        git_image: Image that clones the repository; it must contain ``git`` and ``sh``.
        ttl_seconds_after_finished: Seconds after which Kubernetes deletes the finished Job.
        backoff_limit: How often Kubernetes retries a failed pod.
        timeout: Time limit of the Job in seconds, enforced by Kubernetes.
        resources: Resources of the project's container.
        service_account: Service account of the pod.
        tracking_uri: Tracking URI for the pod. Default: ``KUBE_MLFLOW_TRACKING_URI``, else the run's.
        allow_host_paths: Whether ``docker_env`` volumes become hostPath volumes.
        start_grace: Seconds for which a pod may fail to start (image, configuration) before the run fails.
        scheduling_grace: Seconds for which a pod may wait for a node.
        termination_grace: Seconds between SIGTERM and SIGKILL.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    kube_context: str | None = Field(default=None, alias="kube-context")
    kube_job_template_path: str | None = Field(default=None, alias="kube-job-template-path")
    repository_uri: str | None = Field(default=None, alias="repository-uri")
    kube_job_template: dict[str, Any] | None = Field(default=None, alias="kube-job-template")
    kubeconfig: Annotated[str | Secret | None, BeforeValidator(_as_kubeconfig)] = Field(default=None, repr=False)
    in_cluster: bool | None = Field(default=None, alias="in-cluster")
    credentials: str | Credentials | None = Field(default=None, repr=False)
    namespace: str | None = None
    image_pull_secrets: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, alias="image-pull-secrets"
    )
    code_delivery: DeliveryName | None = Field(default=None, alias="code-delivery")
    git_image: str = Field(default="alpine/git:2.47.2", alias="git-image")
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, alias="ttl-seconds-after-finished")
    backoff_limit: int | None = Field(default=None, ge=0, alias="backoff-limit")
    timeout: int | None = Field(default=None, ge=1)
    resources: Annotated[Resources | None, BeforeValidator(_as_resources)] = None
    service_account: str | None = Field(
        default=None, alias="service-account", validation_alias=AliasChoices("service-account", "service_account")
    )
    tracking_uri: Annotated[str | Secret | None, BeforeValidator(_hide_user_info)] = Field(
        default=None, alias="tracking-uri", repr=False
    )
    allow_host_paths: bool = Field(default=False, alias="allow-host-paths")
    start_grace: float = Field(default=60.0, ge=0, allow_inf_nan=False, alias="start-grace")
    scheduling_grace: float = Field(default=600.0, ge=0, allow_inf_nan=False, alias="scheduling-grace")
    termination_grace: int | None = Field(default=None, ge=0, alias="termination-grace")

    @property
    def secrets(self) -> Credentials:
        """The content of `credentials`, once the block was loaded; empty without one."""
        return self.credentials if isinstance(self.credentials, Credentials) else Credentials()


KubernetesRequest: TypeAlias = BackendRequest[KubernetesConfig]


def parse_kubernetes_config(config: Mapping[str, Any]) -> KubernetesConfig:
    """Returns the configuration as its model.

    Raises:
        BackendError: A key is unknown (the nearest is named), a value has the wrong type, or keys contradict each other.
    """
    parsed = parse_config(KubernetesConfig, config, backend=BACKEND)
    connections = {
        "kubeconfig": parsed.kubeconfig is not None,
        "in-cluster": bool(parsed.in_cluster),
        "credentials": parsed.credentials is not None,
    }
    templates = {
        "kube-job-template": parsed.kube_job_template is not None,
        "kube-job-template-path": parsed.kube_job_template_path is not None,
    }
    for keys in (templates, connections):
        given = [key for key, is_set in keys.items() if is_set]
        if len(given) > 1:
            raise backend_error(f"The kubernetes backend_config sets more than one of: {', '.join(given)}. Keep one.")
    return parsed


def load_template(config: KubernetesConfig, directory: Path) -> dict[str, Any] | None:
    """Returns the user's Job template, or None.

    A relative path is resolved against the working directory, then against the project's `directory`.

    Raises:
        BackendError: The file can't be read or does not contain exactly one Job.
    """
    if config.kube_job_template is not None:
        return _checked(config.kube_job_template, "'kube-job-template'")
    if config.kube_job_template_path is None:
        return None
    import yaml

    path = Path(config.kube_job_template_path).expanduser()
    if not path.is_absolute() and not path.exists() and (directory / path).exists():
        path = directory / path
    try:
        documents = [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each is not None]
    except OSError as error:
        reason = error.strerror or error
        raise backend_error(f"The job template {path} ('kube-job-template-path') can't be read: {reason}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
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
    for path in (("metadata",), ("spec",), ("spec", "template"), ("spec", "template", "spec")):
        value: Any = template
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            raise backend_error(f"{what}: {'.'.join(path)} must be a mapping.")
    containers = template_pod(template).get("containers") or []
    if not isinstance(containers, list) or not all(isinstance(each, dict) for each in containers):
        raise backend_error(f"{what}: spec.template.spec.containers must be a list of mappings.")
    return template


def template_pod(template: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the pod specification of a job template; empty if it has none."""
    pod: dict[str, Any] = (((template or {}).get("spec") or {}).get("template") or {}).get("spec") or {}
    return pod


def template_namespace(template: Mapping[str, Any] | None) -> str | None:
    """Returns the namespace that a job template names, if any."""
    namespace = ((template or {}).get("metadata") or {}).get("namespace")
    return namespace if isinstance(namespace, str) else None
