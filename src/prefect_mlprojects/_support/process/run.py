"""Runs programs: each in a new session, its output streamed, its process tree ended as a whole.

A guard process ends the trees if this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from prefect_mlprojects._support.output import LineSplitter, OutputTail
from prefect_mlprojects._support.process import tree
from prefect_mlprojects._support.process.tree import COOKIE_VARIABLE, end_tree, open_pidfd
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.types import StopSignal, StreamName

_CHUNK = 65536
# Processes that the child process leaves may still write output, such as the `tee` or `sort` of `exec > >(tee log)`.
_LEFTOVER_SECONDS = 1.0
# A process that we can't find (of another user, or without our cookie) may keep the pipe of an ended tree open and go on
# writing. What was in the two pipes when the tree ended is at most the largest that a user may have (pipe(7)).
_DRAIN_SECONDS = 1.0
_DRAIN_BYTES = 2 << 20
# The output's consumer has a cost per chunk, so after many small chunks in a row the reader lets the pipe fill.
_SMALL_CHUNK = 16384
_SMALL_CHUNKS_IN_A_ROW = 10
_ROW_SECONDS = 0.05
_FILL_SECONDS = 0.005

_GUARD_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")

ProcessEnding: TypeAlias = Literal["exited", "stopped", "timed-out"]


@dataclass(frozen=True)
class ProcessResult:
    """How a process tree ended; the code is the exit code, or the negative number of the signal that killed the child process."""

    ending: ProcessEnding
    return_code: int


def run_process(
    argv: Sequence[str],
    *,
    cwd: Path | None,
    env: Mapping[str, str],
    write: Callable[[StreamName, bytes], None],
    stop: StopSignal | None = None,
    timeout: float | None = None,
    grace: float | None = None,
    merge_streams: bool = False,
    pass_fds: Sequence[int] = (),
) -> ProcessResult:
    """Runs a program in a new session and returns once its whole process tree has exited.

    Its stdin is empty. On a stop request and on a time-out the tree gets SIGTERM (after Ctrl-C first SIGINT), and SIGKILL
    after the grace period. So do processes that the program leaves when it exits, after a second in which they may finish
    their output. The tree is also ended when `write` or an interrupt raises, and by the guard when this process dies.

    `env` is the complete environment. `write` is always called in the same thread and may block to slow the program down.
    `timeout` and `grace` are in seconds; None means no limit, and the setting.

    Raises:
        OSError: The program could not be started.
    """
    cookie = uuid.uuid4().hex
    grace = grace_period() if grace is None else grace
    outer = os.environ.get(COOKIE_VARIABLE)
    guard.add(cookie, grace)
    try:
        process = subprocess.Popen(
            list(argv),
            cwd=cwd,
            # The cookies of enclosing executions stay: they end this tree with theirs.
            env={**env, COOKIE_VARIABLE: f"{outer}/{cookie}" if outer else cookie},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge_streams else subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
            pass_fds=pass_fds,
        )
        try:
            guard.set_group(cookie, process.pid)
            return _Supervision(process, cookie, write, stop, timeout, grace).run()
        except BaseException:
            _end_after_error(process, cookie, grace)
            raise
    finally:
        guard.remove(cookie)


def _end_after_error(process: subprocess.Popen[bytes], cookie: str, grace: float) -> None:
    """Ends the tree; a second interrupt skips the grace period."""
    try:
        end_tree(process.pid, cookie, grace)
    except BaseException:
        end_tree(process.pid, cookie, 0)
        raise
    finally:
        process.wait()


@dataclass
class _Supervision:
    """Watches one child process: its output, its exit, stop requests and the time-out."""

    _process: subprocess.Popen[bytes]
    _cookie: str
    _write: Callable[[StreamName, bytes], None]
    _stop: StopSignal | None
    _timeout: float | None
    _grace: float

    def __post_init__(self) -> None:
        self._ending: ProcessEnding = "exited"
        self._end_threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe()
        self._exited = False

    def run(self) -> ProcessResult:
        unregister = self._stop.on_request(lambda: self._interrupt("stopped")) if self._stop else (lambda: None)
        timer = threading.Timer(self._timeout, self._interrupt, ["timed-out"]) if self._timeout is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            self._read()
        finally:
            if timer is not None:
                timer.cancel()
            unregister()
            for thread in self._end_threads:
                thread.join()
            for stream in (self._process.stdout, self._process.stderr):
                if stream is not None:
                    stream.close()
            with self._lock:
                os.close(self._wake_reader)
                os.close(self._wake_writer)
                self._wake_writer = -1
        return ProcessResult(self._ending, self._process.wait())

    def _interrupt(self, ending: ProcessEnding) -> None:
        with self._lock:
            if self._exited or self._ending != "exited":
                return
            self._ending = ending
        self._end_tree()

    def _end_tree(self, delay: float = 0.0) -> None:
        """Ends the tree in another thread: the reader goes on, and the consumer of the output may block it."""

        def end() -> None:
            interrupt = self._stop is not None and self._stop.interrupted and not self._exited
            end_tree(self._process.pid, self._cookie, self._grace, delay, interrupt=interrupt)
            self._wake()

        thread = threading.Thread(target=end, name="end-process-tree", daemon=True)
        self._end_threads.append(thread)
        thread.start()

    def _wake(self) -> None:
        with self._lock:
            if self._wake_writer >= 0:
                os.write(self._wake_writer, b"x")

    def _read(self) -> None:
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(self._wake_reader, selectors.EVENT_READ, "wake")
            self._register_exit(selector, stack)
            open_streams = 0
            for stream, name in ((self._process.stdout, "stdout"), (self._process.stderr, "stderr")):
                if stream is not None:
                    selector.register(stream.fileno(), selectors.EVENT_READ, name)
                    open_streams += 1
            drain_deadline: float | None = None
            allowance = _DRAIN_BYTES
            pace = _Pace()
            while open_streams or not self._exited:
                remaining = None if drain_deadline is None else max(0.0, drain_deadline - time.monotonic())
                events = selector.select(remaining)
                if not events or (remaining == 0.0 and allowance <= 0):
                    return
                for key, _ in events:
                    if key.data == "exit":
                        selector.unregister(key.fileobj)
                        self._process_exited()
                    elif key.data == "wake":
                        os.read(self._wake_reader, 100)
                        if self._exited:
                            drain_deadline = time.monotonic() + _DRAIN_SECONDS
                    else:
                        data = os.read(key.fd, _CHUNK)
                        allowance -= len(data) if drain_deadline is not None else 0
                        if data:
                            self._write(key.data, data)
                            pace.add(len(data))
                        else:
                            selector.unregister(key.fileobj)
                            open_streams -= 1

    def _process_exited(self) -> None:
        # It is waited for only after its tree has ended: until then its pid, which is the group's id, is not reused.
        with self._lock:
            self._exited = True
            delay = _LEFTOVER_SECONDS if self._ending == "exited" else 0.0
        self._end_tree(delay)

    def _register_exit(self, selector: selectors.BaseSelector, stack: contextlib.ExitStack) -> None:
        """Registers the exit of the child process with the selector."""
        descriptor = open_pidfd(self._process.pid)
        if descriptor is not None:
            stack.callback(os.close, descriptor)
            selector.register(descriptor, selectors.EVENT_READ, "exit")
            return
        reader, writer = os.pipe()
        stack.callback(os.close, reader)

        def wait() -> None:
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            else:
                self._process.wait()
            os.close(writer)

        threading.Thread(target=wait, name="wait-for-process", daemon=True).start()
        selector.register(reader, selectors.EVENT_READ, "exit")


class _Pace:
    """Slows down a reader that gets many small chunks in a row."""

    def __init__(self) -> None:
        self._chunks = 0
        self._since = 0.0

    def add(self, size: int) -> None:
        """Counts a chunk; sleeps for a moment after many small ones."""
        now = time.monotonic()
        if size >= _SMALL_CHUNK or now - self._since > _ROW_SECONDS:
            self._chunks, self._since = 0, now
        self._chunks += 1
        if self._chunks > _SMALL_CHUNKS_IN_A_ROW:
            time.sleep(_FILL_SECONDS)


@dataclass(frozen=True)
class ToolResult:
    """How a tool ended; a negative exit code is the number of the signal that killed it."""

    exit_code: int
    output_tail: tuple[str, ...]


def run_tool(
    argv: Sequence[str],
    *,
    cwd: Path | None,
    env: Mapping[str, str],
    report: Callable[[str], None],
    stop: StopSignal | None,
) -> ToolResult:
    """Runs a tool (uv, pip, git …) and passes each line of its stdout and stderr, without the newline, to `report`.

    Raises:
        OSError: It could not be started.
    """
    splitter, tail = LineSplitter(), OutputTail()

    def take(lines: list[str]) -> None:
        for line in lines:
            tail.add(line)
            report(line)

    def write(_stream: StreamName, data: bytes) -> None:
        take(splitter.feed(data))

    result = run_process(argv, cwd=cwd, env=env, write=write, stop=stop, merge_streams=True)
    take(splitter.close())
    return ToolResult(result.return_code, tail.lines())


class _Guard:
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
        """Removes an execution that ended."""
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
            lines = [f"add {cookie} {grace}" for cookie, (grace, _) in self._executions.items()]
            lines += [f"group {cookie} {group}" for cookie, (_, group) in self._executions.items() if group is not None]
            line = "\n".join(lines) or line
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
            env={name: os.environ[name] for name in _GUARD_VARIABLES if name in os.environ},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )


guard = _Guard()
# Locked during a fork, so that the forked process sees no half-started guard; `forget` replaces the child's lock.
os.register_at_fork(
    before=lambda: guard.lock.acquire(), after_in_parent=lambda: guard.lock.release(), after_in_child=guard.forget
)
