"""The project as a content-addressed archive, and its upload."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from prefect_mlprojects.backends.containers.archive import project_files, write_archive
from prefect_mlprojects.backends.databricks.config import NAME, DatabricksRequest
from prefect_mlprojects.backends.databricks.environment import DriverEnvironment
from prefect_mlprojects.backends.databricks.storage import Storage
from prefect_mlprojects.backends.databricks.task import Code
from prefect_mlprojects.exceptions import BackendError

CODE_FOLDER = "code"
OUTPUT_FOLDER = "output"
# https://docs.databricks.com/files/workspace.html, "File size limit".
_LARGEST_WORKSPACE_FILE = 500 << 20


@dataclass(frozen=True)
class Upload:
    """A project in the workspace.

    Attributes:
        root: The code path.
        user: The user that the workspace knows the credentials as.
        sha256: The archive's digest; empty if Databricks checks the code out.
        size: The archive's size in bytes.
    """

    root: str
    user: str
    sha256: str = ""
    size: int = 0


@dataclass(frozen=True)
class Archive:
    """A project packed up.

    Attributes:
        content: The bytes of the gzipped tar archive.
        sha256: Their SHA-256.
        count: How many files and folders it holds.
    """

    content: bytes
    sha256: str
    count: int


def pack(request: DatabricksRequest, environment: DriverEnvironment | None) -> Archive:
    """Packs a project up; the same files give the same bytes.

    Raises:
        BackendError: A file can't be read.
    """
    extra = {} if environment is None else dict(environment.files)
    target = io.BytesIO()
    files = project_files(request.working_copy.directory, backend=NAME)
    write_archive(target, files, prefix="project", extra=extra, compressed=True, backend=NAME)
    content = target.getvalue()
    return Archive(content, hashlib.sha256(content).hexdigest(), len(files))


def code_of(root: str, sha256: str, token: str | None = None) -> Code:
    """Returns where a project's code is.

    Args:
        root: The code path.
        sha256: The SHA-256 of the archive.
        token: The idempotency token of a run whose output is written there; None for none.
    """
    version = hashlib.sha256(bootstrap()).hexdigest()[:16]
    return Code(
        archive=f"{root}/{CODE_FOLDER}/{sha256}.tar.gz",
        sha256=sha256,
        bootstrap=f"{root}/{CODE_FOLDER}/bootstrap-{version}.py",
        output=f"{root}/{OUTPUT_FOLDER}/{token}" if token else None,
    )


@cache
def bootstrap() -> bytes:
    """Returns the script that runs on the driver."""
    return (Path(__file__).parent / "bootstrap.py").read_bytes()


def upload(
    storage: Storage,
    code: Code,
    archive: Archive,
    ask: Callable[[Callable[[], Any]], Any],
    report: Callable[[str], None],
) -> bool:
    """Uploads the archive and the bootstrap, unless they are there.

    Returns:
        Whether both were there.

    Raises:
        BackendError: It failed.
    """
    reused = True
    for path, content in ((code.bootstrap, bootstrap()), (code.archive, archive.content)):
        if not ask(partial(storage.holds, path, len(content))):
            report(f"Uploading {len(content)} bytes to {path}")
            ask(partial(storage.write, path, content))
            reused = False
    return reused


def check_size(root: str, size: int) -> None:
    """Makes sure that an archive fits where it is to go.

    Args:
        root: The code path.
        size: The archive's bytes.

    Raises:
        BackendError: It does not.
    """
    if root.startswith("/Workspace/") and size > _LARGEST_WORKSPACE_FILE:
        raise BackendError(
            f"The project packed up has {size >> 20} MB; workspace files have {_LARGEST_WORKSPACE_FILE >> 20} MB at most. Name "
            "data that is not code in its .dockerignore, or choose a volume as code-path (/Volumes/CATALOG/SCHEMA/VOLUME).",
            backend=NAME,
        )


def check_unchanged(archive: Archive, sha256: str) -> None:
    """Makes sure that a project is what it was when its run was prepared.

    Raises:
        BackendError: It has changed.
    """
    if archive.sha256 != sha256:
        raise BackendError(
            "The project's uploaded code is gone from the workspace, and its files here have changed since. Run it again.",
            backend=NAME,
        )
