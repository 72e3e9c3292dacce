from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from prefect_mlprojects.environments.cache import EnvironmentCache, EnvironmentRecord, release_pin
from prefect_mlprojects.environments.managers import (
    CachedEnvironment,
    find_environment,
    list_environments,
    prune_environments,
    select_environments,
)
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

DAY = 86_400.0


def environment(
    key: str, *, created: float = 0, used: float = 0, size: int = 10, in_use: bool = False
) -> CachedEnvironment:
    return CachedEnvironment(
        key, "uv", "uv", "demo", "3.11.7", Path("/c") / key, created, used, size, in_use, complete=True
    )


NEW = environment("new", created=9 * DAY, used=9 * DAY, size=30)
OLD = environment("old", created=1 * DAY, used=8 * DAY, size=20)
IDLE = environment("idle", created=5 * DAY, used=6 * DAY, size=10)
BUSY = environment("busy", created=2 * DAY, used=2 * DAY, size=40, in_use=True)
ALL = (NEW, OLD, IDLE, BUSY)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, []),
        ({"everything": True}, ["busy", "idle", "old", "new"]),
        ({"older_than": timedelta(days=6)}, ["busy", "old"]),
        ({"unused": timedelta(days=3)}, ["idle"]),
        ({"unused": timedelta(days=30)}, []),
        ({"max_size": 1000}, []),
        ({"max_size": 90}, ["idle"]),
        ({"max_size": 75}, ["idle", "old"]),
        ({"max_size": 0}, ["idle", "old", "new"]),
        ({"unused": timedelta(days=3), "max_size": 85}, ["idle", "old"]),
    ],
)
def test_prune_criteria_select_matching_environments(arguments: dict[str, object], expected: list[str]) -> None:
    chosen = select_environments(ALL, 10 * DAY, **arguments)  # type: ignore[arg-type]  # a table of keyword arguments
    assert [found.key for found in chosen] == expected


def test_incomplete_environment_is_always_selected() -> None:
    assert select_environments([replace(NEW, complete=False)], 10 * DAY) == (replace(NEW, complete=False),)


def make(root: Path, key: str, used: float) -> None:
    cache = EnvironmentCache(root)
    with cache.lock(key, "uv", lambda line: None, StopSignal()):
        location = cache.begin(key)
        (location / "bin").mkdir(parents=True)
        (location / "bin" / "python").symlink_to(sys.executable)
        cache.complete(EnvironmentRecord(key, 1, "uv", f"uv for {key}", "3.11.7", used, 0, "demo"))
    os.utime(root / "environments" / key / "used", (used, used))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    release_pin("here")


def test_empty_cache_lists_nothing_and_is_not_created(root: Path) -> None:
    assert list_environments() == ()
    assert prune_environments(everything=True).removed == ()
    assert not root.exists()


def test_environments_are_listed_latest_use_first(root: Path) -> None:
    make(root, "aa" * 16, 1000.0)
    make(root, "bb" * 16, 2000.0)
    (root / "environments" / ("cc" * 16) / "1").mkdir(parents=True)
    listed = list_environments()
    assert [(found.key[:2], found.last_used, found.complete) for found in listed] == [
        ("bb", 2000.0, True),
        ("aa", 1000.0, True),
        ("cc", 0.0, False),
    ]
    assert listed[0].location == root / "environments" / ("bb" * 16) / "1"
    assert (listed[0].project, listed[0].description) == ("demo", f"uv for {'bb' * 16}")


def test_pruning_removes_what_was_chosen_and_keeps_what_is_in_use(root: Path) -> None:
    make(root, "aa" * 16, 1000.0)
    make(root, "bb" * 16, 1000.0)
    (root / "environments" / ("cc" * 16) / "1").mkdir(parents=True)
    (root / "environments" / ".removed-1" / "x").mkdir(parents=True)
    assert EnvironmentCache(root).use("aa" * 16, "here") is not None

    dry = prune_environments(everything=True, dry_run=True)
    assert ({found.key[:2] for found in dry.removed}, [found.key[:2] for found in dry.kept]) == ({"bb", "cc"}, ["aa"])
    assert len(list_environments()) == 3

    result = prune_environments(everything=True)
    assert (result.removed, result.kept) == (dry.removed, dry.kept)
    assert [found.key[:2] for found in list_environments()] == ["aa"]
    assert not (root / "environments" / ".removed-1").exists()
    assert not EnvironmentCache(root).remove("aa" * 16)
    release_pin("here")
    assert EnvironmentCache(root).remove("aa" * 16)


def test_write_protected_folders_go_too(root: Path) -> None:
    make(root, "aa" * 16, 1000.0)
    locked = root / "environments" / ("aa" * 16) / "1" / "locked"
    (locked / "inner").mkdir(parents=True)
    (locked / "inner" / "file").touch()
    (locked / "inner").chmod(0o500)
    locked.chmod(0o500)
    assert [found.key for found in prune_environments(everything=True).removed] == ["aa" * 16]
    assert [entry.name for entry in (root / "environments").iterdir()] == [".locks"]


def test_environment_is_found_by_unique_key_prefix(root: Path) -> None:
    make(root, "ab" * 16, 1000.0)
    make(root, "ac" * 16, 1000.0)
    assert find_environment("ab").key == "ab" * 16
    for prefix, words in (("a", "2 environments"), ("x", "no environment"), ("", "no environment")):
        with pytest.raises(EnvironmentBuildError, match=words):
            find_environment(prefix)


def test_environment_record_is_plain_json(root: Path) -> None:
    make(root, "ab" * 16, 1000.0)
    data = json.loads((root / "environments" / ("ab" * 16) / "environment.json").read_text())
    assert (data["format"], data["build"], data["manager"]) == (1, 1, "uv")
