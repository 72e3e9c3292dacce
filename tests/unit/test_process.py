"""Processes: their output, their ends, and that nothing is left of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefect_mlprojects._process import ProcessResult, run_process, run_tool
from prefect_mlprojects.types import StopSignal


class Recorder:
    def __init__(self) -> None:
        self.chunks: list[tuple[str, bytes]] = []
        self.arrived = threading.Event()

    def write(self, stream: str, data: bytes) -> None:
        self.chunks.append((stream, data))
        self.arrived.set()

    def text(self, stream: str) -> bytes:
        return b"".join(data for name, data in self.chunks if name == stream)


def bash(
    command: str,
    recorder: Recorder | None = None,
    stop: StopSignal | None = None,
    timeout: float | None = None,
    grace: float = 5.0,
) -> ProcessResult:
    return run_process(
        ["bash", "-c", command],
        cwd=None,
        env=dict(os.environ),
        write=(recorder or Recorder()).write,
        stop=stop,
        timeout=timeout,
        grace=grace,
    )


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in {"Z", "X"}
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_output_and_exit_code() -> None:
    recorder = Recorder()
    assert bash("printf 'a\\xff'; echo b >&2; exit 3", recorder) == ProcessResult("exited", 3)
    assert (recorder.text("stdout"), recorder.text("stderr")) == (b"a\xff", b"b\n")


def test_a_signal_is_a_negative_code() -> None:
    assert bash("kill -9 $$") == ProcessResult("exited", -9)


def test_stdin_is_empty() -> None:
    recorder = Recorder()
    bash("cat; echo done", recorder)
    assert recorder.text("stdout") == b"done\n"


def test_a_megabyte_without_a_newline_arrives_whole() -> None:
    recorder = Recorder()
    bash("head -c 3000000 /dev/zero | tr '\\0' x", recorder)
    assert recorder.text("stdout") == b"x" * 3_000_000


def test_what_the_leader_leaves_ends_with_it_and_its_output_is_kept() -> None:
    recorder = Recorder()
    result = bash("(sleep 1000; echo never) & echo $!; setsid sleep 1000 & echo $!; exit 0", recorder)
    assert result == ProcessResult("exited", 0)
    left = [int(line) for line in recorder.text("stdout").split()]
    assert len(left) == 2
    assert not any(is_alive(pid) for pid in left)


def test_orphans_in_sessions_of_their_own_are_found() -> None:
    recorder = Recorder()
    bash("setsid bash -c 'setsid sleep 1000 & echo $!' ; sleep 0.2", recorder)
    assert not is_alive(int(recorder.text("stdout")))


def test_stop_asks_first_and_kills_after_the_grace_period() -> None:
    for command, expected in (
        ("trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.05; done", 4),
        ("trap '' TERM; echo ready; while :; do sleep 0.05; done", -9),
    ):
        stop, recorder = StopSignal(), Recorder()

        def request(stop: StopSignal = stop, recorder: Recorder = recorder) -> None:
            recorder.arrived.wait()
            stop.request("test")

        thread = threading.Thread(target=request)
        thread.start()
        assert bash(command, recorder, stop, grace=0.5) == ProcessResult("stopped", expected)
        thread.join()


def test_a_timeout_ends_the_tree() -> None:
    recorder = Recorder()
    result = bash("sleep 1000 & echo $!; wait", recorder, timeout=0.3)
    assert result.ending == "timed-out"
    assert not is_alive(int(recorder.text("stdout")))


def test_stop_works_while_the_output_is_held_up() -> None:
    stop, blocked = StopSignal(), threading.Event()

    def write(stream: str, data: bytes) -> None:
        blocked.wait()

    timer = threading.Timer(0.3, stop.request, ["test"])
    timer.start()
    freed = threading.Timer(1.5, blocked.set)
    freed.start()
    result = run_process(["yes"], cwd=None, env=dict(os.environ), write=write, stop=stop, grace=1)
    assert result.ending == "stopped"


def test_a_program_that_does_not_exist() -> None:
    with pytest.raises(OSError, match="no-such-program"):
        run_tool(["no-such-program"], cwd=None, env={}, report=print, stop=None)


def test_a_tool_reports_its_lines() -> None:
    lines: list[str] = []
    result = run_tool(["sh", "-c", "echo a; echo b >&2; exit 2"], cwd=None, env={}, report=lines.append, stop=None)
    assert (result.exit_code, sorted(lines), sorted(result.output_tail)) == (2, ["a", "b"], ["a", "b"])


def test_many_at_once_leave_no_descriptor_and_no_zombie() -> None:
    bash("true")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the count is what matters
    results: list[ProcessResult] = []
    threads = [threading.Thread(target=lambda n=n: results.append(bash(f"echo {n}; exit {n}"))) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.return_code for result in results) == list(range(50))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - as above
    states = subprocess.run(
        ["ps", "-o", "stat=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    assert "Z" not in states.stdout


OWNER = """
import os, sys
from prefect_mlprojects._process import run_process
command = "trap '' TERM; setsid sleep 1000 & echo $!; sleep 1000 & echo $!; wait"
def write(stream, data):
    os.write(1, data)
run_process(["bash", "-c", command], cwd=None, env=dict(os.environ), write=write, grace=0.5)
"""


@pytest.mark.parametrize("kill_the_guard_first", [False, True])
def test_kill_9_of_the_owner_ends_the_tree(kill_the_guard_first: bool) -> None:
    code = OWNER
    if kill_the_guard_first:
        # A guard that died is noticed at the next execution, and the new one is told everything.
        code = OWNER.replace(
            "run_process([",
            "run_process(['true'], cwd=None, env={}, write=write)\n"
            "from prefect_mlprojects import _process\n"
            "_process._guard._process.kill(); _process._guard._process.wait()\n"
            "run_process([",
        )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(owner.stdout.readline()) for _ in range(2)]
    assert all(is_alive(pid) for pid in pids)
    owner.kill()
    owner.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_nested_executions_end_with_the_outer_one() -> None:
    inner = (
        "import os; from prefect_mlprojects._process import run_process; "
        "run_process(['bash', '-c', 'setsid sleep 1000 & echo $!; wait; sleep 1000'], cwd=None, env=dict(os.environ), "
        "write=lambda stream, data: os.write(1, data))"
    )
    stop, recorder = StopSignal(), Recorder()

    def request() -> None:
        recorder.arrived.wait()
        stop.request("test")

    thread = threading.Thread(target=request)
    thread.start()
    result = run_process(
        [sys.executable, "-c", inner], cwd=None, env=dict(os.environ), write=recorder.write, stop=stop, grace=2
    )
    thread.join()
    assert result.ending == "stopped"
    assert not is_alive(int(recorder.text("stdout").split()[0]))
