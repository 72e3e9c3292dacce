"""A project's files as an archive."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Collection
from pathlib import Path

import pytest

from prefect_mlprojects.backends.containers import archive as archive_module
from prefect_mlprojects.backends.containers.archive import (
    ProjectFile,
    content_digest,
    iterate_archive,
    project_files,
)
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.sources.base import SourceKind, WorkingCopy


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name in ("MLproject", "train.py", "data/a.csv", ".git/HEAD", "mlruns/0/meta.yaml", "sub/__pycache__/x.pyc"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o775)
    (folder / "link").symlink_to("train.py")
    os.mkfifo(folder / "pipe")
    return folder


def files_of(folder: Path, kind: SourceKind = "local", mounted: Collection[str] = ()) -> tuple[ProjectFile, ...]:
    return project_files(WorkingCopy(folder, str(folder), kind, str(folder)), mounted=mounted)


def names(folder: Path) -> list[str]:
    return [file.name for file in files_of(folder)]


def unpack(files: tuple[ProjectFile, ...], folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(b"".join(iterate_archive(files)))) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_project_files_exclude_caches_and_stores(project: Path) -> None:
    assert names(project) == ["MLproject", "data", "data/a.csv", "link", "run.sh", "sub", "train.py"]


def test_project_files_dockerignore_takes_precedence(project: Path) -> None:
    (project / ".dockerignore").write_text("# data stays here\ndata\n!mlruns\n")
    assert "data/a.csv" not in names(project)
    assert "mlruns/0/meta.yaml" in names(project)


def test_archive_and_digest_are_reproducible(project: Path) -> None:
    def archive() -> bytes:
        return b"".join(iterate_archive(files_of(project), compressed=True, extra={"Dockerfile": b"FROM a"}))

    first, digest = archive(), content_digest(files_of(project))
    os.utime(project / "train.py", (1, 1))
    (project / "train.py").chmod(0o600)
    assert archive() == first
    assert content_digest(files_of(project)) == digest
    (project / "train.py").write_text("other")
    assert archive() != first
    assert content_digest(files_of(project)) != digest


def test_digest_includes_links_modes_and_extra_files(project: Path) -> None:
    digests = {content_digest(files_of(project))}
    (project / "link").unlink()
    (project / "link").symlink_to("run.sh")
    digests.add(content_digest(files_of(project)))
    (project / "train.py").chmod(0o755)
    digests.add(content_digest(files_of(project)))
    digests.add(content_digest(files_of(project), {"Dockerfile": b"FROM a"}))
    assert len(digests) == 4


def test_archive_unpacks_to_the_same_files(project: Path, tmp_path: Path) -> None:
    data = b"".join(iterate_archive(files_of(project), prefix="/code/", extra={"train.py": b"replaced"}, owner=(5, 6)))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {member.name: member for member in archive}
        assert (members["code/run.sh"].mode, members["code/run.sh"].uid, members["code/run.sh"].gid) == (0o755, 5, 6)
        assert members["code/link"].linkname == "train.py"
        archive.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out/code/train.py").read_text() == "replaced"
    assert (tmp_path / "out/code/data/a.csv").read_text() == "data/a.csv"


def test_archive_missing_file_is_named(project: Path) -> None:
    files = files_of(project)
    (project / "train.py").unlink()
    with pytest.raises(BackendError, match=r"train\.py can't be read: No such file"):
        list(iterate_archive(files))
    with pytest.raises(BackendError, match=r"train\.py can't be read"):
        content_digest(files)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder outside the project, with links within it, to another folder, and back."""
    folder, other = tmp_path / "outside", tmp_path / "other"
    for name, text in {
        "outside/a.csv": "1,2",
        "outside/deep/b.csv": "3,4",
        "outside/mlruns/x": "",
        "other/c": "c",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (folder / "same").symlink_to("deep/b.csv")
    (folder / "more").symlink_to(other)
    (other / "back").symlink_to(folder / "deep")
    return folder


def test_links_out_of_the_project_are_followed_and_cycles_end(project: Path, outside: Path, tmp_path: Path) -> None:
    (project / "data" / "raw").symlink_to(outside)
    (project / "one.csv").symlink_to("../outside/a.csv")
    (project / "absolute").symlink_to(project / "data" / "a.csv")
    (project / "up").symlink_to(tmp_path)
    out = unpack(files_of(project), tmp_path / "unpacked")

    assert not (out / "one.csv").is_symlink()
    assert (out / "one.csv").read_text() == (out / "data/raw/a.csv").read_text() == "1,2"
    assert (out / "data/raw/same").read_text() == (out / "data/raw/more/back/b.csv").read_text() == "3,4"
    assert (out / "data/raw/same").readlink() == Path("deep/b.csv")
    assert (out / "data/raw/more/back").is_symlink()
    assert (out / "absolute").readlink() == Path("data/a.csv")
    assert not (out / "data/raw/mlruns").exists()
    # A folder that holds the project is followed once.
    assert (out / "up/project/up").is_symlink()
    assert content_digest(files_of(project))


@pytest.mark.parametrize("target", ["/nowhere/x", "/dev/null", "itself", "user@host.123", "/mounted/x"])
def test_links_that_lead_to_no_file_here_are_kept(target: str, project: Path) -> None:
    (project / "itself").symlink_to(target)
    (file,) = [each for each in files_of(project, mounted=["/mounted"]) if each.name == "itself"]
    assert file.target == target


def test_links_to_mounted_folders_are_kept(project: Path, outside: Path) -> None:
    (project / "raw").symlink_to(outside)
    files = {file.name: file.target for file in files_of(project, mounted=[str(outside.parent)])}
    assert files["raw"] == str(outside)
    assert "raw/a.csv" not in files


def test_links_of_a_fetched_project_are_not_followed(
    project: Path, outside: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (project / "raw").symlink_to(outside)
    files = {file.name: file.target for file in files_of(project, "git")}
    assert files["raw"] == str(outside)
    assert f"not followed: raw -> {outside}" in caplog.text
    # Other files of the same clone are its authors' own.
    (project / ".git").rename(outside.parent / ".git")
    assert "raw/a.csv" in {file.name for file in files_of(project, "git")}


def test_followed_links_have_a_size_limit(project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "FOLLOWED_LIMIT", 1 << 20)
    (project / "data" / "raw").symlink_to(outside)
    (outside / "deep" / "large").write_bytes(bytes(1 << 20))
    with pytest.raises(BackendError, match=r"'data/raw' leads out of the project, to .*outside: .*exceed 1 MiB"):
        files_of(project)
    (project / ".dockerignore").write_text("data/raw/deep/large\n")
    assert "data/raw/deep/b.csv" in names(project)
