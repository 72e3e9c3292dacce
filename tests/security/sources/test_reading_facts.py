"""Reading what git knows of a folder runs no program that the folder names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.services.git import git

from prefect_mlprojects.cli import group
from prefect_mlprojects.sources.git.facts import read_git_facts, read_uncommitted_changes
from prefect_mlprojects.types import StopSignal

PROJECT = "name: victim\nentry_points:\n  main: {command: echo hello}\n"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that every planted program creates."""
    return tmp_path / "ran"


@pytest.fixture
def program(tmp_path: Path, marker: Path) -> Path:
    file = tmp_path / "program"
    file.write_text(f"#!/bin/sh\necho $0 $@ >> {marker}\ncat\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout with a changed file, whose other entries look changed to git, too."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "MLproject").write_text(PROJECT)
    (folder / "data.bin").write_text("one\n")
    (folder / ".gitattributes").write_text("* filter=evil diff=evil\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    (folder / "data.bin").write_text("two\n")
    os.utime(folder / "MLproject", (1, 1))
    return folder


def _hook(folder: Path, program: Path) -> None:
    for name in ("post-index-change", "post-checkout", "pre-auto-gc", "reference-transaction", "fsmonitor-watchman"):
        shutil.copy(program, folder / ".git" / "hooks" / name)


def _config(*settings: tuple[str, str]) -> Callable[[Path, Path], None]:
    def plant(folder: Path, program: Path) -> None:
        for key, value in settings:
            git(folder, "config", key, value.replace("PROGRAM", str(program)))

    return plant


def _included(folder: Path, program: Path) -> None:
    (folder / ".git" / "more").write_text(f'[filter "evil"]\n\tclean = {program}\n\trequired = true\n')
    git(folder, "config", "includeIf.onbranch:trunk.path", "more")


def _worktree_config(folder: Path, program: Path) -> None:
    git(folder, "config", "extensions.worktreeConfig", "true")
    git(folder, "config", "--worktree", "filter.evil.clean", str(program))


def _missing_objects(folder: Path, program: Path) -> None:
    """A partial clone whose missing object would be fetched by the repository's own ssh command."""
    blob = git(folder, "rev-parse", "HEAD:data.bin")
    (folder / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    for key, value in (
        ("core.repositoryFormatVersion", "1"),
        ("extensions.partialClone", "origin"),
        ("remote.origin.url", "ssh://host/x"),
        ("remote.origin.promisor", "true"),
        ("remote.origin.uploadpack", str(program)),
        ("core.sshCommand", str(program)),
    ):
        git(folder, "config", key, value)


def _submodule(folder: Path, program: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "file").write_text("one")
    (inner / ".gitattributes").write_text("* filter=evil\n")
    git(inner, "add", "-A")
    git(inner, "commit", "-qm", "x")
    git(folder, "add", "inner")
    git(folder, "commit", "-qm", "with submodule")
    (inner / "file").write_text("two")
    git(inner, "config", "filter.evil.clean", str(program))
    git(inner, "config", "core.fsmonitor", str(program))
    (folder / "data.bin").write_text("three\n")


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "file-system monitor": _config(("core.fsmonitor", "PROGRAM")),
    "clean filter": _config(("filter.evil.clean", "PROGRAM"), ("filter.evil.required", "true")),
    "filter process": _config(("filter.evil.process", "PROGRAM")),
    "filter with an odd name": _config(("filter.evil.clean", "PROGRAM"), ('filter.e v="i.l.clean', "PROGRAM")),
    "smudge filter": _config(("filter.evil.smudge", "PROGRAM")),
    "included configuration": _included,
    "configuration of the working tree": _worktree_config,
    "text conversion": _config(("diff.evil.textconv", "PROGRAM")),
    "diff command": _config(("diff.evil.command", "PROGRAM")),
    "external diff": _config(("diff.external", "PROGRAM")),
    "pager": _config(("core.pager", "PROGRAM"), ("pager.diff", "PROGRAM"), ("pager.status", "PROGRAM")),
    "alias": _config(("alias.status", "!PROGRAM"), ("alias.diff", "!PROGRAM"), ("alias.rev-parse", "!PROGRAM")),
    "hooks": _hook,
    "folder of hooks": _config(("core.hooksPath", "../hooks")),
    "missing objects": _missing_objects,
    "submodule": _submodule,
    "submodule summary": _config(("status.submoduleSummary", "true"), ("diff.submodule", "diff")),
    "signatures": _config(("log.showSignature", "true"), ("gpg.program", "PROGRAM")),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_planted_program_is_not_run_by_reading_facts(
    attack: str, repository: Path, program: Path, marker: Path
) -> None:
    ATTACKS[attack](repository, program)
    lines: list[str] = []
    facts = read_git_facts(repository, lines.append)
    patch = read_uncommitted_changes(repository, StopSignal())

    assert not marker.exists(), marker.read_text()
    assert facts is not None
    if attack != "missing objects":
        assert lines == []
        assert facts.dirty
        assert facts.commit == git(repository, "rev-parse", "HEAD")
        assert patch is not None
        assert "+two" in patch or "+three" in patch


@pytest.mark.parametrize("command", ["validate", "describe", "plan"])
@pytest.mark.parametrize("attack", ["file-system monitor", "clean filter"])
def test_planted_program_is_not_run_by_commands_that_only_read(
    attack: str, command: str, repository: Path, program: Path, marker: Path
) -> None:
    ATTACKS[attack](repository, program)
    result = CliRunner().invoke(group, [command, str(repository)])

    assert result.exit_code == 0, result.output
    assert not marker.exists(), marker.read_text()


def test_bare_repository_in_a_folder_is_not_used(tmp_path: Path, program: Path, marker: Path) -> None:
    """Its configuration lies in the project's own files, as a clone may bring them."""
    folder = tmp_path / "outer"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    hidden = folder / "models"
    hidden.mkdir()
    git(hidden, "init", "-q", "--bare", ".")
    (hidden / "config").write_text(
        f"[core]\n\tbare = false\n\tworktree = {hidden}\n\tfsmonitor = {program}\n\trepositoryformatversion = 0\n"
    )
    (hidden / "MLproject").write_text(PROJECT)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    lines: list[str] = []
    facts = read_git_facts(hidden, lines.append)
    (hidden / ".git").mkdir()
    read_git_facts(hidden, lines.append)
    result = CliRunner().invoke(group, ["validate", str(hidden)])

    assert not marker.exists(), marker.read_text()
    assert facts is not None
    assert facts.source_name == f"file://{folder}#models"
    assert result.exit_code == 0, result.output


def test_files_of_another_folder_are_not_in_the_patch(repository: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "data.bin").write_text("the key\n")
    git(repository, "config", "core.worktree", str(secret))
    assert read_uncommitted_changes(repository, StopSignal()) is None

    git(secret, "init", "-q")
    git(secret, "add", "-A")
    git(secret, "commit", "-qm", "x")
    shutil.rmtree(repository / ".git")
    (repository / ".git").write_text(f"gitdir: {secret}/.git\n")
    assert read_uncommitted_changes(repository, StopSignal()) is None
    (repository / ".git").unlink()
    (repository / ".git").symlink_to(secret / ".git")
    assert read_uncommitted_changes(repository, StopSignal()) is None


def test_patch_of_linked_working_tree_and_submodule_is_read(repository: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    git(repository, "worktree", "add", "-q", "-b", "other", str(tree))
    (tree / "data.bin").write_text("changed\n")
    patch = read_uncommitted_changes(tree, StopSignal())
    assert patch is not None
    assert "+changed" in patch

    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "submodule", "add", "-q", repository.as_uri(), "inner")
    (outer / "inner" / "data.bin").write_text("changed\n")
    patch = read_uncommitted_changes(outer / "inner", StopSignal())
    assert patch is not None
    assert "+changed" in patch
