"""Starts the guard process and tells it which process trees to end if this process is killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

from prefect_mlprojects._support.process import tree

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class Guard:
    """The guard process of this process; started for the first execution, and again if it died."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._executions: dict[str, tuple[float, int | None]] = {}

    def add(self, cookie: str, grace_period: float) -> None:
        """Registers an execution before its first process starts."""
        with self.lock:
            self._executions[cookie] = (grace_period, None)
            self._send(f"add {cookie} {grace_period}")

    def set_group(self, cookie: str, group: int) -> None:
        """Adds the process group of an execution."""
        with self.lock:
            self._executions[cookie] = (self._executions[cookie][0], group)
            self._send(f"group {cookie} {group}")

    def remove(self, cookie: str) -> None:
        """Removes an execution that has ended."""
        with self.lock:
            self._executions.pop(cookie, None)
            # A lost message is harmless: no process has this cookie any more.
            with contextlib.suppress(OSError):
                self._send(f"remove {cookie}")

    def forget(self) -> None:
        """Resets a forked process: it closes the parent's pipe, so that the guard sees the end of file when the parent dies."""
        process, self._process = self._process, None
        self.lock = threading.Lock()
        self._executions = {}
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.returncode = 0  # only its parent can wait for it

    def _send(self, line: str) -> None:
        try:
            self._write(line)
        except OSError:
            self._process = None
            self._write(line)

    def _write(self, line: str) -> None:
        if self._process is None:
            self._process = self._start()
            lines = []
            for cookie, (grace_period, group) in self._executions.items():
                lines.append(f"add {cookie} {grace_period}")
                if group is not None:
                    lines.append(f"group {cookie} {group}")
            line = "\n".join(lines) if lines else line
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), f"{line}\n".encode())

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", tree.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # No cookie: an execution that encloses ours must not find the guard in its tree.
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )


guard = Guard()
# Locked during a fork, so that the forked process sees no half-started guard; `forget` replaces the child's lock.
os.register_at_fork(
    before=lambda: guard.lock.acquire(), after_in_parent=lambda: guard.lock.release(), after_in_child=guard.forget
)
