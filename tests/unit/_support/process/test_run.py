"""Processes: output, exit, and the end of their process trees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.services.waiting import is_alive, wait_for

from prefect_mlprojects._support.process.run import ProcessResult, run_process, run_tool
from prefect_mlprojects._support.process.tree import parse_ps
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


def test_output_and_exit_code_are_returned() -> None:
    recorder = Recorder()
    assert bash("printf 'a\\xff'; echo b >&2; exit 3", recorder) == ProcessResult("exited", 3)
    assert (recorder.text("stdout"), recorder.text("stderr")) == (b"a\xff", b"b\n")


def test_signal_becomes_negative_exit_code() -> None:
    assert bash("kill -9 $$") == ProcessResult("exited", -9)


def test_stdin_is_empty() -> None:
    recorder = Recorder()
    bash("cat; echo done", recorder)
    assert recorder.text("stdout") == b"done\n"


def test_long_output_without_newline_is_complete() -> None:
    recorder = Recorder()
    bash("head -c 3000000 /dev/zero | tr '\\0' x", recorder)
    assert recorder.text("stdout") == b"x" * 3_000_000


def test_remaining_processes_are_ended_and_their_output_is_kept() -> None:
    recorder = Recorder()
    result = bash("(sleep 1000; echo never) & echo $!; setsid sleep 1000 & echo $!; exit 0", recorder)
    assert result == ProcessResult("exited", 0)
    left = [int(line) for line in recorder.text("stdout").split()]
    assert len(left) == 2
    assert not any(is_alive(pid) for pid in left)


@pytest.mark.parametrize(
    ("command", "lines"),
    [("exec > >(sort); seq 20000; exit 3", 20000), ("exec > >(sleep 0.3; cat); seq 100; exit 3", 100)],
)
def test_remaining_processes_can_finish_their_output(command: str, lines: int) -> None:
    recorder = Recorder()
    assert bash(command, recorder) == ProcessResult("exited", 3)
    assert len(recorder.text("stdout").split()) == lines


def test_child_process_keeps_pid_until_its_tree_has_exited() -> None:
    states: list[str] = []
    leader: list[str] = []

    def write(stream: str, data: bytes) -> None:
        words = data.decode().split()
        leader.extend(words[:1])
        if "asked" in words:
            states.append(Path(f"/proc/{leader[0]}/stat").read_text().rsplit(")", 1)[1].split()[0])

    command = """echo $$; (trap 'echo asked; exit' TERM; while :; do sleep 0.05; done) & sleep 0.2; exit 0"""
    result = run_process(["bash", "-c", command], cwd=None, env=dict(os.environ), write=write, grace=20)
    assert result == ProcessResult("exited", 0)
    assert states == ["Z"]


def test_untraceable_process_does_not_block() -> None:
    recorder = Recorder()

    def write(stream: str, data: bytes) -> None:
        # Slower than the writer, so that there is always more to read.
        time.sleep(0.01)
        recorder.write(stream, data)
        assert sum(len(chunk) for _, chunk in recorder.chunks) < 30_000_000

    # Neither of its group nor with its cookie: nobody can tell that it belongs to the tree.
    command = "env -i setsid bash -c 'echo $$; exec yes' & sleep 0.2; exit 5"
    try:
        result = run_process(["bash", "-c", command], cwd=None, env=dict(os.environ), write=write, grace=5)
    finally:
        pid = int(recorder.text("stdout").split(None, 1)[0])
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    assert result == ProcessResult("exited", 5)


def test_consumer_error_kills_process_tree() -> None:
    pids: list[int] = []

    def write(stream: str, data: bytes) -> None:
        pids.extend(int(word) for word in data.split())
        message = "the disk is full"
        raise OSError(message)

    with pytest.raises(OSError, match="the disk is full"):
        run_process(
            ["bash", "-c", "setsid sleep 1000 & echo $! $$; wait"], cwd=None, env=dict(os.environ), write=write, grace=1
        )
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_orphans_in_other_sessions_are_found() -> None:
    recorder = Recorder()
    bash("setsid bash -c 'setsid sleep 1000 & echo $!' ; sleep 0.2", recorder)
    assert not is_alive(int(recorder.text("stdout")))


def test_stop_request_sends_sigterm_then_sigkill_after_grace() -> None:
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


def test_timeout_kills_process_tree() -> None:
    recorder = Recorder()
    result = bash("sleep 1000 & echo $!; wait", recorder, timeout=0.3)
    assert result.ending == "timed-out"
    assert not is_alive(int(recorder.text("stdout")))


def test_stop_request_while_consumer_blocks_stops_process() -> None:
    stop, blocked = StopSignal(), threading.Event()

    def write(stream: str, data: bytes) -> None:
        blocked.wait()

    timer = threading.Timer(0.3, stop.request, ["test"])
    timer.start()
    freed = threading.Timer(1.5, blocked.set)
    freed.start()
    result = run_process(["yes"], cwd=None, env=dict(os.environ), write=write, stop=stop, grace=1)
    assert result.ending == "stopped"


def test_missing_program_raises_os_error() -> None:
    with pytest.raises(OSError, match="no-such-program"):
        run_tool(["no-such-program"], cwd=None, env={}, report=print, stop=None)


def test_tool_reports_its_lines() -> None:
    lines: list[str] = []
    result = run_tool(["sh", "-c", "echo a; echo b >&2; exit 2"], cwd=None, env={}, report=lines.append, stop=None)
    assert (result.exit_code, sorted(lines), sorted(result.output_tail)) == (2, ["a", "b"], ["a", "b"])


def test_concurrent_processes_leave_no_descriptor_or_zombie() -> None:
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
from prefect_mlprojects._support.process.run import run_process
command = "trap '' TERM; setsid sleep 1000 & echo $!; sleep 1000 & echo $!; wait"
def write(stream, data):
    os.write(1, data)
run_process(["bash", "-c", command], cwd=None, env=dict(os.environ), write=write, grace=0.5)
"""


@pytest.mark.parametrize("kill_the_guard_first", [False, True])
def test_kill_9_of_the_owner_ends_the_tree(kill_the_guard_first: bool) -> None:
    code = OWNER
    if kill_the_guard_first:
        # A guard that died is noticed at the next execution, and the new one gets every execution.
        code = OWNER.replace(
            "run_process([",
            "run_process(['true'], cwd=None, env={}, write=write)\n"
            "from prefect_mlprojects._support.process import run\n"
            "run.guard._process.kill(); run.guard._process.wait()\n"
            "run_process([",
        )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(owner.stdout.readline()) for _ in range(2)]
        assert all(is_alive(pid) for pid in pids)
        owner.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "the end of the process tree", 30)


FORKED_OWNER = """
import os, sys, time
from prefect_mlprojects._support.process.run import run_process
def write(stream, data):
    forked = os.fork()
    if forked == 0:
        time.sleep(1000)
    os.write(1, data + b"%d\\n" % forked)
run_process(["bash", "-c", "sleep 1000 & echo $!; wait"], cwd=None, env=dict(os.environ), write=write, grace=0.5)
"""


def test_kill_9_of_an_owner_that_forked_ends_the_tree() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKED_OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid, forked = int(owner.stdout.readline()), int(owner.stdout.readline())
        owner.kill()
    try:
        wait_for(lambda: not is_alive(pid), "the end of the process", 30)
        assert is_alive(forked)
    finally:
        os.kill(forked, signal.SIGKILL)


INTERRUPTED_OWNER = """
import os
from prefect_mlprojects._support.process.run import run_process
command = "trap 'sleep 0.3; echo asked >$NOTE; exit' TERM; setsid sleep 1000 & echo $! $$; wait"
def write(stream, data):
    os.write(1, data)
try:
    run_process(["bash", "-c", command], cwd=None, env=dict(os.environ), write=write, grace=20)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_interrupt_sends_sigterm_before_sigkill(tmp_path: Path) -> None:
    note = tmp_path / "note"
    owner = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_OWNER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NOTE": str(note)},
    )
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    owner.send_signal(signal.SIGINT)
    assert owner.communicate()[0] == "interrupted\n"
    assert note.read_text() == "asked\n"
    assert not any(is_alive(pid) for pid in pids)


WITHOUT_PIDFD = """
import errno, os, threading
def refuse(pid):
    raise OSError(errno.ENOSYS, "Function not implemented")
{change}
from prefect_mlprojects._support.process.run import run_process
from prefect_mlprojects.types import StopSignal
stop = StopSignal()
def run(command, **options):
    result = run_process(["bash", "-c", command], cwd=None, env=dict(os.environ), write=lambda *_: None, **options)
    print(result.ending, result.return_code)
run("exit 3")
run("exec > >(sort); seq 100; exit 4")
run("trap '' TERM; sleep 1000", timeout=0.3, grace=0.3)
"""


@pytest.mark.parametrize("change", ["os.__dict__.pop('pidfd_open', None)", "os.pidfd_open = refuse"])
def test_systems_without_pidfds_are_supported(change: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PIDFD.format(change=change)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["exited 3", "exited 4", "timed-out -9"]


def test_ps_listing_of_macos_is_parsed() -> None:
    listing = (
        "  100   100 Ss   bash -c x HOME=/x PREFECT_MLPROJECTS_EXECUTION_ID=aa/bb PATH=/bin\n"
        "  101   101 S    sleep 9 PREFECT_MLPROJECTS_EXECUTION_ID=aa/bb/cc\n"
        "  102   100 Z    (bash)\n"
        "  103   100 S    sleep 9\n"
        "  104   104 S    other PREFECT_MLPROJECTS_EXECUTION_ID=aa\n"
        "  105   105 S    other bb PREFECT_MLPROJECTS_EXECUTION_ID_2=bb\n"
    )
    assert parse_ps(listing, 100, "bb") == [100, 101, 103]
    assert parse_ps(listing, None, "aa") == [100, 101, 104]


def test_nested_executions_end_with_the_outer_one() -> None:
    inner = (
        "import os; from prefect_mlprojects._support.process.run import run_process; "
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
