"""The variables and links of a pod: tracking server, credentials, pages."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import reveal, reveal_all
from prefect_mlprojects.backends.contract import RunIdentity
from prefect_mlprojects.backends.kubernetes.config import BACKEND, KubernetesConfig, KubernetesRequest
from prefect_mlprojects.backends.kubernetes.names import FLOW_RUN_URL_ANNOTATION, MLFLOW_RUN_URL_ANNOTATION
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.tracking.uris import (
    EXPERIMENT_ID_VARIABLE,
    TRACKING_URI_VARIABLE,
    is_on_this_machine,
    run_page,
)

KUBE_TRACKING_URI_VARIABLE = "KUBE_MLFLOW_TRACKING_URI"
"""MLflow's name for the tracking URI that pods use."""

_TRACKING_LOGIN = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_WORKSPACE",
)
"""With what a process on this machine would sign in to the tracking server; a pod has to be given it."""

_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_MAX_SECRET_BYTES = 900_000


def pod_tracking_uri(config: KubernetesConfig) -> str | None:
    """Returns the tracking URI that was set for pods; None when they use the run's own."""
    return reveal_all(config.tracking_uri) or os.environ.get(KUBE_TRACKING_URI_VARIABLE) or None


def check_tracking(request: KubernetesRequest) -> None:
    """Checks that a pod can reach the tracking store.

    Raises:
        BackendError: The store is of this machine alone.
    """
    uri = reveal(request.tracking_uri)
    if pod_tracking_uri(request.config) is None and uri and is_on_this_machine(uri):
        raise BackendError(
            f"The tracking URI {redact(uri)} is of this machine alone: a pod can't reach it. Track with a "
            f"server (MLFLOW_TRACKING_URI), or say how pods reach it: 'tracking-uri' in the backend configuration, or the "
            f"variable {KUBE_TRACKING_URI_VARIABLE}.",
            backend=BACKEND,
        )


def pod_variables(
    request: KubernetesRequest, variables: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, str]:
    """Returns the environment that the project's container gets; the values may be secret.

    Raises:
        BackendError: A name can't be that of a variable, or all together are too large for a Secret.
    """
    merged = {name: os.environ[name] for name in _TRACKING_LOGIN if os.environ.get(name)}
    environment = request.project.environment
    if isinstance(environment, DockerEnvironment):
        for name, value in environment.environment:
            if value is None and name not in os.environ:
                report(f"Warning: docker_env copies the variable {name} from this machine, which does not have it.")
                continue
            merged[name] = os.environ[name] if value is None else value
    merged |= variables
    # The pod would look for a Prefect server in itself.
    if is_on_this_machine(merged.get("PREFECT_API_URL", "http://elsewhere")):
        del merged["PREFECT_API_URL"]
    override = pod_tracking_uri(request.config)
    if override is not None:
        merged[TRACKING_URI_VARIABLE] = override
    for name in merged:
        if not _VARIABLE_NAME.fullmatch(name):
            raise BackendError(f"{name!r} can't be the name of a variable of a pod.", backend=BACKEND)
    if sum(len(name) + len(value.encode("utf-8", "replace")) for name, value in merged.items()) > _MAX_SECRET_BYTES:
        raise BackendError("The variables for the pod are larger than a Secret may be (1 MB).", backend=BACKEND)
    return merged


def link_annotations(identity: RunIdentity, request: KubernetesRequest, variables: Mapping[str, str]) -> dict[str, str]:
    """Returns annotations with the pages of the flow run and the MLflow run, as far as they are known."""
    links: dict[str, str] = {}
    api = variables.get("PREFECT_API_URL", "").rstrip("/")
    # Prefect Cloud serves its pages elsewhere than its API.
    if api.endswith("/api"):
        links[FLOW_RUN_URL_ANNOTATION] = f"{redact(api.removesuffix('/api'))}/runs/flow-run/{identity.flow_run_id}"
    page, _ = run_page(reveal(request.tracking_uri), variables.get(EXPERIMENT_ID_VARIABLE, ""), identity.mlflow_run_id)
    if page:
        links[MLFLOW_RUN_URL_ANNOTATION] = page
    return links
