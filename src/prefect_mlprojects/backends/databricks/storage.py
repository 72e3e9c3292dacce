"""A project's files in a workspace: storage kinds, the packed project, its upload, run records, and the clean-up."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from prefect_mlprojects.backends.containers.archive import iterate_archive, project_files
from prefect_mlprojects.backends.contract import Prepared, Report
from prefect_mlprojects.backends.databricks import NAME, failure
from prefect_mlprojects.backends.databricks.config import DatabricksConfig, DatabricksRequest, connect, insist

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.mixins.files import DbfsExt
    from databricks.sdk.mixins.workspace import WorkspaceExt
    from databricks.sdk.service.files import FilesAPI

_T = TypeVar("_T")

CODE_FOLDER, OUTPUT_FOLDER, RECORDS_FOLDER = "code", "output", "runs"
# https://docs.databricks.com/files/workspace.html, "File size limit".
_LARGEST_WORKSPACE_FILE = 500 << 20


@dataclass(frozen=True)
class Storage:
    """Stores files under absolute paths; a missing file is never an error. The fields are the requests of one of the APIs."""

    api_path: Callable[[str], str]
    size: Callable[[str], int | None]
    make_folder: Callable[[str], Any]
    send: Callable[[str, io.BytesIO], Any]
    receive: Callable[[str], bytes]
    entries: Callable[[str], Iterable[tuple[str | None, int | None]]]
    delete: Callable[[str], Any]

    def _unless_missing(self, call: Callable[[str], _T], path: str) -> _T | None:
        from databricks.sdk.errors import NotFound

        try:
            return call(self.api_path(path))
        except NotFound:
            return None

    def holds(self, path: str, size: int) -> bool:
        """Returns whether the file exists with that size in bytes, if the workspace reports sizes."""
        return bool(self._unless_missing(lambda own: self.size(own) in (None, size), path))

    def write(self, path: str, content: bytes) -> None:
        """Writes or replaces a file; creates its parent folders."""
        self.make_folder(self.api_path(path).rpartition("/")[0])
        self.send(self.api_path(path), io.BytesIO(content))

    def read(self, path: str) -> bytes | None:
        """Returns a file's content; None if it does not exist."""
        return self._unless_missing(self.receive, path)

    def names(self, path: str) -> list[tuple[str, float]]:
        """Returns a folder's entries sorted by name, each with its modification time in seconds since the epoch."""
        entries = self._unless_missing(lambda own: list(self.entries(own)), path) or ()
        return sorted((str(name).rpartition("/")[2], (changed or 0) / 1000) for name, changed in entries)

    def remove(self, path: str) -> None:
        """Removes a file, or a folder and its contents."""
        self._unless_missing(self.delete, path)


def storage_for(client: WorkspaceClient, root: str) -> Storage:
    """Returns the storage for a path below ``/Workspace``, ``/Volumes`` or ``dbfs:``."""
    if root.startswith("/Volumes/"):
        return _volume(client.files)
    return _dbfs(client.dbfs) if root.startswith("dbfs:") else _workspace_files(client.workspace)


def driver_path(path: str) -> str:
    """Converts a path to that of the driver's file system."""
    return f"/dbfs{_dbfs_path(path)}" if path.startswith("dbfs:") else path


def _dbfs_path(path: str) -> str:
    return "/" + path.removeprefix("dbfs:").lstrip("/")


def _workspace_files(api: WorkspaceExt) -> Storage:
    from databricks.sdk.service.workspace import ExportFormat, ImportFormat

    return Storage(
        api_path=lambda path: path.removeprefix("/Workspace"),
        size=lambda path: api.get_status(path).size,
        make_folder=api.mkdirs,
        # RAW: a .py file must not become a notebook.
        send=lambda path, content: api.upload(path, content, format=ImportFormat.RAW, overwrite=True),
        receive=lambda path: api.download(path, format=ExportFormat.AUTO).read(),
        entries=lambda path: ((each.path, each.modified_at or each.created_at) for each in api.list(path)),
        delete=lambda path: api.delete(path, recursive=True),
    )


def _volume(api: FilesAPI) -> Storage:
    return Storage(
        api_path=str,
        size=lambda path: api.get_metadata(path).content_length,
        make_folder=api.create_directory,
        send=lambda path, content: api.upload(path, content, overwrite=True),
        receive=lambda path: contents.read() if (contents := api.download(path).contents) else b"",
        entries=lambda path: ((each.name, each.last_modified) for each in api.list_directory_contents(path)),
        delete=partial(_delete_from_volume, api),
    )


def _delete_from_volume(api: FilesAPI, path: str) -> None:
    from databricks.sdk.errors import NotFound

    try:
        entries = list(api.list_directory_contents(path))
    except NotFound:
        api.delete(path)
        return
    for each in entries:
        _delete_from_volume(api, str(each.path)) if each.is_directory else api.delete(str(each.path))
    api.delete_directory(path)


def _dbfs(api: DbfsExt) -> Storage:
    def receive(path: str) -> bytes:
        with api.download(path) as file:
            return file.read()

    return Storage(
        api_path=_dbfs_path,
        size=lambda path: api.get_status(path).file_size,
        make_folder=api.mkdirs,
        send=lambda path, content: api.upload(path, content, overwrite=True),
        receive=receive,
        entries=lambda path: ((each.path, each.modification_time) for each in api.list(path)),
        delete=lambda path: api.delete(path, recursive=True),
    )


class RunRecord(BaseModel):
    """A run's record: who submitted it, the files below ``code`` that it needs, and whether its failure was reported."""

    user: str
    files: tuple[str, ...] = ()
    reported: bool = False


def read_record(storage: Storage, path: str) -> RunRecord | None:
    """Returns a record; None if it is missing or invalid."""
    try:
        return RunRecord.model_validate_json(storage.read(path) or b"")
    except ValidationError:
        return None


@dataclass(frozen=True)
class Upload:
    """A project below a code path, and its archive's SHA-256 (empty if Databricks checks the code out) and size in bytes."""

    root: str
    user: str
    sha256: str = ""
    size: int = 0

    @classmethod
    def of(cls, root: str, user: str, archive: bytes) -> Upload:
        """Returns the upload of an archive."""
        return cls(root, user, hashlib.sha256(archive).hexdigest(), len(archive))

    @property
    def archive(self) -> str:
        """The archive's path."""
        return f"{self.root}/{CODE_FOLDER}/{self.sha256}.tar.gz"

    @property
    def bootstrap(self) -> str:
        """The path of the script that runs on the driver."""
        return f"{self.root}/{CODE_FOLDER}/bootstrap-{hashlib.sha256(bootstrap()).hexdigest()[:16]}.py"

    def output(self, token: str) -> str:
        """Returns the folder for the live output of the run with that idempotency token."""
        return f"{self.root}/{OUTPUT_FOLDER}/{token}"

    def record(self, token: str) -> str:
        """Returns the path of the record of the run with that idempotency token."""
        return f"{self.root}/{RECORDS_FOLDER}/{token}.json"


DatabricksPrepared: TypeAlias = Prepared[DatabricksConfig, Upload]


def pack(request: DatabricksRequest, extra: Mapping[str, bytes]) -> tuple[bytes, int]:
    """Returns a project and further files as a gzipped tar archive, and their number; equal files give equal bytes."""
    files = project_files(request.working_copy, backend=NAME)
    pieces = iterate_archive(files, prefix="project", extra=extra, compressed=True, backend=NAME)
    return b"".join(pieces), len(files)


def code_path(config: DatabricksConfig, user: str) -> str:
    """Returns the folder for a user's uploads."""
    return config.code_path or f"/Workspace/Users/{user}/.prefect-mlprojects"


@cache
def bootstrap() -> bytes:
    """Returns the script that runs on the driver."""
    return (Path(__file__).parent / "bootstrap.py").read_bytes()


def upload(storage: Storage, target: Upload, archive: bytes, ask: Callable[..., Any], report: Report) -> bool:
    """Uploads the archive and the bootstrap unless they exist; returns whether both existed."""
    reused = True
    for path, content in ((target.bootstrap, bootstrap()), (target.archive, archive)):
        if not ask(partial(storage.holds, path, len(content))):
            report(f"Uploading {len(content)} bytes to {path}")
            ask(partial(storage.write, path, content))
            reused = False
    return reused


def check_size(root: str, size: int) -> None:
    """Checks the archive's size in bytes against the limit of workspace files."""
    if root.startswith("/Workspace/") and size > _LARGEST_WORKSPACE_FILE:
        raise failure(
            f"The packed project has {size >> 20} MB; workspace files are limited to {_LARGEST_WORKSPACE_FILE >> 20} MB. Exclude "
            "data in its .dockerignore, or set code-path to a volume (/Volumes/CATALOG/SCHEMA/VOLUME)."
        )


_SECONDS_A_DAY = 86_400
_SUBMITTING = 900.0  # Seconds that a run may take from its record to its submission, network retries included.
_LONGEST_RUN = 60 * _SECONDS_A_DAY  # The state of another user's run is not visible; older ones count as ended.


def clean_workspace(config: DatabricksConfig, *, days: float, dry_run: bool) -> list[str]:
    """Removes archives, output and records older than `days`, except those that a run still needs; returns their paths.

    Runs are found by their records, whoever submitted them, and by the active runs visible to this user.
    """
    client = connect(config, "")
    ask = partial(insist, config=config, stop=None, what="The workspace can't be cleaned")
    user = str(ask(client.current_user.me).user_name)
    root = code_path(config, user)
    storage = storage_for(client, root)
    submitting = max(_SUBMITTING, config.network_timeout)
    paths: list[str] = ask(partial(_old_paths, client, storage, root, user, days, submitting))
    for path in () if dry_run else paths:
        ask(partial(storage.remove, path))
    return paths


def _old_paths(
    client: WorkspaceClient, storage: Storage, root: str, user: str, days: float, submitting: float
) -> list[str]:
    now = time.time()
    # A run writes its record before it checks for its code: a file listed here and in no record read later is not needed.
    candidates = [
        (folder, name)
        for folder in (CODE_FOLDER, OUTPUT_FOLDER, RECORDS_FOLDER)
        for name, changed in storage.names(f"{root}/{folder}")
        if changed <= now - days * _SECONDS_A_DAY
    ]
    if not candidates:
        return []
    runs = client.jobs.list_runs(active_only=True, expand_tasks=True)
    tasks = (task.spark_python_task for run in runs for task in run.tasks or ())
    # The arguments of active runs name their archive and their output.
    active = ["\n".join([task.python_file, *(task.parameters or ())]) for task in tasks if task is not None]
    needed = set(_needed(storage, root, user, active, now, submitting))
    return [
        f"{root}/{folder}/{name}"
        for folder, name in candidates
        if f"{folder}/{name}" not in needed and not any(name.removesuffix(".json") in text for text in active)
    ]


def _needed(storage: Storage, root: str, user: str, active: list[str], now: float, submitting: float) -> Iterator[str]:
    """Yields the files that possibly active runs need, their records and output included."""
    for name, changed in storage.names(f"{root}/{RECORDS_FOLDER}"):
        record, token = read_record(storage, f"{root}/{RECORDS_FOLDER}/{name}"), name.removesuffix(".json")
        if record is None or record.reported:
            continue
        # This user's submitted runs are all in `active`; other users' runs are known by their records only.
        longest = submitting if record.user == user else _LONGEST_RUN
        if any(token in text for text in active) or now - changed < longest:
            yield f"{RECORDS_FOLDER}/{name}"
            yield f"{OUTPUT_FOLDER}/{token}"
            yield from (f"{CODE_FOLDER}/{file}" for file in record.files)
