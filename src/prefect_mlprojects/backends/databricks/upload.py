"""The project as a content-addressed archive, and its upload."""

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
from prefect_mlprojects.backends.databricks.storage import FOLDER, NOTES_FOLDER, Storage, read_note, storage_for
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


_SECONDS_A_DAY = 86_400
_SUBMITTING = 900.0  # Seconds that a run may take from its note to its submission: network trouble is waited out.
_LONGEST_RUN = 60 * _SECONDS_A_DAY  # Whether another user's run has ended can't be asked; after that it has.


def clean_workspace(config: DatabricksConfig, *, days: float, dry_run: bool) -> list[str]:
    """Removes archives, output and notes that have not been changed for some days, except what a run still needs.

    That is told by the notes of runs, whoever submitted them, and by the active runs that this user may see.

    Args:
        config: Names credentials and ``code_path``.
        days: How old they must be.
        dry_run: Whether to remove nothing.

    Returns:
        The paths that went, or would go.

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
    # A run notes its code before it looks whether that is there: what is listed first and not noted afterwards is not needed.
    candidates = [
        (folder, name)
        for folder in (CODE_FOLDER, OUTPUT_FOLDER, NOTES_FOLDER)
        for name, changed in storage.names(f"{root}/{folder}")
        if changed <= now - days * _SECONDS_A_DAY
    ]
    if not candidates:
        return root, []
    active = _active_texts(client)
    needed = set(_noted(storage, root, user, active, now, max(_SUBMITTING, config.network_timeout)))
    return root, [
        f"{root}/{folder}/{name}"
        for folder, name in candidates
        if f"{folder}/{name}" not in needed and not any(name.removesuffix(".json") in text for text in active)
    ]


def _active_texts(client: WorkspaceClient) -> list[str]:
    """What the runs that have not ended were told of the code path: they name their archive and their output."""
    runs = client.jobs.list_runs(active_only=True, expand_tasks=True)
    texts = []
    for run in runs:
        for task in run.tasks or ():
            python = task.spark_python_task
            if python is not None:
                texts.append("\n".join([python.python_file, *(python.parameters or ())]))
    return texts


def _noted(storage: Storage, root: str, user: str, active: list[str], now: float, submitting: float) -> Iterator[str]:
    """What the notes of runs that may not have ended ask for, the notes themselves and their output included."""
    for name, changed in storage.names(f"{root}/{NOTES_FOLDER}"):
        note = read_note(storage, f"{root}/{NOTES_FOLDER}/{name}")
        token = name.removesuffix(".json")
        if note is None or note.told:
            continue
        mine = note.user == user
        # One's own runs are all among the active ones, once they are submitted; of others, only the note tells.
        if any(token in text for text in active) or now - changed < (submitting if mine else _LONGEST_RUN):
            yield f"{NOTES_FOLDER}/{name}"
            yield f"{OUTPUT_FOLDER}/{token}"
            yield from (f"{CODE_FOLDER}/{file}" for file in note.files)
