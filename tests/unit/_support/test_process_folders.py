"""Private folders where the cache can't be written, or somebody else was there first."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from prefect_mlprojects._support.process_folders import private_folder, sweep_private_folders

CHILD = """
import os, signal
from prefect_mlprojects._support.process_folders import create_private_folder
(create_private_folder() / "key").write_text("secret")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder; the cache's place is taken by a file."""
    (tmp_path / "cache").touch()
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_keys_of_a_killed_process_are_swept_in_the_temporary_folder_too(temporary: Path) -> None:
    subprocess.run([sys.executable, "-c", CHILD], check=False)
    (key,) = temporary.rglob("key")
    with private_folder() as kept:
        assert not key.exists()
        assert kept.is_relative_to(temporary)
        sweep_private_folders()
        assert kept.is_dir()
        assert {each.stat().st_mode & 0o077 for each in (kept, kept.parent)} == {0}
    assert not kept.exists()


def test_folder_of_somebody_else_is_not_used(temporary: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    (temporary / f"mlprojects-private-{os.geteuid()}").symlink_to(planted)
    with private_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0
        assert not any(planted.iterdir())
    (planted / "run-1.lock").touch()
    sweep_private_folders()
    assert (planted / "run-1.lock").exists()
    assert not folder.exists()
