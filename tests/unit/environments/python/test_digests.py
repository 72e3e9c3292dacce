from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects.environments.python.files import digest_file, digest_listing, digest_package, digest_text


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_where_a_text_ends_counts() -> None:
    assert digest_text(["ab", "c"]) != digest_text(["a", "bc"])
    assert digest_text([]) != digest_text([""])


@pytest.mark.parametrize(
    "path",
    [
        "setup.py",
        "pyproject.toml",
        "src/pkg/code.py",
        "src/native.c",
        "pkg/data/table.csv",
        "pkg/env/code.py",
        "pkg/build/x.json",
    ],
)
def test_source_file_changes_package_digest(tmp_path: Path, path: str) -> None:
    write(tmp_path / "pkg/__init__.py")
    before = digest_package(tmp_path)
    file = write(tmp_path / path, "first")
    added = digest_package(tmp_path)
    file.write_text("other")
    assert len({before, added, digest_package(tmp_path)}) == 3


@pytest.mark.parametrize(
    "path",
    [
        "results/metrics.csv",
        "model.pkl",
        "mlflow.db",
        "mlruns/0/code.py",
        "pkg/__pycache__/x.cpython-311.pyc",
        "build/lib/pkg.py",
        "dist/pkg.py",
        "pkg.egg-info/SOURCES.in",
        ".git/hooks/x.py",
        "myenv/lib/code.py",
    ],
)
def test_generated_file_does_not_change_package_digest(tmp_path: Path, path: str) -> None:
    write(tmp_path / "pkg/__init__.py")
    write(tmp_path / "myenv/pyvenv.cfg")
    before = digest_package(tmp_path)
    write(tmp_path / path)
    assert digest_package(tmp_path) == before


def test_large_file_digest_uses_size_and_mtime(tmp_path: Path) -> None:
    large = tmp_path / "large.whl"
    with large.open("wb") as file:
        file.truncate(17 * 1024 * 1024)
    before = digest_file(large)
    assert "@" in before
    with large.open("ab") as file:
        file.write(b"x")
    assert digest_file(large) != before


def test_missing_files_have_a_digest_too(tmp_path: Path) -> None:
    assert digest_file(tmp_path / "none") == "unreadable"
    assert digest_listing(tmp_path / "none") == digest_listing(tmp_path)
