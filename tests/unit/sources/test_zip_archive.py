"""Zip archives, good and hostile."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

import pytest

from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.sources.zip_archive import unpack
from prefect_mlprojects.types import StopSignal


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_zip(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return path


def with_member(path: Path, info: zipfile.ZipInfo, content: str = "x") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MLproject", "name: x")
        archive.writestr(info, content)
    return path


def refused(file: Path, words: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(FetchError, match=words):
        unpack(file, target, "x.zip", StopSignal())
    assert list(target.rglob("*")) == []


def test_archive_is_unpacked_on_fetch_and_deleted_on_remove(tmp_path: Path, cache: Path) -> None:
    file = make_zip(tmp_path / "p.zip", MLproject="name: x", sub__MLproject="name: y")
    source = detect_source(f"{file}#sub")
    copy = source.fetch(StopSignal(), lambda _: None)

    assert (copy.kind, copy.source_name, copy.temporary) == ("zip", f"{file}#sub", True)
    assert (copy.directory / "MLproject").read_text() == "name: y"
    source.remove(copy)
    source.remove(copy)
    assert list((cache / "working-copies").iterdir()) == []


def test_working_copy_with_keep_setting_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_MLPROJECTS_KEEP_WORKING_COPIES", "yes")
    source = detect_source(str(make_zip(tmp_path / "p.zip", MLproject="name: x")))
    copy = source.fetch(StopSignal(), lambda _: None)
    source.remove(copy)
    detect_source(str(tmp_path / "p.zip")).fetch(StopSignal(), lambda _: None)

    assert (copy.directory / "MLproject").is_file()


def test_single_folder_of_archive_becomes_project(tmp_path: Path) -> None:
    file = make_zip(tmp_path / "p.zip", **{"repo-main__MLproject": "name: x", "repo-main__sub__a": ""})
    copy = detect_source(str(file)).fetch(StopSignal(), lambda _: None)

    assert copy.directory.name == "repo-main"


def test_executable_modes_are_kept(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("run.sh")
    info.external_attr = (stat.S_IFREG | 0o755) << 16
    copy = detect_source(str(with_member(tmp_path / "p.zip", info))).fetch(StopSignal(), lambda _: None)

    assert os.access(copy.directory / "run.sh", os.X_OK)
    assert not os.access(copy.directory / "MLproject", os.X_OK)


@pytest.mark.parametrize("name", ["/etc/passwd", "../out", "a/../../out", "a\\..\\out", "..\\out"])
def test_member_outside_target_folder_is_rejected(name: str, tmp_path: Path) -> None:
    refused(with_member(tmp_path / "p.zip", zipfile.ZipInfo(name)), "would be written outside", tmp_path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_special_files_are_refused(kind: int, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (kind | 0o777) << 16
    refused(with_member(tmp_path / "p.zip", info, "/etc/passwd"), "is a link or a special file", tmp_path)


def test_zip_bomb_is_rejected_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_MLPROJECTS_MAX_ZIP_BYTES", "100000")
    refused(make_zip(tmp_path / "p.zip", a="0" * 200_000), "200,000 bytes, and 100,000 are allowed", tmp_path)


def test_archive_with_wrong_sizes_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_zip(tmp_path / "p.zip", a="0" * 200_000)
    data = file.read_bytes()
    file.write_bytes(data.replace((200_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(FetchError, match="no zip archive that can be unpacked"):
        unpack(file, target, "x.zip", StopSignal())


@pytest.mark.parametrize("size", [0, 10, 60, -30])
def test_truncated_archive_is_rejected(size: int, tmp_path: Path) -> None:
    file = make_zip(tmp_path / "p.zip", MLproject="name: x" * 100)
    file.write_bytes(file.read_bytes()[:size])
    refused(file, "no zip archive", tmp_path)


def test_rejected_archive_leaves_no_files(tmp_path: Path, cache: Path) -> None:
    file = make_zip(tmp_path / "p.zip", MLproject="name: x")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(FetchError):
        detect_source(str(file)).fetch(StopSignal(), lambda _: None)

    assert list((cache / "working-copies").iterdir()) == []


def test_missing_subdirectory_error_suggests_nearest_name(tmp_path: Path) -> None:
    file = make_zip(tmp_path / "p.zip", sub__MLproject="name: x", other="")
    with pytest.raises(FetchError, match=r"'sbu'.*does not exist.*Did you mean"):
        detect_source(f"{file}#sbu").fetch(StopSignal(), lambda _: None)


def test_working_copies_of_dead_processes_are_removed(tmp_path: Path, cache: Path) -> None:
    dead = cache / "working-copies" / "run-dead"
    (dead / "project" / "read-only").mkdir(parents=True)
    (dead / "project" / "read-only" / "file").touch()
    (dead / "project" / "read-only").chmod(0o500)
    dead.with_name("run-dead.lock").touch()
    source = detect_source(str(make_zip(tmp_path / "p.zip", MLproject="name: x")))
    copy = source.fetch(StopSignal(), lambda _: None)
    source.fetch(StopSignal(), lambda _: None)

    assert not dead.exists()
    assert copy.directory.exists()
