"""The image of a project on its way to the cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefect_mlprojects.backends.base import BackendCall
from prefect_mlprojects.backends.kubernetes.config import BACKEND, KubernetesConfig
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal


@dataclass(frozen=True)
class PushedImage:
    reference: str
    digest: str
    reused: bool


def image_name(call: BackendCall, config: KubernetesConfig) -> str:
    raise BackendError("not built", backend=BACKEND)


def push_project_image(
    call: BackendCall, config: KubernetesConfig, report: Callable[[str], None], stop: StopSignal
) -> PushedImage:
    raise BackendError("not built", backend=BACKEND)
