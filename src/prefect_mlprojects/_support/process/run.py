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

from prefect_mlprojects._support.output import LineSplitter, OutputTail
from prefect_mlprojects._support.process.guard import COOKIE_VARIABLE, GUARD_PROGRAM, end_tree, open_pidfd
from prefect_mlprojects.settings import grace_period
from prefect_mlprojects.types import StopSignal, StreamName

_CHUNK = 65536
# What the leader leaves may still be busy with its output, such as the `tee` or `sort` of `exec > >(tee log)`.
_LEAVE_SECONDS = 1.0
# Somebody who hides from us (with another user's rights, or without our cookie) may hold the pipe of a tree that has ended, and
# even go on writing: what was in the two pipes by then is no more than the largest that a user may have (pipe(7)).
_DRAIN_SECONDS = 1.0
_DRAIN_BYTES = 2 << 20
_GUARD_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
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
            # What can't be said is of no harm: the cookie is nobody's any more.
            with contextlib.suppress(OSError):
                self._tell(f"remove {cookie}")

    def hold(self) -> None:
        """Keeps everybody off before a fork, so that the child finds no half-started guard."""
        self._lock.acquire()

    def release(self) -> None:
        """Lets the parent go on after a fork."""
        self._lock.release()

    def forget(self) -> None:
        """Lets a forked child start anew: the guard watches over its parent, and must see the end of the pipe with its end."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        self._executions = {}
        if process is not None and process.stdin is not None:
            process.stdin.close()
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
            # What it takes to start Python, and no cookie: an execution around ours must not find the guard in its tree.
            env={name: os.environ[name] for name in _GUARD_VARIABLES if name in os.environ},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )


_guard = _Guard()
os.register_at_fork(before=_guard.hold, after_in_parent=_guard.release, after_in_child=_guard.forget)


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
    pass_fds: Sequence[int] = (),
) -> ProcessResult:
    """Runs a program in a session of its own, and returns when it and everything that it started has ended.

    Its stdin is empty. When ``stop`` is requested, when the timeout passes, and when the program itself has ended, what is left
    of its tree is asked to end, and killed after the grace period; what a program that ended by itself leaves has a second to
    end by itself too, for it may be busy with the output. The same happens when this process dies, by the guard, and when
    ``write`` or an interrupt raises.

    Args:
        argv: The program and its arguments; no shell is involved.
        cwd: Where it runs; None for here.
        env: Its whole environment.
        write: Takes the next bytes of a stream as they come, in one thread; it may block to slow the program down.
        stop: Asks for the end.
        timeout: Seconds that the program may take; None for no limit.
        grace: Seconds between asking and killing; None for the setting.
        merge_streams: Whether stderr goes where stdout goes.
        pass_fds: File descriptors that the program inherits.

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
            pass_fds=pass_fds,
        )
        try:
            _guard.set_group(cookie, process.pid)
            return _Supervision(process, cookie, write, stop, timeout, patience).run()
        except BaseException:
            _end_after_error(process, cookie, patience)
            raise
    finally:
        _guard.remove(cookie)


def _end_after_error(process: subprocess.Popen[bytes], cookie: str, grace: float) -> None:
    """Ends the tree; somebody who interrupts a second time has no more patience."""
    try:
        end_tree(process.pid, cookie, grace)
    except BaseException:
        end_tree(process.pid, cookie, 0)
        raise
    finally:
        process.wait()


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

    def _end_tree(self, patience: float = 0.0) -> None:
        """Ends the tree in a thread of its own: the reader goes on, and may be held up by whoever takes the output."""

        def end() -> None:
            end_tree(self._process.pid, self._cookie, self._grace, patience)
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
            allowance = _DRAIN_BYTES
            pace = _Pace()
            while open_streams or not self._exited:
                remaining = None if give_up is None else max(0.0, give_up - time.monotonic())
                events = selector.select(remaining)
                if not events or (remaining == 0.0 and allowance <= 0):
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
                        allowance -= len(data) if give_up is not None else 0
                        if data:
                            self._write(key.data, data)
                            pace.took(len(data))
                        else:
                            selector.unregister(key.fileobj)
                            open_streams -= 1

    def _leader_exited(self) -> None:
        # It is waited for only when its tree has ended: until then nobody else can be given its number, which is the group's.
        with self._lock:
            self._exited = True
            patience = _LEAVE_SECONDS if self._ending == "exited" else 0.0
        self._end_tree(patience)

    def _register_exit(self, selector: selectors.BaseSelector, stack: contextlib.ExitStack) -> None:
        """Lets the selector wake when the leader exits."""
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
