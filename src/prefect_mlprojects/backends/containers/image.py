"""Pulls, builds and pushes images, for the backends that run containers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from prefect_mlprojects._support.progress import report_progress
from prefect_mlprojects.backends.containers.archive import content_digest, iterate_archive, project_files
from prefect_mlprojects.exceptions import BackendUnavailableError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.types import StopSignal

CODE_FOLDER = "/mlflow/projects/code"
"""A project's folder in an image, as in MLflow (``MLFLOW_DOCKER_WORKDIR_PATH``)."""

CONTENT_LABEL = "prefect-mlprojects.content"
"""The label that holds the content digest of the files that an image was built with."""

_BUILD_STEP = re.compile(r"Step (\d+)/(\d+) : ")
_DOCKERFILE = "Dockerfile.prefect-mlprojects"


@dataclass(frozen=True)
class BuiltImage:
    """An image with a project's files; `name` includes the tag, and `reused` is True if it existed already."""

    name: str
    image_id: str
    reused: bool


@dataclass(frozen=True)
class EngineImages:
    """Pulls, builds and pushes images on an engine; each method raises `BackendError` if that fails or is stopped.

    `auth` is the ``auth_config`` of Docker's SDK.
    """

    engine: Any
    backend: str
    report: Callable[[str], None]
    stop: StopSignal

    def ensure(self, image: str, pull: str, auth: Mapping[str, str] | None) -> tuple[str, bool]:
        """Pulls an image if necessary, and returns its ID and whether it existed already.

        `pull` is ``missing``, ``always`` or ``never``; a name without a tag or digest means ``latest``.
        """
        from docker.errors import ImageNotFound

        if pull != "always":
            try:
                return str(self.engine.inspect_image(image)["Id"]), True
            except ImageNotFound:
                if pull == "never":
                    why = "is not on the Docker engine, and pull is 'never' in the backend configuration."
                    raise BackendUnavailableError(f"The image {image!r} {why}", backend=self.backend) from None
        repository, tag = _split(image)
        self.report(f"pulling the image {image}")
        advice = (
            "Check its name, and give credentials if needed (docker_auth, or credentials in the backend configuration)."
        )
        start = partial(self.engine.pull, repository, tag=tag, stream=True, decode=True, auth_config=auth)
        self._follow(start, f"pulling {image}", f"The image {image!r} can't be pulled", advice)
        return str(self.engine.inspect_image(image)["Id"]), False

    def build(
        self, base: str, base_id: str, copy: WorkingCopy, repository: str | None, mounted: Collection[str] = ()
    ) -> BuiltImage:
        """Builds an image from the base image and the project's files; reuses one if neither has changed.

        The files are streamed to the engine; nothing is copied on this machine. The tag is the commit's first seven digits, as
        in MLflow, or those of the content digest if the working copy is dirty or has no commit.
        """
        extra = {_DOCKERFILE: f"FROM {base}\nCOPY . {CODE_FOLDER}/\nWORKDIR {CODE_FOLDER}\n".encode()}
        files = project_files(copy, backend=self.backend, mounted=mounted)
        digest = content_digest(files, {**extra, "base": base_id.encode()}, backend=self.backend)
        name = f"{_repository(repository)}:{digest[:7] if copy.commit is None or copy.dirty else copy.commit[:7]}"
        for image in self.engine.images(filters={"label": f"{CONTENT_LABEL}={digest}"}):
            self.engine.tag(image["Id"], *_split(name))
            return BuiltImage(name, str(image["Id"]), reused=True)
        self.report(f"building the image {name} from {base} with {sum(not each.path.is_dir() for each in files)} files")
        # requests sends an iterator in pieces.
        archive = iterate_archive(files, extra=extra, backend=self.backend)
        start = partial(
            self.engine.build,
            **{"fileobj": archive, "custom_context": True, "dockerfile": _DOCKERFILE, "tag": name, "decode": True},
            **{"labels": {CONTENT_LABEL: digest}, "rm": True, "forcerm": True},
        )
        self._follow(start, f"building {name}", f"The image {name} can't be built")
        return BuiltImage(name, str(self.engine.inspect_image(name)["Id"]), reused=False)

    def push(self, name: str, auth: Mapping[str, str] | None) -> str:
        """Pushes an image to its registry and returns it pinned: ``repository@sha256:…``."""
        repository, tag = _split(name)
        self.report(f"pushing the image {name}")
        start = partial(self.engine.push, repository, tag=tag, stream=True, decode=True, auth_config=auth)
        digest = self._follow(start, f"pushing {name}", f"The image {name} can't be pushed")
        if not digest:
            message = f"The image {name} was pushed, but its registry returned no digest."
            raise BackendUnavailableError(message, backend=self.backend)
        return f"{repository}@{digest}"

    def _follow(
        self, start: Callable[[], Iterator[Mapping[str, Any]]], doing: str, subject: str, advice: str = ""
    ) -> str:
        """Follows the engine's events, and returns the last digest; reports a layer only when its status changes."""
        step, digest, statuses, layers = "", "", dict[str, str](), _Layers(doing)
        for event in _until_stopped(start, self.stop):
            failure = (
                event if isinstance(event, OSError) else event.get("error") if isinstance(event, Mapping) else None
            )
            if failure:
                where = f" in the step {step!r}" if step else ""
                message = str(getattr(failure, "explanation", None) or failure).strip().rstrip(".")
                raise BackendUnavailableError(f"{subject}{where}: {message}. {advice}".strip(), backend=self.backend)
            if isinstance(event, BaseException):
                raise event
            if isinstance(event.get("aux"), Mapping):
                digest = str(event["aux"].get("Digest") or digest)
            for line in filter(str.strip, str(event.get("stream") or "").splitlines()):
                if of := _BUILD_STEP.match(line):
                    step = line.strip()
                    report_progress(doing, int(of[1]) - 1, int(of[2]))
                self.report(line.rstrip())
            layers.take(event)
            status, layer = event.get("status"), str(event.get("id") or "")
            if status and not event.get("progressDetail") and statuses.get(layer) != status:
                statuses[layer] = str(status)
                self.report(f"{layer}: {status}" if layer else str(status))
        if self.stop.requested:
            raise BackendUnavailableError(f"{subject}: it was stopped: {self.stop.reason}.", backend=self.backend)
        report_progress(doing, 1, 1)
        return digest


class _Layers:
    """Sums up the progress of an image's layers."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._layers: dict[str, tuple[int, int]] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """Adds a layer's event: bytes transferred and total bytes."""
        detail = event.get("progressDetail") or {}
        # Extraction was counted as download already.
        if event.get("status") in ("Downloading", "Pushing") and detail.get("total"):
            self._layers[str(event.get("id"))] = (int(detail.get("current") or 0), int(detail["total"]))
            report_progress(self._doing, *map(sum, zip(*self._layers.values(), strict=True)))


def _until_stopped(
    start: Callable[[], Iterator[Mapping[str, Any]]], stop: StopSignal
) -> Iterator[Mapping[str, Any] | BaseException]:
    """Yields the events of a pull, build or push, or the exception that ended it; returns on a stop request.

    An engine that waits for its registry may be silent for long. The listening thread then ends with the engine's answer.
    """
    events: SimpleQueue[Mapping[str, Any] | BaseException | None] = SimpleQueue()

    def listen() -> None:
        try:
            for event in start():
                events.put(event)
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            events.put(error)
        events.put(None)

    forget = stop.on_request(lambda: events.put(None))
    threading.Thread(target=listen, name="docker-engine", daemon=True).start()
    try:
        while (event := events.get()) is not None:
            if stop.requested:
                break
            yield event
    finally:
        forget()


def _repository(name: str | None) -> str:
    # MLflow's default, and Docker's rule for names (https://docs.docker.com/reference/cli/docker/image/tag/).
    text = re.sub(r"[^a-z0-9._/:-]+", "-", (name or "docker-project").lower()).strip("-._/")
    return text or "docker-project"


def _split(image: str) -> tuple[str, str]:
    """Splits an image's name from its tag or digest."""
    if "@" in image:
        repository, _, digest = image.partition("@")
        return repository, digest
    repository, colon, tag = image.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (image, "latest")
