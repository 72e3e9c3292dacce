"""Atomic replacement and removal of files and folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prefect_mlprojects._support.files import remove_tree, replacing, temporary_pattern, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replacing_on_success_replaces_file(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file"
    write_atomically(target, "old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary in target.parent.glob(temporary_pattern(target))
    assert target.read_text() == "new"
    assert names(target.parent) == ["file"]


@pytest.mark.parametrize("make", [lambda path: path.write_text("new"), lambda path: path.mkdir(), lambda path: None])
def test_replacing_on_error_keeps_old_file_and_removes_temporary(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as temporary:
            make(temporary)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_replacing_folder_is_atomic(tmp_path: Path) -> None:
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
        assert not (tmp_path / "folder").exists()
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["file"]


def test_without_overwrite_a_file_created_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with replacing(target, overwrite=False) as temporary:
        temporary.write_text("ours")
        target.write_text("theirs")
    assert target.read_text() == "theirs"
    with replacing(tmp_path / "other", overwrite=False) as temporary:
        temporary.write_text("ours")
    assert (tmp_path / "other").read_text() == "ours"
    assert names(tmp_path) == ["file", "other"]


def test_remove_tree_removes_write_protected_folder(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    inner.chmod(0o500)
    assert remove_tree(tmp_path / "outer")
    assert remove_tree(tmp_path / "outer")
