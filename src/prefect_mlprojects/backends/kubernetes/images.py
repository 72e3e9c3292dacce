"""Builds a project's image and pushes it to where the cluster's nodes pull from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefect_mlprojects._redaction import mask_text
from prefect_mlprojects.backends.base import BackendCall
from prefect_mlprojects.backends.kubernetes.config import BACKEND, KubernetesConfig
from prefect_mlprojects.backends.kubernetes.job import CODE_DIRECTORY, no_image
from prefect_mlprojects.backends.project_archive import content_digest, iterate_archive, project_files
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.types import StopSignal

_DOCKERFILE = "Dockerfile.mlprojects"
_ENGINE_SECONDS = 600


@dataclass(frozen=True)
class PushedImage:
    """An image in a registry.

    Attributes:
        reference: Its name, pinned by digest.
        digest: The digest.
        reused: Whether it was there already.
    """

    reference: str
    digest: str
    reused: bool


def _base_image(call: BackendCall) -> str:
    image = (call.docker_args or {}).get("image")
    if not image and isinstance(call.project.environment, DockerEnvironment):
        image = call.project.environment.image
    if not image:
        raise no_image()
    return str(image)


def _dockerfile(call: BackendCall) -> bytes:
    return f"FROM {_base_image(call)}\nCOPY . {CODE_DIRECTORY}/\nWORKDIR {CODE_DIRECTORY}\n".encode()


def image_name(call: BackendCall, config: KubernetesConfig) -> str:
    """Returns the name of a project's image: its tag follows from the project's files and its base image's name.

    Raises:
        BackendError: No base image is named, or a file can't be read.
    """
    digest = content_digest(project_files(call.working_copy.directory), {_DOCKERFILE: _dockerfile(call)})
    return f"{config.repository_uri}:{digest[:16]}"


def push_project_image(
    call: BackendCall, config: KubernetesConfig, report: Callable[[str], None], stop: StopSignal
) -> PushedImage:
    """Builds the project's image on the Docker engine and pushes it, unless the registry holds it.

    Raises:
        BackendError: There is no engine, or it could not build or push the image.
    """
    import docker
    from docker.errors import APIError, DockerException

    name = image_name(call, config)
    assert config.repository_uri is not None
    try:
        client = docker.from_env(timeout=_ENGINE_SECONDS)
        login = dict(call.docker_auth) if call.docker_auth else None
        try:
            found = client.images.get_registry_data(name, auth_config=login)
            return PushedImage(f"{config.repository_uri}@{found.id}", str(found.id), True)
        except APIError:
            report(f"Building image {name}.")
        files = project_files(call.working_copy.directory)
        context = b"".join(iterate_archive(files, extra={_DOCKERFILE: _dockerfile(call)}))
        options = {"custom_context": True, "dockerfile": _DOCKERFILE, "tag": name, "decode": True, "rm": True}
        _last(client.api.build(fileobj=_reader(context), **options), "built", report, stop)
        report(f"Pushing image {name}.")
        aux = _last(client.images.push(name, stream=True, decode=True, auth_config=login), "pushed", report, stop)
    except DockerException as error:
        raise BackendError(
            f"The image {name} for 'code-delivery: image' could not be made: {mask_text(str(error))}. A Docker engine has to be "
            "reachable (DOCKER_HOST); 'code-delivery: archive' and 'git' need none.",
            backend=BACKEND,
        ) from None
    digest = str(aux.get("Digest") or client.images.get_registry_data(name, auth_config=login).id)
    return PushedImage(f"{config.repository_uri}@{digest}", digest, False)


def _reader(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


def _last(
    messages: Iterable[Mapping[str, Any]], done: str, report: Callable[[str], None], stop: StopSignal
) -> Mapping[str, Any]:
    """Reads what the engine tells to its end; returns the facts it gave last."""
    aux: Mapping[str, Any] = {}
    for message in messages:
        if stop.requested:
            raise BackendError(f"The image was not {done}: {stop.reason}.", backend=BACKEND)
        if message.get("error"):
            raise BackendError(f"The image could not be {done}: {mask_text(str(message['error']))}", backend=BACKEND)
        if text := str(message.get("stream") or "").strip():
            report(text)
        aux = message.get("aux") or aux
    return aux
