from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.services.git import git

from prefect_mlprojects.sources.git.facts import GitFacts, read_git_facts


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "projects" / "one").mkdir(parents=True)
    (folder / "projects" / "one" / "main.py").write_text("print(1)\n")
    git(folder, "init", "-q", "-b", "trunk")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def read(folder: Path) -> GitFacts | None:
    lines: list[str] = []
    facts = read_git_facts(folder, lines.append)
    assert lines == []
    return facts


def test_folder_outside_git_has_no_facts(tmp_path: Path) -> None:
    assert read(tmp_path) is None


def test_root_of_clean_repository_has_url_commit_and_branch(repository: Path) -> None:
    assert read(repository) == GitFacts(f"file://{repository}", git(repository, "rev-parse", "HEAD"), "trunk")


def test_subfolder_of_repository_has_url_with_fragment(repository: Path) -> None:
    facts = read(repository / "projects" / "one")

    assert facts == GitFacts(f"file://{repository}#projects/one", git(repository, "rev-parse", "HEAD"), "trunk")


def test_changed_and_staged_files_make_it_dirty_and_new_ones_do_not(repository: Path) -> None:
    (repository / "mlflow.db").touch()
    clean = read(repository)
    assert clean is not None
    assert not clean.dirty

    (repository / "projects" / "one" / "main.py").write_text("print(2)\n")
    changed = read(repository)
    assert changed is not None
    assert changed.dirty

    git(repository, "add", ".")
    staged = read(repository)
    assert staged is not None
    assert staged.dirty


def test_detached_head_has_commit_and_no_branch(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "checkout", "-q", "--detach")

    facts = read(repository)

    assert facts is not None
    assert (facts.commit, facts.branch) == (commit, None)


def test_branch_name_with_slash_is_read(repository: Path) -> None:
    git(repository, "checkout", "-q", "-b", "feature/a b".replace(" ", "-"))

    facts = read(repository)

    assert facts is not None
    assert facts.branch == "feature/a-b"


def test_repository_without_commits_has_branch_only(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "trunk")

    assert read(tmp_path) == GitFacts(f"file://{tmp_path}", None, "trunk")


def test_packed_refs_are_read(repository: Path) -> None:
    git(repository, "pack-refs", "--all")
    assert not (repository / ".git" / "refs" / "heads" / "trunk").exists()

    facts = read(repository)

    assert facts is not None
    assert facts.commit == git(repository, "rev-parse", "HEAD")


def test_worktree_has_separate_commit_and_root(repository: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    git(repository, "worktree", "add", "-q", "-b", "other", str(tree))
    (tree / "new.txt").touch()
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "second")

    assert read(tree / "projects") == GitFacts(f"file://{tree}#projects", git(tree, "rev-parse", "HEAD"), "other")


def test_first_remote_url_is_read_without_credentials(repository: Path) -> None:
    git(repository, "remote", "add", "zeta", "https://me:hunter2@example.com/o/zeta.git")
    git(repository, "remote", "add", "alpha", "https://example.com/o/alpha.git")

    facts = read(repository)

    assert facts is not None
    assert facts.repository_url == "https://example.com/o/zeta.git"


def test_ignored_folder_has_no_commit(repository: Path) -> None:
    (repository / ".gitignore").write_text("scratch/\n")
    (repository / "scratch").mkdir()

    facts = read(repository / "scratch")

    assert facts is not None
    assert facts.commit is None


def test_git_variables_of_another_repository_are_ignored(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q", "-b", "elsewhere")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))

    facts = read(repository)

    assert facts is not None
    assert facts.branch == "trunk"


def test_reading_leaves_the_index_alone(repository: Path) -> None:
    index = repository / ".git" / "index"
    # A file that was touched makes `git status` refresh the index, if it may.
    os.utime(repository / "projects" / "one" / "main.py", (1, 1))
    before = index.read_bytes()

    read(repository)

    assert index.read_bytes() == before


def test_empty_dot_git_folder_is_not_a_repository(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()

    assert read(tmp_path) is None


def test_missing_git_executable_is_reported(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    lines: list[str] = []

    facts = read_git_facts(repository, lines.append)

    assert facts == GitFacts(f"file://{repository}")
    assert len(lines) == 1
    assert "the program git was not found" in lines[0]


def test_repository_of_another_user_is_reported_and_has_no_commit(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    # Git's own way to be tested for this without being root.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    lines: list[str] = []

    facts = read_git_facts(repository, lines.append)

    assert facts == GitFacts(f"file://{repository}")
    assert len(lines) == 1
    assert "dubious ownership" in lines[0]
    assert lines[0].endswith(f"run `git config --global --add safe.directory {repository}`.")


def test_broken_repository_has_no_commit_and_is_reported(repository: Path) -> None:
    (repository / ".git" / "HEAD").write_text("nonsense\n")
    lines: list[str] = []

    facts = read_git_facts(repository, lines.append)

    # Git itself takes a repository without a valid HEAD for no repository.
    assert facts is None
    (repository / ".git" / "HEAD").write_text("ref: refs/heads/trunk\n")
    (repository / ".git" / "index").write_bytes(b"nonsense")
    assert read_git_facts(repository, lines.append) == GitFacts(f"file://{repository}")
    assert "recorded without its commit" in lines[-1]
