"""The one gate to subprocesses: starts them in groups of their own, passes on what they print, and ends them whole."""

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
from typing import IO, Literal, TypeAlias

from prefect_mlprojects._guard import COOKIE_VARIABLE, GUARD_PROGRAM, end_tree
from prefect_mlprojects._output import LineSplitter, OutputTail
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.types import StopSignal, StreamName

_CHUNK = 65536
_DRAIN_SECONDS = 1.0
# Whoever takes the output pays for each piece, so many small pieces in a row are left to gather in the pipe for a moment.
_SMALL_PIECE = 16384
_PIECES_IN_A_ROW = 10
_ROW_SECONDS = 0.05
_GATHER_SECONDS = 0.005

ProcessEnding: TypeAlias = Literal["exited", "stopped", "timed-out"]


class _Guard:
    """The guard process of this process, started when it is first needed and again when it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._executions: dict[str, tuple[float, int | None]] = {}

    def add(self, cookie: str, grace: float) -> None:
        with self._lock:
            self._executions[cookie] = (grace, None)
            self._tell(f"add {cookie} {grace}")

    def set_group(self, cookie: str, group: int) -> None:
        with self._lock:
            self._executions[cookie] = (self._executions[cookie][0], group)
            self._tell(f"group {cookie} {group}")

    def remove(self, cookie: str) -> None:
        with self._lock:
            self._executions.pop(cookie, None)
            self._tell(f"remove {cookie}")

    def forget(self) -> None:
        """Lets a forked child start anew: the guard watches over its parent."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        self._executions = {}
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                os.close(process.stdin.fileno())
            process.returncode = 0  # not ours to wait for

    def _tell(self, line: str) -> None:
        try:
            self._write(line)
        except OSError:
            self._process = None
            self._write(line)

    def _write(self, line: str) -> None:
        if self._process is None:
            self._process = self._start()
            lines = []
            for cookie, (grace, group) in self._executions.items():
                lines.append(f"add {cookie} {grace}")
                if group is not None:
                    lines.append(f"group {cookie} {group}")
            line = "\n".join(lines) if lines else line
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), f"{line}\n".encode())

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", os.defpath)},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )


_guard = _Guard()
os.register_at_fork(after_in_child=_guard.forget)


@dataclass(frozen=True)
class ProcessResult:
    """How a process tree ended.

    Attributes:
        ending: ``exited`` by itself, ``stopped`` by the stop signal, or ``timed-out``.
        return_code: The leader's exit code; the negative number of the signal that ended it.
    """

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
) -> ProcessResult:
    """Runs a program in a session of its own, and returns when it and everything that it started has ended.

    Its stdin is empty. When ``stop`` is requested, when the timeout passes, and when the program itself has ended, what is left
    of its tree is asked to end, and killed after the grace period. The same happens when this process dies, by the guard.

    Args:
        argv: The program and its arguments; no shell is involved.
        cwd: Where it runs; None for here.
        env: Its whole environment.
        write: Takes the next bytes of a stream as they come, in one thread; it may block to slow the program down.
        stop: Asks for the end.
        timeout: Seconds that the program may take; None for no limit.
        grace: Seconds between asking and killing; None for the setting.
        merge_streams: Whether stderr goes where stdout goes.

    Raises:
        OSError: The program could not be started.
    """
    cookie = uuid.uuid4().hex
    patience = grace_period() if grace is None else grace
    outer = os.environ.get(COOKIE_VARIABLE)
    _guard.add(cookie, patience)
    try:
        process = subprocess.Popen(
            list(argv),
            cwd=cwd,
            # The cookies of surrounding executions stay: they end this tree with theirs.
            env={**env, COOKIE_VARIABLE: f"{outer}/{cookie}" if outer else cookie},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge_streams else subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        try:
            _guard.set_group(cookie, process.pid)
            return _Supervision(process, cookie, write, stop, timeout, patience).run()
        except BaseException:
            end_tree(process.pid, cookie, 0)
            process.wait()
            raise
    finally:
        _guard.remove(cookie)


class _Supervision:
    """Watches one process: its streams, its end, and who wants it to end."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        cookie: str,
        write: Callable[[StreamName, bytes], None],
        stop: StopSignal | None,
        timeout: float | None,
        grace: float,
    ) -> None:
        self._process = process
        self._cookie = cookie
        self._write = write
        self._stop = stop
        self._timeout = timeout
        self._grace = grace
        self._ending: ProcessEnding = "exited"
        self._enders: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe()
        self._exited = False

    def run(self) -> ProcessResult:
        forget = self._stop.on_request(lambda: self._interrupt("stopped")) if self._stop else (lambda: None)
        timer = threading.Timer(self._timeout, self._interrupt, ["timed-out"]) if self._timeout is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            self._read()
        finally:
            if timer is not None:
                timer.cancel()
            forget()
            for thread in self._enders:
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

    def _end_tree(self) -> None:
        """Ends the tree in a thread of its own: the reader goes on, and may be held up by whoever takes the output."""

        def end() -> None:
            end_tree(self._process.pid, self._cookie, self._grace)
            self._wake()

        thread = threading.Thread(target=end, name="end-process-tree", daemon=True)
        self._enders.append(thread)
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
            self._register_stream(selector, self._process.stdout, "stdout")
            self._register_stream(selector, self._process.stderr, "stderr")
            open_streams = sum(key.data in {"stdout", "stderr"} for key in selector.get_map().values())
            give_up: float | None = None
            pace = _Pace()
            while open_streams or not self._exited:
                remaining = None if give_up is None else max(0.0, give_up - time.monotonic())
                events = selector.select(remaining)
                if not events:
                    # The tree has ended, but somebody who hides from us still holds the pipe.
                    return
                for key, _ in events:
                    if key.data == "exit":
                        selector.unregister(key.fileobj)
                        self._leader_exited()
                    elif key.data == "wake":
                        os.read(self._wake_reader, 100)
                        if self._exited:
                            give_up = time.monotonic() + _DRAIN_SECONDS
                    else:
                        data = os.read(key.fd, _CHUNK)
                        if data:
                            self._write(key.data, data)
                            pace.took(len(data))
                        else:
                            selector.unregister(key.fileobj)
                            open_streams -= 1

    def _leader_exited(self) -> None:
        self._process.wait()
        with self._lock:
            self._exited = True
        self._end_tree()

    def _register_exit(self, selector: selectors.BaseSelector, stack: contextlib.ExitStack) -> None:
        """Lets the selector wake when the leader exits."""
        if hasattr(os, "pidfd_open"):
            descriptor = os.pidfd_open(self._process.pid)
            stack.callback(os.close, descriptor)
            selector.register(descriptor, selectors.EVENT_READ, "exit")
            return
        reader, writer = os.pipe()
        stack.callback(os.close, reader)

        def wait() -> None:
            self._process.wait()
            os.close(writer)

        threading.Thread(target=wait, name="wait-for-process", daemon=True).start()
        selector.register(reader, selectors.EVENT_READ, "exit")

    @staticmethod
    def _register_stream(selector: selectors.BaseSelector, stream: IO[bytes] | None, name: StreamName) -> None:
        if stream is not None:
            selector.register(stream.fileno(), selectors.EVENT_READ, name)


class _Pace:
    """Slows a reader down that gets many small pieces in a row."""

    def __init__(self) -> None:
        self._pieces = 0
        self._since = 0.0

    def took(self, size: int) -> None:
        """Takes note of a piece, and waits for a moment when there were many."""
        now = time.monotonic()
        if size >= _SMALL_PIECE or now - self._since > _ROW_SECONDS:
            self._pieces, self._since = 0, now
        self._pieces += 1
        if self._pieces > _PIECES_IN_A_ROW:
            time.sleep(_GATHER_SECONDS)


@dataclass(frozen=True)
class ToolResult:
    """How a tool ended.

    Attributes:
        exit_code: Its exit code; the negative number of the signal that ended it.
        output_tail: The last lines it printed.
    """

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
    """Runs a tool (uv, pip, git …) and hands on each line it prints, stdout and stderr merged.

    Args:
        argv: The program and its arguments; no shell is involved.
        cwd: Where it runs; None for here.
        env: Its whole environment.
        report: Takes each line, without its newline.
        stop: Asks for the end.

    Raises:
        OSError: It could not be started.
    """
    splitter, tail = LineSplitter(), OutputTail()

    def take(lines: list[str]) -> None:
        for line in lines:
            tail.add(line)
            report(line)

    result = run_process(
        argv,
        cwd=cwd,
        env=env,
        write=lambda _, data: take(splitter.feed(data)),
        stop=stop,
        merge_streams=True,
    )
    take(splitter.close())
    return ToolResult(result.return_code, tail.lines())
