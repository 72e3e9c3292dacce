"""Builds a project's image and pushes it to where the cluster's nodes pull from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefect_mlprojects._support.secrets import reveal_all
from prefect_mlprojects.backends.containers.config import LocalConfig
from prefect_mlprojects.backends.containers.engine import connect
from prefect_mlprojects.backends.containers.image import build_project_image, ensure_image, push_image
from prefect_mlprojects.backends.kubernetes.config import BACKEND, KubernetesRequest
from prefect_mlprojects.backends.kubernetes.job import no_image
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal

_ENGINE_SECONDS = 600


@dataclass(frozen=True)
class PushedImage:
    """An image in a registry.

    Attributes:
        reference: Its name, pinned by digest.
        digest: The digest.
        reused: Whether it was built earlier.
    """

    reference: str
    digest: str
    reused: bool


def base_image(request: KubernetesRequest) -> str:
    """Returns the image that a project's own image is built on.

    Raises:
        BackendError: The request names none.
    """
    if not request.image:
        raise no_image()
    return request.image


def push_project_image(request: KubernetesRequest, report: Callable[[str], None], stop: StopSignal) -> PushedImage:
    """Builds the project's image on the Docker engine, unless its files have not changed, and pushes it.

    Raises:
        BackendError: There is no engine, or it could not build or push the image.
    """
    base, login = base_image(request), reveal_all(request.docker_auth) if request.docker_auth else None
    engine = _engine()
    try:
        base_id, _ = ensure_image(engine, base, pull="missing", auth=login, backend=BACKEND, report=report, stop=stop)
        built = build_project_image(
            engine,
            base,
            base_id,
            request.working_copy,
            request.config.repository_uri,
            backend=BACKEND,
            report=report,
            stop=stop,
        )
        reference = push_image(engine, built.name, auth=login, backend=BACKEND, report=report, stop=stop)
    finally:
        engine.close()
    return PushedImage(reference, reference.rpartition("@")[2], built.reused)


def _engine() -> Any:
    try:
        return connect(LocalConfig(), backend=BACKEND, timeout=_ENGINE_SECONDS)
    except BackendError as error:
        raise BackendError(
            f"'code-delivery: image' needs a Docker engine to build with. {error.message} 'code-delivery: archive' and 'git' "
            "need none.",
            backend=BACKEND,
        ) from None
