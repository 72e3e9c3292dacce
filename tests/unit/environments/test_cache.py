from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_mlprojects.environments.cache import EnvironmentCache, EnvironmentRecord, cache_errors, release_pin
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

KEY = "0123456789abcdef0123456789abcdef"


def record(location: Path, key: str = KEY) -> EnvironmentRecord:
    return EnvironmentRecord(key, int(location.name), "uv", "uv, Python 3.11.7", "3.11.7", 1000.0, 0, "demo")


def fill(location: Path) -> None:
    (location / "bin").mkdir(parents=True)
    (location / "bin" / "python").symlink_to(sys.executable)
    (location / "data").write_bytes(b"x" * 10_000)


def build(cache: EnvironmentCache, key: str = KEY) -> EnvironmentRecord:
    with cache.lock(key, "uv", lambda line: None, StopSignal()):
        location = cache.begin(key)
        fill(location)
        return cache.complete(record(location, key))


@pytest.fixture
def cache(tmp_path: Path) -> EnvironmentCache:
    return EnvironmentCache(tmp_path / "cache")


@pytest.fixture
def token() -> Iterator[str]:
    name = f"token-{time.monotonic_ns()}"
    yield name
    release_pin(name)


def test_environment_is_found_only_after_completion(cache: EnvironmentCache) -> None:
    assert cache.find(KEY) is None
    assert cache.next_location(KEY) == cache.folder / KEY / "1"
    with cache.lock(KEY, "uv", lambda line: None, StopSignal()):
        location = cache.begin(KEY)
        fill(location)
        assert cache.find(KEY) is None
        written = cache.complete(record(location))
    found = cache.find(KEY)
    assert found == written
    assert cache.location(written) == location
    assert written.size >= 10_000


def test_environment_with_missing_python_is_not_found(cache: EnvironmentCache, tmp_path: Path) -> None:
    python = cache.location(build(cache)) / "bin" / "python"
    python.unlink()
    python.symlink_to(tmp_path / "uninstalled")
    assert cache.find(KEY) is None
    again = build(cache)
    assert again.build == 2
    assert not (cache.folder / KEY / "1").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 99, "key": "x"}'])
def test_corrupt_record_is_ignored(cache: EnvironmentCache, text: str) -> None:
    build(cache)
    (cache.folder / KEY / "environment.json").write_text(text)
    assert cache.find(KEY) is None


def test_record_under_another_key_is_ignored(cache: EnvironmentCache) -> None:
    build(cache)
    (cache.folder / KEY).rename(cache.folder / ("f" * 32))
    assert cache.find("f" * 32) is None


def test_record_with_unknown_fields_is_ignored(cache: EnvironmentCache) -> None:
    build(cache)
    path = cache.folder / KEY / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new": 1}))
    assert cache.find(KEY) is None


def test_orphan_build_is_removed_and_its_number_not_reused(cache: EnvironmentCache) -> None:
    fill(cache.folder / KEY / "1")
    done = build(cache)
    assert done.build == 2
    assert [entry.name for entry in (cache.folder / KEY).iterdir() if entry.is_dir()] == ["2"]


def test_abandoned_build_leaves_no_files(cache: EnvironmentCache) -> None:
    with cache.lock(KEY, "uv", lambda line: None, StopSignal()):
        location = cache.begin(KEY)
        fill(location)
        cache.abandon(KEY, location)
    assert cache.list_keys() == ()


def test_rebuild_keeps_old_build_while_in_use(cache: EnvironmentCache, token: str) -> None:
    old = build(cache)
    assert cache.use(KEY, token) == old
    new = build(cache)
    assert new.build == old.build + 1
    assert (cache.location(old) / "bin" / "python").exists()
    assert cache.find(KEY) == new
    release_pin(token)
    build(cache)
    assert not cache.location(old).exists()
    assert not cache.location(new).exists()


def test_environment_is_removed_only_after_last_release(cache: EnvironmentCache, token: str) -> None:
    build(cache)
    assert cache.use(KEY, token) is not None
    assert cache.use(KEY, token + "2") is not None
    assert cache.in_use(KEY)
    assert not cache.remove(KEY)
    release_pin(token)
    release_pin(token)
    assert not cache.remove(KEY)
    release_pin(token + "2")
    assert not cache.in_use(KEY)
    assert cache.remove(KEY)
    assert cache.find(KEY) is None
    assert cache.use(KEY, token) is None
    assert cache.list_keys() == ()


def test_environment_removed_during_use_is_not_found(cache: EnvironmentCache, token: str) -> None:
    build(cache)
    found: list[EnvironmentRecord | None] = []
    thread = threading.Thread(target=lambda: found.append(cache.use(KEY, token)))
    with (cache.folder / ".locks" / f"{KEY}.1.use").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a prune does
        thread.start()
        thread.join(0.5)
        assert found == []
        (cache.folder / KEY).rename(cache.folder / ".removed-1")
    thread.join(60)
    assert found == [None]
    assert not cache.in_use(KEY)


USER = """
import sys
from pathlib import Path
from prefect_mlprojects.environments.cache import EnvironmentCache
assert EnvironmentCache(Path(sys.argv[1])).use(sys.argv[2], "other") is not None
print("used", flush=True)
sys.stdin.read()
"""


def test_killed_process_releases_environment(cache: EnvironmentCache) -> None:
    build(cache)
    command = [sys.executable, "-c", USER, str(cache.root), KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "used\n"
        assert cache.in_use(KEY)
        assert not cache.remove(KEY)
        other.kill()
        other.wait()
    assert cache.remove(KEY)


def test_use_is_remembered(cache: EnvironmentCache, token: str) -> None:
    build(cache)
    os.utime(cache.folder / KEY / "used", (5.0, 5.0))
    assert cache.last_used(KEY) == 5.0
    cache.use(KEY, token)
    used = cache.last_used(KEY)
    assert used is not None
    assert used > 1_000_000
    assert cache.last_used("f" * 32) is None


def test_lock_waiter_reports_and_acquires_after_release(cache: EnvironmentCache) -> None:
    order: list[str] = []
    told = threading.Event()

    def report(line: str) -> None:
        order.append(line)
        told.set()

    def second() -> None:
        with cache.lock(KEY, "uv", report, StopSignal()):
            order.append("second")

    with cache.lock(KEY, "uv", report, StopSignal()):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["Waiting for another run of this process, which is building this environment", "first", "second"]


def test_waiting_ends_when_it_is_stopped(cache: EnvironmentCache) -> None:
    stop = StopSignal()
    with (
        cache.lock(KEY, "uv", lambda line: None, StopSignal()),
        pytest.raises(EnvironmentBuildError, match=r"was stopped \(the user said so\)"),
        cache.lock(KEY, "virtualenv", lambda line: stop.request("the user said so"), stop),
    ):
        pytest.fail("the lock was given twice")


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_unwritable_cache_error_names_folder_and_setting(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    cache = EnvironmentCache(tmp_path / where)
    with pytest.raises(EnvironmentBuildError) as caught, cache.lock(KEY, "uv", lambda line: None, StopSignal()):
        pytest.fail("there is no such folder")
    assert str(tmp_path / where) in str(caught.value)
    assert "PREFECT_MLPROJECTS_CACHE_DIR" in str(caught.value)
    assert cache.list_keys() == ()
    assert cache.find(KEY) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_error_suggests_env_prune(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(EnvironmentBuildError, match=r"The disk is full.*mlprojects env prune") as caught,
        cache_errors(tmp_path, "uv"),
    ):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))
    assert caught.value.manager == "uv"
