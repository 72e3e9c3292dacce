"""Locks: exclusion, release by the process's end, waiting."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefect_mlprojects._support.locks import LockStoppedError, LockTimeoutError, hold_lock, try_lock
from prefect_mlprojects.types import StopSignal


@pytest.mark.parametrize(
    ("first_shared", "second_shared", "free"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
def test_lock_is_compatible_only_when_both_are_shared(
    first_shared: bool, second_shared: bool, free: bool, tmp_path: Path
) -> None:
    first = try_lock(tmp_path / "lock", shared=first_shared)
    assert first is not None
    second = try_lock(tmp_path / "lock", shared=second_shared)
    assert (second is not None) is free
    if second is not None:
        second.release()
    first.release()
    first.release()
    third = try_lock(tmp_path / "lock")
    assert third is not None
    third.release()


def test_without_create_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        try_lock(tmp_path / "lock", create=False)
    assert not (tmp_path / "lock").exists()


def test_read_only_file_is_lockable(tmp_path: Path) -> None:
    (tmp_path / "lock").touch(mode=0o444)
    lock = try_lock(tmp_path / "lock", shared=True)
    assert lock is not None
    lock.release()


HOLDER = """
import sys, time
from pathlib import Path
from prefect_mlprojects._support.locks import try_lock
lock = try_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(1000)
"""


def test_lock_of_killed_process_is_released(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        waits: list[str] = []
        threading.Timer(0.5, holder.kill).start()
        with hold_lock(file, on_wait=lambda: waits.append("waiting"), timeout=60):
            assert holder.wait() != 0
        assert waits == ["waiting"]


def test_waiting_ends_on_time_out_and_stop_request(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lock"
    stop = StopSignal()
    with hold_lock(file):
        with pytest.raises(LockTimeoutError), hold_lock(file, timeout=0.1):
            pytest.fail("the lock was given twice")
        threading.Timer(0.2, stop.request, ["enough"]).start()
        started = time.monotonic()
        with pytest.raises(LockStoppedError), hold_lock(file, stop):
            pytest.fail("the lock was given twice")
        assert time.monotonic() - started < 30
    with hold_lock(file, stop):
        pass
