"""Files in a workspace: workspace files, Unity Catalog volumes and DBFS behind four verbs."""

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
    """Holds files under absolute paths; what is not there is never an error."""

    def holds(self, path: str, size: int) -> bool:
        """Returns whether there is such a file, whole: of that many bytes, where the workspace tells."""

    def write(self, path: str, content: bytes) -> None:
        """Writes a file, with the folders above it, in place of what was there."""

    def read(self, path: str) -> bytes | None:
        """Returns a file's content; None when it is not there."""

    def names(self, path: str) -> list[tuple[str, float]]:
        """Returns what a folder holds: names and times of change (seconds since the epoch), sorted by name."""

    def remove(self, path: str) -> None:
        """Removes a file or a folder with all in it."""


def storage_for(client: WorkspaceClient, root: str) -> Storage:
    """Returns the storage that holds a path.

    Args:
        client: The workspace.
        root: A path of ``/Workspace``, ``/Volumes`` or ``dbfs:``.
    """
    if root.startswith("/Volumes/"):
        return _Volume(client)
    return _Dbfs(client) if root.startswith("dbfs:") else _WorkspaceFiles(client)


def driver_path(path: str) -> str:
    """Returns the path as the driver's file system has it."""
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


NOTES_FOLDER = "runs"


@dataclass(frozen=True)
class RunNote:
    """What is noted of a run.

    Attributes:
        user: Who submitted it.
        files: The names of the files below ``code`` that it needs.
        told: Whether it failed and the failure was told.
    """

    user: str
    files: Sequence[str] = ()
    told: bool = False


def note_path(root: str, token: str) -> str:
    """Returns where the note of a run is."""
    return f"{root}/{NOTES_FOLDER}/{token}.json"


def read_note(storage: Storage, path: str) -> RunNote | None:
    """Returns a note; None when there is none, or it can't be understood."""
    data = storage.read(path)
    try:
        content = json.loads(data) if data else None
        return RunNote(str(content["user"]), tuple(content["files"]), bool(content["told"])) if content else None
    except (ValueError, KeyError, TypeError):
        return None


def write_note(storage: Storage, path: str, note: RunNote) -> None:
    """Writes a note in place of the one before."""
    storage.write(path, json.dumps(asdict(note)).encode())
