"""Files in a workspace: one interface to workspace files, Unity Catalog volumes and DBFS."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient


FOLDER = ".prefect-mlprojects"


class Storage(Protocol):
    """Stores files under absolute paths; a missing file is never an error."""

    def holds(self, path: str, size: int) -> bool:
        """Returns whether the file exists with that size in bytes, if the workspace reports sizes."""

    def write(self, path: str, content: bytes) -> None:
        """Writes or replaces a file; creates its parent folders."""

    def read(self, path: str) -> bytes | None:
        """Returns a file's content; None if it does not exist."""

    def names(self, path: str) -> list[tuple[str, float]]:
        """Returns a folder's entries sorted by name, each with its modification time in seconds since the epoch."""

    def remove(self, path: str) -> None:
        """Removes a file, or a folder and its contents."""


def storage_for(client: WorkspaceClient, root: str) -> Storage:
    """Returns the storage for a path below ``/Workspace``, ``/Volumes`` or ``dbfs:``."""
    if root.startswith("/Volumes/"):
        return _Volume(client)
    return _Dbfs(client) if root.startswith("dbfs:") else _WorkspaceFiles(client)


def driver_path(path: str) -> str:
    """Converts a path to that of the driver's file system."""
    return "/dbfs/" + path.removeprefix("dbfs:").lstrip("/") if path.startswith("dbfs:") else path


def _not_found() -> Any:
    from databricks.sdk.errors import NotFound

    return NotFound


class _WorkspaceFiles:
    def __init__(self, client: WorkspaceClient) -> None:
        self._api = client.workspace

    @staticmethod
    def _path(path: str) -> str:
        return path.removeprefix("/Workspace")

    def holds(self, path: str, size: int) -> bool:
        try:
            found = self._api.get_status(self._path(path)).size
        except _not_found():
            return False
        return found is None or found == size

    def write(self, path: str, content: bytes) -> None:
        from databricks.sdk.service.workspace import ImportFormat

        self._api.mkdirs(self._path(path).rpartition("/")[0])
        # RAW: a .py file must not become a notebook.
        self._api.upload(self._path(path), io.BytesIO(content), format=ImportFormat.RAW, overwrite=True)

    def read(self, path: str) -> bytes | None:
        from databricks.sdk.service.workspace import ExportFormat

        try:
            return self._api.download(self._path(path), format=ExportFormat.AUTO).read()
        except _not_found():
            return None

    def names(self, path: str) -> list[tuple[str, float]]:
        try:
            entries = [
                (str(each.path).rpartition("/")[2], (each.modified_at or each.created_at or 0) / 1000)
                for each in self._api.list(self._path(path))
            ]
        except _not_found():
            return []
        return sorted(entries)

    def remove(self, path: str) -> None:
        try:
            self._api.delete(self._path(path), recursive=True)
        except _not_found():
            return


class _Volume:
    def __init__(self, client: WorkspaceClient) -> None:
        self._api = client.files

    def holds(self, path: str, size: int) -> bool:
        try:
            found = self._api.get_metadata(path).content_length
        except _not_found():
            return False
        return found is None or found == size

    def write(self, path: str, content: bytes) -> None:
        self._api.create_directory(path.rpartition("/")[0])
        self._api.upload(path, io.BytesIO(content), overwrite=True)

    def read(self, path: str) -> bytes | None:
        try:
            contents = self._api.download(path).contents
            return contents.read() if contents is not None else b""
        except _not_found():
            return None

    def names(self, path: str) -> list[tuple[str, float]]:
        try:
            return sorted(
                (str(each.name), (each.last_modified or 0) / 1000) for each in self._api.list_directory_contents(path)
            )
        except _not_found():
            return []

    def remove(self, path: str) -> None:
        try:
            entries = list(self._api.list_directory_contents(path))
        except _not_found():
            try:
                self._api.delete(path)
            except _not_found():
                return
            return
        for each in entries:
            self.remove(str(each.path)) if each.is_directory else self._api.delete(str(each.path))
        self._api.delete_directory(path)


class _Dbfs:
    def __init__(self, client: WorkspaceClient) -> None:
        self._api = client.dbfs

    @staticmethod
    def _path(path: str) -> str:
        return "/" + path.removeprefix("dbfs:").lstrip("/")

    def holds(self, path: str, size: int) -> bool:
        try:
            found = self._api.get_status(self._path(path)).file_size
        except _not_found():
            return False
        return found is None or found == size

    def write(self, path: str, content: bytes) -> None:
        self._api.mkdirs(self._path(path).rpartition("/")[0])
        self._api.upload(self._path(path), io.BytesIO(content), overwrite=True)

    def read(self, path: str) -> bytes | None:
        try:
            with self._api.download(self._path(path)) as file:
                return file.read()
        except _not_found():
            return None

    def names(self, path: str) -> list[tuple[str, float]]:
        try:
            return sorted(
                (str(each.path).rpartition("/")[2], (each.modification_time or 0) / 1000)
                for each in self._api.list(self._path(path))
            )
        except _not_found():
            return []

    def remove(self, path: str) -> None:
        try:
            self._api.delete(self._path(path), recursive=True)
        except _not_found():
            return


RECORDS_FOLDER = "runs"


@dataclass(frozen=True)
class RunRecord:
    """A run's record in the workspace.

    Attributes:
        user: The user who submitted it.
        files: The names of the files below ``code`` that it needs.
        reported: Whether it failed and its failure was reported.
    """

    user: str
    files: Sequence[str] = ()
    reported: bool = False


def record_path(root: str, token: str) -> str:
    """Returns the path of a run's record."""
    return f"{root}/{RECORDS_FOLDER}/{token}.json"


def read_record(storage: Storage, path: str) -> RunRecord | None:
    """Returns a record; None if it is missing or invalid."""
    data = storage.read(path)
    try:
        content = json.loads(data) if data else None
        return (
            RunRecord(str(content["user"]), tuple(content["files"]), bool(content.get("reported"))) if content else None
        )
    except (ValueError, KeyError, TypeError):
        return None


def write_record(storage: Storage, path: str, record: RunRecord) -> None:
    """Writes or replaces a record."""
    storage.write(path, json.dumps(asdict(record)).encode())
