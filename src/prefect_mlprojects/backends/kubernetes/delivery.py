"""How a project's code gets to its pod: which way fits is decided here, by facts alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prefect_mlprojects.backends.containers.archive import iterate_archive, project_files
from prefect_mlprojects.backends.kubernetes.checkout import git_checkout
from prefect_mlprojects.backends.kubernetes.config import BACKEND, DeliveryName, KubernetesRequest
from prefect_mlprojects.exceptions import BackendError

ARCHIVE_LIMIT = 900_000
"""The largest archive in bytes: the API server takes ConfigMaps of up to 1 MiB."""

WAYS = (
    "Ways for the code to get to the pod: 'code-delivery: image' with 'repository-uri' (an image is built and pushed), "
    "'archive' (needs no registry, up to 900 kB), 'git' (the pod clones the commit), or 'none' (the image holds the project)."
)


@dataclass(frozen=True)
class Choice:
    """A way, and why it was chosen.

    Attributes:
        delivery: The way.
        reason: Why, for people to read.
    """

    delivery: DeliveryName
    reason: str


def choose_delivery(
    requested: DeliveryName | None, *, repository_uri: str | None, build_image: bool, archive_size: int | None
) -> Choice:
    """Chooses how the code gets to the pod.

    Args:
        requested: ``code-delivery`` of the configuration.
        repository_uri: Where images may be pushed to.
        build_image: Whether the caller asked for an image to be built.
        archive_size: The size of the project's archive in bytes; None when it is larger than ``ARCHIVE_LIMIT``.

    Raises:
        BackendError: No way fits, or what was asked for contradicts itself; the message lists the ways.
    """
    if build_image and requested not in (None, "image"):
        raise _error(f"build_image=True contradicts 'code-delivery: {requested}'. {WAYS}")
    if (build_image or requested == "image") and not repository_uri:
        asked = "build_image=True" if build_image else "'code-delivery: image'"
        raise _error(f"{asked} needs 'repository-uri': a registry that the cluster's nodes can pull from. {WAYS}")
    if requested == "archive" and archive_size is None:
        raise _error(f"The project's archive is larger than {ARCHIVE_LIMIT // 1000} kB, compressed. {_trim()} {WAYS}")
    if requested is not None:
        return Choice(requested, "the configuration asks for it")
    if build_image:
        return Choice("image", "build_image=True")
    if repository_uri:
        return Choice("image", "'repository-uri' is set")
    if archive_size is None:
        raise _error(
            f"The project is too large for an archive of {ARCHIVE_LIMIT // 1000} kB, and no 'repository-uri' is set. "
            f"{_trim()} {WAYS}"
        )
    return Choice(
        "archive", f"it fits: {archive_size:,} bytes of at most {ARCHIVE_LIMIT:,}, and no 'repository-uri' is set"
    )


def _trim() -> str:
    return "Name what the pod does not need in the project's .dockerignore."


def _error(message: str) -> BackendError:
    return BackendError(message, backend=BACKEND)


def pack_project(directory: Path, limit: int = ARCHIVE_LIMIT) -> bytes | None:
    """Returns the project as a compressed archive, or None when it is larger than the limit.

    Args:
        directory: The project's folder.
        limit: The largest archive in bytes.

    Raises:
        BackendError: A file can't be read.
    """
    packed = io.BytesIO()
    files = project_files(directory, backend=BACKEND)
    for piece in iterate_archive(files, compressed=True, tar_format=tarfile.GNU_FORMAT, backend=BACKEND):
        packed.write(piece)
        if packed.tell() > limit:
            return None
    return packed.getvalue()


def find_delivery(request: KubernetesRequest) -> Choice:
    """Chooses how the code gets to the pod; reads the project's files, asks no network.

    Raises:
        BackendError: No way fits, or the project is not what a way needs.
    """
    config = request.config
    needs_size = config.code_delivery == "archive" or (
        config.code_delivery is None and not config.repository_uri and not request.build_image
    )
    archive = pack_project(request.working_copy.directory) if needs_size else None
    choice = choose_delivery(
        config.code_delivery,
        repository_uri=config.repository_uri,
        build_image=request.build_image,
        archive_size=None if archive is None else len(archive),
    )
    if choice.delivery == "git":
        git_checkout(request.working_copy, WAYS)
    return choice


def map_values(request: KubernetesRequest, delivery: DeliveryName, values: Mapping[str, str]) -> dict[str, str]:
    """Returns what the command calls files that its ``path`` parameters name: relative paths within the project.

    Raises:
        BackendError: A value is not in the project, or is left out of what is delivered.
    """
    directory = request.working_copy.directory
    delivered = (
        {file.name for file in project_files(directory, backend=BACKEND)} if delivery in ("archive", "image") else None
    )
    mapped: dict[str, str] = {}
    for name, value in values.items():
        advice = (
            "Declare the parameter as 'uri' and open it in the project's code, or mount a volume in the job template and pass "
            "its path as a 'string'."
        )
        if "://" in value or not value.startswith("/"):
            raise _error(f"The pod can't be given parameter {name!r}: {value} is not part of the project. {advice}")
        try:
            inside = Path(value).relative_to(directory).as_posix()
        except ValueError:
            raise _error(
                f"The pod can't be given parameter {name!r}: {value} is not inside the project {directory}. {advice}"
            ) from None
        if delivered is not None and inside != "." and inside not in delivered:
            raise _error(
                f"The pod can't be given parameter {name!r}: {value} is left out of what is delivered. Bring it back with "
                f"'!{inside}' in the project's .dockerignore."
            )
        mapped[name] = str(PurePosixPath(inside))
    return mapped
