"""Workspace files, Unity Catalog volumes and DBFS: three APIs over folders of this machine."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.fakes.databricks_api.errors import Refusal, invalid, missing, no_endpoint, number, only

_BLOCK = 1 << 20
_PAGE = 1000
_NOTEBOOK_HEADER = b"# Databricks notebook source"


class WorkspaceFiles:
    """``/api/2.0/workspace``: https://docs.databricks.com/api/workspace/workspace.

    Args:
        folder: What ``/Workspace`` is here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def answer(self, method: str, name: str, values: Mapping[str, Any], user: str) -> Any:
        """Answers a request; the content of a posted file is in ``values`` as bytes."""
        methods = {"mkdirs": "POST", "import": "POST", "delete": "POST", "get-status": "GET", "list": "GET"}
        if methods.get(name, "GET") != method or name not in {*methods, "export"}:
            raise no_endpoint(method, f"/api/2.0/workspace/{name}")
        text = str(values.get("path", ""))
        if not text.startswith("/") or ".." in text.split("/"):
            raise invalid(f"Path ({text}) doesn't start with '/'")
        self._permitted(text, user)
        path = self._folder / text.removeprefix("/Workspace").lstrip("/")
        if name == "mkdirs":
            only(values, (), ("path",))
            if path.is_file():
                raise Refusal(400, "RESOURCE_ALREADY_EXISTS", f"Path ({text}) is a file.")
            path.mkdir(parents=True, exist_ok=True)
            return {}
        if name == "import":
            return self._import(text, path, values)
        if not path.exists():
            raise missing(f"Path ({text}) doesn't exist.")
        return getattr(self, "_" + name.replace("-", "_"))(text, path, values)

    @staticmethod
    def _permitted(path: str, user: str) -> None:
        parts = path.removeprefix("/Workspace").strip("/").split("/")
        if parts[0] == "Users" and len(parts) > 1 and parts[1] != user:
            raise Refusal(403, "PERMISSION_DENIED", f"User {user} doesn't have Manage permission on {path}.")

    @staticmethod
    def _import(text: str, path: Path, values: Mapping[str, Any]) -> Any:
        only(values, ("content", "format", "language", "overwrite"), ("path",))
        content = values.get("content", b"")
        data: bytes = content if isinstance(content, bytes) else base64.b64decode(content)
        if isinstance(content, str) and len(content) > 10 * _BLOCK:
            raise Refusal(400, "MAX_NOTEBOOK_SIZE_EXCEEDED", "The content exceeds 10 MB.")
        kind = values.get("format", "SOURCE")
        if kind not in ("RAW", "AUTO"):
            raise invalid(f"The double imports files only (format RAW or AUTO), not {kind}.")
        if kind == "AUTO" and data.startswith(_NOTEBOOK_HEADER):
            raise invalid("This would become a notebook, not a file.")
        if not path.parent.is_dir():
            raise missing(f"The parent folder ({text.rpartition('/')[0]}) does not exist.")
        if path.exists() and str(values.get("overwrite")).lower() != "true":
            raise Refusal(400, "RESOURCE_ALREADY_EXISTS", f"Path ({text}) already exists.")
        path.write_bytes(data)
        return {}

    def _get_status(self, _text: str, path: Path, values: Mapping[str, Any]) -> Any:
        only(values, (), ("path",))
        return self._object(path)

    def _list(self, _text: str, path: Path, values: Mapping[str, Any]) -> Any:
        only(values, ("notebooks_modified_after",), ("path",))
        found = [self._object(each) for each in path.iterdir()] if path.is_dir() else [self._object(path)]
        return {"objects": found} if found else {}

    @staticmethod
    def _delete(text: str, path: Path, values: Mapping[str, Any]) -> Any:
        only(values, ("recursive",), ("path",))
        if path.is_dir() and any(path.iterdir()) and values.get("recursive") is not True:
            raise Refusal(400, "DIRECTORY_NOT_EMPTY", f"Folder ({text}) is not empty.")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {}

    @staticmethod
    def _export(text: str, path: Path, values: Mapping[str, Any]) -> Any:
        only(values, ("format", "direct_download"), ("path",))
        if path.is_dir():
            raise invalid(f"The double exports files only, and {text} is a folder.")
        if str(values.get("direct_download")).lower() == "true":
            return path.read_bytes()
        return {"content": base64.b64encode(path.read_bytes()).decode()}

    def _object(self, path: Path) -> dict[str, Any]:
        return {
            "path": "/" + str(path.relative_to(self._folder)),
            "object_type": "DIRECTORY" if path.is_dir() else "FILE",
            "object_id": path.stat().st_ino,
            **({} if path.is_dir() else {"size": path.stat().st_size}),
            "modified_at": int(path.stat().st_mtime * 1000),
        }


class Volumes:
    """``/api/2.0/fs``: https://docs.databricks.com/api/workspace/files.

    Args:
        root: The folder that holds ``Volumes``.
        volumes: The volumes that exist, as CATALOG/SCHEMA/VOLUME.
    """

    def __init__(self, root: Path, volumes: set[str]) -> None:
        self._root = root
        self.volumes = volumes

    def answer(self, method: str, name: str, values: Mapping[str, Any], body: bytes) -> Any:
        """Answers a request."""
        kind, _, rest = name.partition("/")
        parts = unquote(rest).strip("/").split("/")
        if kind not in ("files", "directories") or parts[0] != "Volumes" or ".." in parts:
            raise no_endpoint(method, f"/api/2.0/fs/{name}")
        if len(parts) < 4 or "/".join(parts[1:4]) not in self.volumes:
            raise Refusal(404, "NOT_FOUND", f"Volume '{'.'.join(parts[1:4])}' does not exist.")
        path = self._root / "/".join(parts)
        (self._root / "/".join(parts[:4])).mkdir(parents=True, exist_ok=True)
        if method == "PUT":
            return self._put(kind, path, values, body)
        if not (path.is_dir() if kind == "directories" else path.is_file()):
            raise Refusal(404, "NOT_FOUND", "The file or directory being accessed is not found.")
        if method == "DELETE":
            if path.is_dir() and any(path.iterdir()):
                raise Refusal(400, "FILES_API_DIRECTORY_IS_NOT_EMPTY", "The directory being deleted is not empty.")
            path.rmdir() if path.is_dir() else path.unlink()
        if method == "DELETE" or (method == "HEAD" and kind == "directories"):
            return b""
        if method == "HEAD":
            return path.read_bytes()
        if method != "GET":
            raise no_endpoint(method, f"/api/2.0/fs/{name}")
        return path.read_bytes() if kind == "files" else self._listing(path, values)

    @staticmethod
    def _put(kind: str, path: Path, values: Mapping[str, Any], body: bytes) -> Any:
        if kind == "directories":
            path.mkdir(parents=True, exist_ok=True)
            return b""
        only(values, ("overwrite",))
        if not path.parent.is_dir():
            raise Refusal(404, "NOT_FOUND", "The parent directory of the file is not found.")
        if path.exists() and values.get("overwrite") != "true":
            raise Refusal(409, "ALREADY_EXISTS", "The file being created already exists.")
        path.write_bytes(body)
        return b""

    def _listing(self, path: Path, values: Mapping[str, Any]) -> Any:
        only(values, ("page_size", "page_token"))
        size = number(values, "page_size", _PAGE, _PAGE) or _PAGE
        start = number(values, "page_token", 0, 1 << 40)
        entries = sorted(path.iterdir())
        shown = {
            "contents": [
                {
                    "path": "/" + str(each.relative_to(self._root)),
                    "name": each.name,
                    "is_directory": each.is_dir(),
                    "last_modified": int(each.stat().st_mtime * 1000),
                    **({} if each.is_dir() else {"file_size": each.stat().st_size}),
                }
                for each in entries[start : start + size]
            ]
        }
        return {**shown, "next_page_token": str(start + size)} if start + size < len(entries) else shown


class Dbfs:
    """``/api/2.0/dbfs``: https://docs.databricks.com/api/workspace/dbfs.

    Args:
        folder: What ``dbfs:/`` is here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[int, Path] = {}
        self._last = 0
        self.enabled = True

    def answer(self, method: str, name: str, values: Mapping[str, Any]) -> Any:
        """Answers a request."""
        reading = ("get-status", "list", "read")
        if name not in (*reading, "add-block", "close", "mkdirs", "create", "put", "delete"):
            raise no_endpoint(method, f"/api/2.0/dbfs/{name}")
        if (method == "GET") != (name in reading):
            raise no_endpoint(method, f"/api/2.0/dbfs/{name}")
        if name in ("add-block", "close"):
            return self._write(name, values)
        text = str(values.get("path", ""))
        if not text.startswith("/") or ".." in text.split("/"):
            raise invalid(f"Path must be absolute: {text}")
        if not self.enabled:
            raise Refusal(403, "PERMISSION_DENIED", f"Public DBFS root is disabled. Access is denied on path: {text}")
        path = self._folder / text.lstrip("/")
        if name == "mkdirs":
            path.mkdir(parents=True, exist_ok=True)
            return {}
        if name in ("create", "put"):
            return self._create(name, text, path, values)
        if not path.exists():
            raise missing(f"No file or directory exists on path {text}.")
        return self._read(name, text, path, values)

    def _write(self, name: str, values: Mapping[str, Any]) -> Any:
        only(values, ("data",), ("handle",))
        if values["handle"] not in self._handles:
            raise missing(f"No open stream with handle {values['handle']}.")
        if name == "close":
            del self._handles[values["handle"]]
            return {}
        data = base64.b64decode(values["data"])
        if len(data) > _BLOCK:
            raise Refusal(400, "MAX_BLOCK_SIZE_EXCEEDED", "The block exceeds 1 MB.")
        with self._handles[values["handle"]].open("ab") as file:
            file.write(data)
        return {}

    def _create(self, name: str, text: str, path: Path, values: Mapping[str, Any]) -> Any:
        only(values, ("overwrite", *(("contents",) if name == "put" else ())), ("path",))
        if path.exists() and values.get("overwrite") is not True:
            raise Refusal(400, "RESOURCE_ALREADY_EXISTS", f"A file or directory already exists at path {text}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(values.get("contents", "")))
        if name == "put":
            return {}
        self._last += 1
        self._handles[self._last] = path
        return {"handle": self._last}

    def _read(self, name: str, text: str, path: Path, values: Mapping[str, Any]) -> Any:
        if name == "get-status":
            return self._file(path)
        if name == "list":
            return {"files": [self._file(each) for each in path.iterdir()] if path.is_dir() else [self._file(path)]}
        if name == "delete":
            if path.is_dir() and any(path.iterdir()) and values.get("recursive") is not True:
                raise Refusal(400, "IO_ERROR", f"The directory {text} is not empty.")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            return {}
        offset, length = number(values, "offset", 0, 1 << 40), number(values, "length", _BLOCK // 2, 1 << 40)
        if length > _BLOCK:
            raise Refusal(400, "MAX_READ_SIZE_EXCEEDED", "At most 1 MB can be read at once.")
        data = path.read_bytes()[offset : offset + length]
        return {"bytes_read": len(data), "data": base64.b64encode(data).decode()}

    def _file(self, path: Path) -> dict[str, Any]:
        return {
            "path": "/" + str(path.relative_to(self._folder)),
            "is_dir": path.is_dir(),
            "file_size": 0 if path.is_dir() else path.stat().st_size,
            "modification_time": int(path.stat().st_mtime * 1000),
        }
