"""The configuration of the Kubernetes backend, as users write it."""

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
"""The ways in which a project's code gets to its pod."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_quantities(value: Any) -> Any:
    """Lets ``cpu: 2`` be a number, as YAML reads it; Kubernetes wants text."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: str(each) if isinstance(each, int | float) and not isinstance(each, bool) else each
        for key, each in value.items()
    }


def _as_resources(value: Any) -> Any:
    """Takes ``{cpu: 2, memory: 4Gi}`` for requests, as people write it first."""
    if isinstance(value, Mapping) and value and not set(value) & {"requests", "limits"}:
        return {"requests": value}
    return value


_Quantities: TypeAlias = Annotated[dict[str, str], BeforeValidator(_as_quantities)]


def _as_kubeconfig(value: Any) -> Any:
    """Hides a kubeconfig's content; its path stays as it is."""
    if isinstance(value, Mapping):
        return Secret(json.dumps(value))
    if isinstance(value, str) and ("\n" in value or value.lstrip().startswith("{")):
        return Secret(value)
    return value


def _hide_user_info(value: Any) -> Any:
    return Secret(value) if isinstance(value, str) and holds_secret(value) else value


class Resources(BaseModel):
    """What the project's container asks for, in Kubernetes' quantities.

    Attributes:
        requests: What must be free on the node, such as ``{"cpu": "2", "memory": "4Gi"}``.
        limits: What it may use at most.
    """

    model_config = ConfigDict(extra="forbid")

    requests: _Quantities = Field(default_factory=dict)
    limits: _Quantities = Field(default_factory=dict)


class Credentials(BaseModel):
    """What a Kubernetes cluster block holds: a way into the cluster.

    Attributes:
        kubeconfig: A kubeconfig as text or as a mapping.
        context: The context in it.
        host: The API server's URL, instead of a kubeconfig.
        token: A bearer token for ``host``.
        certificate_authority: The API server's certificate authority, PEM.
        verify_tls: Whether the API server's certificate is checked.
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
        kube_context: The context of the kubeconfig; by default its current one.
        kube_job_template_path: A YAML or JSON file that holds a ``batch/v1`` Job.
        repository_uri: Where images are pushed to, without a tag.
        kube_job_template: The Job itself, instead of a file.
        kubeconfig: The kubeconfig's path, its text or its mapping.
        in_cluster: Whether the pod's own service account is used; by default it is when there is no kubeconfig.
        credentials: The name of a Kubernetes cluster block, or what it holds.
        namespace: The Job's namespace.
        image_pull_secrets: Secrets of that namespace with which the nodes pull images.
        code_delivery: How the project's code gets to the pod; by default what fits.
        git_image: The image that clones the repository; it must hold ``git`` and ``sh``.
        ttl_seconds_after_finished: Seconds after which Kubernetes removes the finished Job.
        backoff_limit: How often Kubernetes starts a failed pod anew.
        timeout: Seconds that the Job may take, from its start; Kubernetes itself ends it then.
        resources: What the project's container asks for.
        service_account: The pod's service account.
        tracking_uri: The tracking URI that the pod uses; by default ``KUBE_MLFLOW_TRACKING_URI``, else the run's own.
        allow_host_paths: Whether ``docker_env``'s volumes become hostPath volumes.
        start_grace: Seconds for which a pod may fail to start (image, configuration) before the run fails.
        scheduling_grace: Seconds for which a pod may wait for a node that fits.
        termination_grace: Seconds between asking a pod to end and killing it.
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
        """What a cluster block holds, once the block's name was resolved; empty without one."""
        return self.credentials if isinstance(self.credentials, Credentials) else Credentials()


KubernetesRequest: TypeAlias = BackendRequest[KubernetesConfig]


def parse_kubernetes_config(config: Mapping[str, Any]) -> KubernetesConfig:
    """Returns the configuration as a value.

    Args:
        config: What the user wrote.

    Raises:
        BackendError: A key is unknown (the nearest is named), a value is not of its kind, or two keys contradict each
            other.
    """
    parsed = parse_config(KubernetesConfig, config, backend=BACKEND)
    if parsed.kube_job_template is not None and parsed.kube_job_template_path is not None:
        raise BackendError(
            "The configuration of the kubernetes backend holds both 'kube-job-template' and 'kube-job-template-path'; "
            "keep one.",
            backend=BACKEND,
        )
    ways = [name for name, given in _connections(parsed).items() if given]
    if len(ways) > 1:
        raise BackendError(
            f"The configuration of the kubernetes backend names several ways to the cluster: {', '.join(ways)}; keep one.",
            backend=BACKEND,
        )
    return parsed


def _connections(config: KubernetesConfig) -> dict[str, bool]:
    return {
        "kubeconfig": config.kubeconfig is not None,
        "in-cluster": bool(config.in_cluster),
        "credentials": config.credentials is not None,
    }


def load_template(config: KubernetesConfig, directory: Path) -> dict[str, Any] | None:
    """Returns the user's Job, or None when there is none.

    Args:
        config: The configuration.
        directory: The project's folder: where a relative path is looked for when the working directory has no such file.

    Raises:
        BackendError: The file can't be read, or holds something else than one Job.
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
        raise BackendError(
            f"The job template {path} ('kube-job-template-path') can't be read: {error.strerror or error}.",
            backend=BACKEND,
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise BackendError(f"{path}{line}: the job template is not valid YAML: {reason}.", backend=BACKEND) from None
    if len(documents) != 1:
        raise BackendError(
            f"The job template {path} must hold one Job, not {len(documents)} documents.", backend=BACKEND
        )
    return _checked(documents[0], f"The job template {path}")


def _checked(template: Any, what: str) -> dict[str, Any]:
    if not isinstance(template, dict):
        raise BackendError(f"{what} must be a mapping, not {type(template).__name__}.", backend=BACKEND)
    kind, version = template.get("kind", "Job"), template.get("apiVersion", "batch/v1")
    if (kind, version) != ("Job", "batch/v1"):
        raise BackendError(f"{what} must be a Job of batch/v1, not a {kind} of {version}.", backend=BACKEND)
    for path in (("metadata",), ("spec",), ("spec", "template"), ("spec", "template", "spec")):
        place: Any = template
        for key in path:
            place = place.get(key) if isinstance(place, dict) else None
        if place is not None and not isinstance(place, dict):
            raise BackendError(f"{what}: {'.'.join(path)} must be a mapping.", backend=BACKEND)
    containers = (((template.get("spec") or {}).get("template") or {}).get("spec") or {}).get("containers") or []
    if not isinstance(containers, list) or not all(isinstance(each, dict) for each in containers):
        raise BackendError(f"{what}: spec.template.spec.containers must be a list of mappings.", backend=BACKEND)
    return template
