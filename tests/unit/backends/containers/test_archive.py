"""A project's files as an archive."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from prefect_mlprojects.backends.containers.archive import content_digest, iterate_archive, project_files, write_archive
from prefect_mlprojects.exceptions import BackendError


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


def names(folder: Path) -> list[str]:
    return [file.name for file in project_files(folder)]


def test_what_is_no_code_is_left_out(project: Path) -> None:
    assert names(project) == ["MLproject", "data", "data/a.csv", "link", "run.sh", "sub", "train.py"]


def test_the_projects_own_patterns_have_the_last_word(project: Path) -> None:
    (project / ".dockerignore").write_text("# data stays here\ndata\n!mlruns\n")
    assert "data/a.csv" not in names(project)
    assert "mlruns/0/meta.yaml" in names(project)


def test_the_same_files_give_the_same_bytes(project: Path) -> None:
    def archive() -> bytes:
        target = io.BytesIO()
        write_archive(target, project_files(project), compressed=True, extra={"Dockerfile": b"FROM a"})
        return target.getvalue()

    first, digest = archive(), content_digest(project_files(project))
    os.utime(project / "train.py", (1, 1))
    (project / "train.py").chmod(0o600)
    assert archive() == first
    assert content_digest(project_files(project)) == digest
    (project / "train.py").write_text("other")
    assert archive() != first
    assert content_digest(project_files(project)) != digest


def test_the_digest_knows_links_modes_and_extra_files(project: Path) -> None:
    digests = {content_digest(project_files(project))}
    (project / "link").unlink()
    (project / "link").symlink_to("run.sh")
    digests.add(content_digest(project_files(project)))
    (project / "train.py").chmod(0o755)
    digests.add(content_digest(project_files(project)))
    digests.add(content_digest(project_files(project), {"Dockerfile": b"FROM a"}))
    assert len(digests) == 4


def test_an_archive_is_unpacked_as_it_was(project: Path, tmp_path: Path) -> None:
    data = b"".join(
        iterate_archive(project_files(project), prefix="/code/", extra={"train.py": b"replaced"}, owner=(5, 6))
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {member.name: member for member in archive}
        assert (members["code/run.sh"].mode, members["code/run.sh"].uid, members["code/run.sh"].gid) == (0o755, 5, 6)
        assert members["code/link"].linkname == "train.py"
        archive.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out/code/train.py").read_text() == "replaced"
    assert (tmp_path / "out/code/data/a.csv").read_text() == "data/a.csv"


def test_a_file_that_vanished_is_named(project: Path) -> None:
    files = project_files(project)
    (project / "train.py").unlink()
    with pytest.raises(BackendError, match=r"train\.py can't be read: No such file"):
        list(iterate_archive(files))
    with pytest.raises(BackendError, match=r"train\.py can't be read"):
        content_digest(files)
