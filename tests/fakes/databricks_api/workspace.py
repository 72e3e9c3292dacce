"""A Databricks workspace over HTTP, for the real SDK: state, strict requests, real failures, and tasks that really run.

It speaks the REST API of https://docs.databricks.com/api/workspace: current user, workspace files, UC volume files, DBFS, and
Jobs runs submit/get/get-output/cancel. A submitted ``spark_python_task`` runs as a local process whose paths ``/Workspace``,
``/Volumes``, ``/dbfs`` and ``dbfs:`` are replaced, in its script's name and its arguments, by folders below ``root``.

Its limits: one user, no ACLs, no Spark, no real clusters; ``git_source`` is checked but not checked out.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "ada@example.com"
_SUBMIT = {
    "run_name", "idempotency_token", "tasks", "git_source", "environments", "timeout_seconds", "access_control_list",
}  # fmt: skip
_TASK = {"task_key", "spark_python_task", "new_cluster", "existing_cluster_id", "environment_key", "libraries"}
_LINGER = 5.0


class Refusal(Exception):
    """An error answer of the API."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


@dataclass
class FakeRun:
    """A run."""

    run_id: int
    body: dict[str, Any]
    life_cycle: str = "PENDING"
    result: str | None = None
    code: str | None = None
    kind: str | None = None
    message: str = ""
    logs: str = ""
    error: str | None = None
    process: subprocess.Popen[bytes] | None = None
    cancelled: bool = False


@dataclass
class FakeWorkspace:
    """The workspace's state.

    Attributes:
        root: Where its files are.
        tokens: The tokens that are let in.
        failure: How the next runs end before they start: code, type, message.
        troubles: What happens to the next requests whose path holds the first text: a ``Refusal`` or ``"drop"``.
    """

    root: Path
    tokens: set[str] = field(default_factory=lambda: {"good-token"})
    clients: dict[str, str] = field(default_factory=lambda: {"robot": "robot-secret"})
    runs: dict[int, FakeRun] = field(default_factory=dict)
    by_token: dict[str, int] = field(default_factory=dict)
    failure: tuple[str, str, str] | None = None
    troubles: list[tuple[str, Refusal | str]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    host: str = ""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._handles: dict[int, Path] = {}
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"workspace": self}))
        server.daemon_threads = True
        self._server = server
        self.host = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Ends the server and every process it started."""
        self._server.shutdown()
        self._server.server_close()
        for run in self.runs.values():
            self._end(run)

    def local(self, path: str) -> Path:
        """Where a path of the workspace is here."""
        if path.startswith("dbfs:"):
            path = "/dbfs/" + path.removeprefix("dbfs:").lstrip("/")
        return self.root / path.lstrip("/")

    # -- jobs

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """``jobs/runs/submit``."""
        _only(body, _SUBMIT, "request")
        tasks = body.get("tasks")
        if not isinstance(tasks, list) or len(tasks) != 1:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "Exactly one task is expected.")
        task = tasks[0]
        _only(task, _TASK, "task")
        if sum(key in task for key in ("new_cluster", "existing_cluster_id", "environment_key")) != 1:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "Cluster validation error: Missing required field: cluster")
        cluster = task.get("new_cluster")
        if cluster is not None and ("spark_version" not in cluster or not {"num_workers", "autoscale"} & set(cluster)):
            raise Refusal(
                400, "INVALID_PARAMETER_VALUE", "Cluster validation error: Missing required field: spark_version"
            )
        if "environment_key" in task and task["environment_key"] not in [
            each["environment_key"] for each in body.get("environments", [])
        ]:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "The environment_key is not among the environments.")
        python = task["spark_python_task"]
        _only(python, {"python_file", "parameters", "source"}, "spark_python_task")
        if len(json.dumps(python.get("parameters", []))) > 10_000:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "The parameters are too long.")
        if python.get("source") != "GIT" and not python["python_file"].startswith(
            ("/Workspace/", "/Volumes/", "dbfs:/")
        ):
            raise Refusal(400, "INVALID_PARAMETER_VALUE", f"Invalid python file reference: {python['python_file']}")
        token = body.get("idempotency_token", "")
        if len(token) > 64:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", "idempotency_token must have at most 64 characters")
        with self._lock:
            if token and token in self.by_token:
                return {"run_id": self.by_token[token]}
            run = FakeRun(1000 + len(self.runs), body)
            self.runs[run.run_id] = run
            if token:
                self.by_token[token] = run.run_id
        threading.Thread(target=self._live, args=(run, python), daemon=True).start()
        return {"run_id": run.run_id}

    def _live(self, run: FakeRun, python: dict[str, Any]) -> None:
        if self.failure is not None:
            run.code, run.kind, run.message = self.failure
            run.result, run.life_cycle = "FAILED", "INTERNAL_ERROR"
            return
        mapped = [self._mapped(each) for each in python.get("parameters", [])]
        command = [sys.executable, str(self.local(python["python_file"])), *mapped]
        with self._lock:
            if run.life_cycle != "PENDING":
                return
            run.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**_network_settings(), "PATH": os.environ["PATH"], "HOME": str(self.root), **self.environment},
            )
            run.life_cycle = "RUNNING"
        try:
            out, _ = run.process.communicate(timeout=run.body.get("timeout_seconds"))
        except subprocess.TimeoutExpired:
            self._end(run)
            run.result, run.code, run.kind, run.life_cycle = "TIMEDOUT", "CANCELED", "CLIENT_ERROR", "TERMINATED"
            return
        run.logs = out.decode("utf-8", "replace")
        code = run.process.returncode
        if self.runs[run.run_id].cancelled:
            run.result, run.code, run.kind = "CANCELED", "USER_CANCELED", "CLIENT_ERROR"
            run.message = f"Run cancelled by {USER}"
        elif code == 0:
            run.result, run.code, run.kind = "SUCCESS", "SUCCESS", "SUCCESS"
        else:
            run.result, run.code, run.kind = "FAILED", "RUN_EXECUTION_ERROR", "CLIENT_ERROR"
            run.error = f"SystemExit: {code}"
            run.message = f"Task mlproject failed with message: {run.error}"
        run.life_cycle = "TERMINATED"

    def _mapped(self, text: str) -> str:
        for top in ("/Workspace/", "/Volumes/", "/dbfs/"):
            text = text.replace(f'"{top}', f'"{self.root}{top}')
        return text

    def cancel(self, run_id: int) -> None:
        """``jobs/runs/cancel``."""
        run = self.run(run_id)
        with self._lock:
            run.cancelled = True
            if run.process is None and run.life_cycle == "PENDING":
                run.life_cycle, run.result, run.code = "TERMINATED", "CANCELED", "USER_CANCELED"
                return
        self._end(run)

    @staticmethod
    def _end(run: FakeRun) -> None:
        process = run.process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _LINGER
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def run(self, run_id: int) -> FakeRun:
        """A run by its id."""
        if run_id not in self.runs:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", f"Run {run_id} does not exist.")
        return self.runs[run_id]

    def describe(self, run: FakeRun) -> dict[str, Any]:
        """``jobs/runs/get``."""
        state: dict[str, Any] = {"life_cycle_state": run.life_cycle, "state_message": run.message}
        ended = run.life_cycle in ("TERMINATED", "INTERNAL_ERROR", "SKIPPED")
        status: dict[str, Any] = {"state": "TERMINATED" if ended else run.life_cycle}
        if ended:
            state["result_state"] = run.result
            status["termination_details"] = {"code": run.code, "type": run.kind, "message": run.message}
        return {
            "run_id": run.run_id,
            "job_id": 77,
            "creator_user_name": USER,
            "run_name": run.body.get("run_name", "Untitled"),
            "run_page_url": f"{self.host}/?o=1#job/77/run/{run.run_id}",
            "state": state,
            "status": status,
            "tasks": [{"task_key": run.body["tasks"][0]["task_key"], "run_id": run.run_id + 500_000, "state": state}],
        }

    # -- requests

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> Any:
        """Answers a request: a JSON value, or bytes."""
        if path == "/oidc/.well-known/oauth-authorization-server":
            return {
                "authorization_endpoint": f"{self.host}/oidc/v1/authorize",
                "token_endpoint": f"{self.host}/oidc/v1/token",
            }
        if path == "/.well-known/databricks-config":
            return {"oidc_endpoint": f"{self.host}/oidc"}
        if path.startswith("/.well-known/"):
            raise Refusal(404, "NOT_FOUND", "There is no such endpoint.")
        if path == "/oidc/v1/token":
            return self._token(headers)
        if headers.get("Authorization", "").removeprefix("Bearer ") not in self.tokens:
            raise Refusal(401, "UNAUTHENTICATED", "Credential was not sent or was of an unsupported type for this API.")
        if path.startswith("/api/2.0/fs/"):
            return self._volume(method, path.removeprefix("/api/2.0/fs/"), body)
        content_type = headers.get("Content-Type", "")
        if content_type.startswith("multipart/"):
            return self._import(body, content_type)
        values = {**query, **(json.loads(body) if body else {})}
        name = path.removeprefix("/api/").partition("/")[2]
        if name == "preview/scim/v2/Me":
            return {"userName": USER, "id": "1"}
        if name.startswith("jobs/runs/"):
            return self._jobs(name.removeprefix("jobs/runs/"), values)
        if name.startswith("workspace/"):
            return self._files(name.removeprefix("workspace/"), self.local("/Workspace" + values["path"]), values)
        if name.startswith("dbfs/"):
            return self._dbfs(name.removeprefix("dbfs/"), values)
        raise Refusal(404, "ENDPOINT_NOT_FOUND", f"No API found for '{method} {path}'")

    def _token(self, headers: Any) -> Any:
        user, _, secret = (
            base64.b64decode(headers.get("Authorization", "").removeprefix("Basic ")).decode().partition(":")
        )
        if not secret or self.clients.get(user) != secret:
            raise Refusal(401, "invalid_client", "Client authentication failed")
        self.tokens.add("machine-token")
        return {"access_token": "machine-token", "token_type": "Bearer", "expires_in": 3600}

    def _jobs(self, name: str, values: dict[str, Any]) -> Any:
        if name == "submit":
            return self.submit(values)
        run_id = int(values["run_id"])
        if name == "get":
            return self.describe(self.run(run_id))
        if name == "cancel":
            threading.Thread(target=self.cancel, args=(self.run(run_id).run_id,), daemon=True).start()
            return {}
        if name == "get-output":
            run = self.run(run_id - 500_000)
            return {"logs": run.logs, "logs_truncated": False, **({"error": run.error} if run.error else {})}
        raise Refusal(404, "ENDPOINT_NOT_FOUND", name)

    def _import(self, body: bytes, content_type: str) -> Any:
        message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
        parts = {each.get_param("name", header="content-disposition"): each for each in message.iter_parts()}
        path = self.local("/Workspace" + parts["path"].get_content().strip())
        if not path.parent.is_dir():
            raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"The parent folder ({path.parent}) does not exist.")
        content: Any = parts["content"].get_payload(decode=True)
        path.write_bytes(content)
        return {}

    def _files(self, name: str, path: Path, values: dict[str, Any]) -> Any:
        if name == "mkdirs":
            path.mkdir(parents=True, exist_ok=True)
            return {}
        if not path.exists():
            raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"Path ({values['path']}) doesn't exist.")
        if name == "get-status":
            return self._object(path)
        if name == "list":
            return {"objects": [self._object(each) for each in path.iterdir()]}
        if name == "delete":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            return {}
        if name == "export":
            return path.read_bytes()
        raise Refusal(404, "ENDPOINT_NOT_FOUND", name)

    def _object(self, path: Path) -> dict[str, Any]:
        return {
            "path": "/" + str(path.relative_to(self.root / "Workspace")),
            "object_type": "DIRECTORY" if path.is_dir() else "FILE",
            "modified_at": int(path.stat().st_mtime * 1000),
        }

    def _volume(self, method: str, name: str, body: bytes) -> Any:
        kind, _, rest = name.partition("/")
        path = self.local(unquote(rest))
        if method == "PUT":
            if kind == "directories":
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.write_bytes(body)
            return b""
        if not (path.is_dir() if kind == "directories" else path.is_file()):
            raise Refusal(404, "NOT_FOUND", "The file or directory being accessed is not found.")
        if method == "DELETE":
            path.rmdir() if path.is_dir() else path.unlink()
        if method in ("DELETE", "HEAD"):
            return b""
        if kind == "files":
            return path.read_bytes()
        return {
            "contents": [
                {
                    "path": "/" + str(each.relative_to(self.root)),
                    "name": each.name,
                    "is_directory": each.is_dir(),
                    "last_modified": int(each.stat().st_mtime * 1000),
                }
                for each in path.iterdir()
            ]
        }

    def _dbfs(self, name: str, values: dict[str, Any]) -> Any:
        if name in ("add-block", "close"):
            if name == "add-block":
                with self._handles[values["handle"]].open("ab") as file:
                    file.write(base64.b64decode(values["data"]))
            return {}
        path = self.local("/dbfs" + values["path"])
        if name == "mkdirs":
            path.mkdir(parents=True, exist_ok=True)
            return {}
        if name == "create":
            handle = len(self._handles) + 1
            self._handles[handle] = path
            path.write_bytes(b"")
            return {"handle": handle}
        if not path.exists():
            raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"No file or directory exists on path {values['path']}.")
        if name == "get-status":
            return self._dbfs_file(path)
        if name == "list":
            return {"files": [self._dbfs_file(each) for each in path.iterdir()]}
        if name == "delete":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            return {}
        if name == "read":
            offset, length = int(values.get("offset", 0)), int(values.get("length", 1 << 20))
            data = path.read_bytes()[offset : offset + length]
            return {"bytes_read": len(data), "data": base64.b64encode(data).decode()}
        raise Refusal(404, "ENDPOINT_NOT_FOUND", name)

    def _dbfs_file(self, path: Path) -> dict[str, Any]:
        return {
            "path": "/" + str(path.relative_to(self.root / "dbfs")),
            "is_dir": path.is_dir(),
            "file_size": path.stat().st_size,
            "modification_time": int(path.stat().st_mtime * 1000),
        }


def _network_settings() -> dict[str, str]:
    """How this machine reaches a package index: a cluster has that from its init scripts."""
    prefixes = ("UV_", "PIP_", "SSL_", "REQUESTS_CA", "HTTP_", "HTTPS_", "NO_PROXY", "http_", "https_", "no_proxy")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def _only(values: dict[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise Refusal(400, "MALFORMED_REQUEST", f"Unknown fields in {what}: {', '.join(unknown)}")


class _Handler(BaseHTTPRequestHandler):
    workspace: FakeWorkspace
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in http.server
        """Says nothing."""

    def _handle(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        self.workspace.requests.append((self.command, url.path))
        try:
            for position, (part, trouble) in enumerate(self.workspace.troubles):
                if part in url.path:
                    del self.workspace.troubles[position]
                    if isinstance(trouble, Refusal):
                        raise trouble
                    self.close_connection = True
                    self.connection.close()
                    return
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            answer = self.workspace.answer(self.command, url.path, query, body, self.headers)
            self._send(200, answer, {})
        except Refusal as refusal:
            self._send(refusal.status, {"error_code": refusal.code, "message": refusal.message}, refusal.headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle
