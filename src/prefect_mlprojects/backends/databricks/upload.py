"""Packs a project into a content-addressed archive, uploads it, and removes old uploads."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_mlprojects.backends.containers.archive import project_files, write_archive
from prefect_mlprojects.backends.databricks.config import NAME, DatabricksConfig, DatabricksRequest
from prefect_mlprojects.backends.databricks.connection import connect, insist
from prefect_mlprojects.backends.databricks.storage import FOLDER, RECORDS_FOLDER, Storage, read_record, storage_for
from prefect_mlprojects.backends.databricks.task import Code, DriverEnvironment
from prefect_mlprojects.exceptions import BackendError

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient


CODE_FOLDER = "code"
OUTPUT_FOLDER = "output"
# https://docs.databricks.com/files/workspace.html, "File size limit".
_LARGEST_WORKSPACE_FILE = 500 << 20


@dataclass(frozen=True)
class Upload:
    """A project in the workspace.

    Attributes:
        root: The code path.
        user: The workspace's user name of the credentials.
        sha256: The archive's digest; empty if Databricks checks the code out.
        size: The archive's size in bytes.
    """

    root: str
    user: str
    sha256: str = ""
    size: int = 0


@dataclass(frozen=True)
class Archive:
    """A packed project.

    Attributes:
        content: The bytes of the gzipped tar archive.
        sha256: Their SHA-256.
        count: The number of its files and folders.
    """

    content: bytes
    sha256: str
    count: int


def pack(request: DatabricksRequest, environment: DriverEnvironment | None) -> Archive:
    """Packs a project; equal files give equal bytes.

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
    """Returns the paths of a project's code, and of the live output of the run with that idempotency token."""
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
    """Uploads the archive and the bootstrap unless they exist; returns whether both existed.

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
    """Checks the archive's size in bytes against the limit of workspace files.

    Raises:
        BackendError: It is too large.
    """
    if root.startswith("/Workspace/") and size > _LARGEST_WORKSPACE_FILE:
        raise BackendError(
            f"The packed project has {size >> 20} MB; workspace files are limited to {_LARGEST_WORKSPACE_FILE >> 20} MB. Exclude "
            "data in its .dockerignore, or set code-path to a volume (/Volumes/CATALOG/SCHEMA/VOLUME).",
            backend=NAME,
        )


def check_unchanged(archive: Archive, sha256: str) -> None:
    """Checks that a project is unchanged since its run was prepared.

    Raises:
        BackendError: It has changed.
    """
    if archive.sha256 != sha256:
        raise BackendError(
            "The project's uploaded code was removed from the workspace, and its local files have changed since. Run it again.",
            backend=NAME,
        )


_SECONDS_A_DAY = 86_400
_SUBMITTING = 900.0  # Seconds that a run may take from its record to its submission, network retries included.
_LONGEST_RUN = 60 * _SECONDS_A_DAY  # The state of another user's run is not visible; older ones count as ended.


def clean_workspace(config: DatabricksConfig, *, days: float, dry_run: bool) -> list[str]:
    """Removes archives, output and records older than `days`, except those that a run still needs.

    Runs are found by their records, whoever submitted them, and by the active runs visible to this user. Returns the removed
    paths; with `dry_run` nothing is removed.

    Raises:
        BackendError: The workspace refused it.
    """
    client = connect(config, "")
    what = "The workspace can't be cleaned"
    root, paths = insist(partial(_old_paths, client, config, days), config.network_timeout, None, what)
    storage = storage_for(client, root)
    for path in () if dry_run else paths:
        insist(partial(storage.remove, path), config.network_timeout, None, what)
    return paths


def _old_paths(client: WorkspaceClient, config: DatabricksConfig, days: float) -> tuple[str, list[str]]:
    user = str(client.current_user.me().user_name)
    root = config.code_path or f"/Workspace/Users/{user}/{FOLDER}"
    storage = storage_for(client, root)
    now = time.time()
    # A run writes its record before it checks for its code: a file listed here and in no record read later is not needed.
    candidates = [
        (folder, name)
        for folder in (CODE_FOLDER, OUTPUT_FOLDER, RECORDS_FOLDER)
        for name, changed in storage.names(f"{root}/{folder}")
        if changed <= now - days * _SECONDS_A_DAY
    ]
    if not candidates:
        return root, []
    active = _active_texts(client)
    needed = set(_needed(storage, root, user, active, now, max(_SUBMITTING, config.network_timeout)))
    return root, [
        f"{root}/{folder}/{name}"
        for folder, name in candidates
        if f"{folder}/{name}" not in needed and not any(name.removesuffix(".json") in text for text in active)
    ]


def _active_texts(client: WorkspaceClient) -> list[str]:
    """Returns the arguments of active runs, which name their archive and their output."""
    runs = client.jobs.list_runs(active_only=True, expand_tasks=True)
    texts = []
    for run in runs:
        for task in run.tasks or ():
            python = task.spark_python_task
            if python is not None:
                texts.append("\n".join([python.python_file, *(python.parameters or ())]))
    return texts


def _needed(storage: Storage, root: str, user: str, active: list[str], now: float, submitting: float) -> Iterator[str]:
    """Yields the files that possibly active runs need, their records and output included."""
    for name, changed in storage.names(f"{root}/{RECORDS_FOLDER}"):
        record = read_record(storage, f"{root}/{RECORDS_FOLDER}/{name}")
        token = name.removesuffix(".json")
        if record is None or record.reported:
            continue
        mine = record.user == user
        # This user's submitted runs are all in `active`; other users' runs are known by their records only.
        if any(token in text for text in active) or now - changed < (submitting if mine else _LONGEST_RUN):
            yield f"{RECORDS_FOLDER}/{name}"
            yield f"{OUTPUT_FOLDER}/{token}"
            yield from (f"{CODE_FOLDER}/{file}" for file in record.files)
