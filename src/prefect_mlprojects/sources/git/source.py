"""Projects in git repositories: each run gets its own working copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.exceptions import FetchError, SourceUnavailableError
from prefect_mlprojects.sources.base import (
    SourceKind,
    WorkingCopy,
    apply_subdirectory,
    check_trusted,
    create_run_folder,
    remove_run_folder,
)
from prefect_mlprojects.sources.git import GitCredentialsLookup, GitUrl, find_credentials, resolve_submodule_url
from prefect_mlprojects.sources.git.program import (
    GitAnswer,
    GitProgram,
    explain_failure,
    use_git,
)
from prefect_mlprojects.sources.git.repository import CachedRepository
from prefect_mlprojects.types import StopSignal

_MAX_SUBMODULE_DEPTH = 10
_Report = Callable[[str], None]


@dataclass(frozen=True)
class GitSource:
    """A git repository; without a `version`, its default branch, and without `credentials`, those that git finds."""

    url: GitUrl
    subdirectory: str
    version: str | None
    uri: str
    credentials: GitCredentialsLookup | None = field(default=None, repr=False)

    @property
    def kind(self) -> SourceKind:
        """``git``."""
        return "git"

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Creates a working copy of the version; see ``Source``."""
        if stop.requested:
            raise SourceUnavailableError(f"Fetching {self.uri!r} was stopped.", uri=self.uri)
        with use_git(self.url, find_credentials(self.credentials, self.url, self.url), stop, self.uri) as git:
            repository = CachedRepository(self.url, self.uri, git, report)
            resolved = repository.fetch_version(self.version)
            folder = create_run_folder(self.uri)
            try:
                self._check_out(repository.directory, resolved.commit, self.url, folder, git, report)
                self._add_submodules(folder, resolved.commit, self.url, git, report, depth=0)
                _refuse_links_out(folder, self.uri)
                directory = apply_subdirectory(folder, self.subdirectory, self.uri)
            except BaseException:
                remove_run_folder(folder)
                raise
        address = strip_user_info(self.url.url)
        return WorkingCopy(
            directory=directory,
            uri=self.uri,
            kind="git",
            source_name=f"{address}#{self.subdirectory}" if self.subdirectory else address,
            commit=resolved.commit,
            branch=resolved.branch,
            repository_url=address,
            temporary=True,
            root=folder,
        )

    def remove(self, copy: WorkingCopy) -> None:
        """Removes the working copy, unless it is to be kept; see ``Source``."""
        remove_run_folder(copy.directory)

    def _check_out(self, cache: Path, commit: str, url: GitUrl, folder: Path, git: GitProgram, report: _Report) -> None:
        """Checks a commit out in a separate repository, which borrows the cache's objects."""
        self._insist(git.run("init", "--quiet", "--template=", "--", str(folder)))
        inside = folder / ".git"
        (inside / "objects" / "info").mkdir(parents=True, exist_ok=True)
        (inside / "objects" / "info" / "alternates").write_text(f"{cache / 'objects'}\n")
        if (cache / "shallow").exists():
            shutil.copyfile(cache / "shallow", inside / "shallow")
        with (inside / "config").open("a") as config:
            config.write(f'[remote "origin"]\n\turl = "{_escaped(strip_user_info(url.written))}"\n')
        self._insist(git.run("checkout", "--quiet", "--detach", commit, "--", folder=folder))
        self._add_large_files(folder, cache, git, report)

    def _add_large_files(self, folder: Path, cache: Path, git: GitProgram, report: _Report) -> None:
        """Replaces Git LFS pointers by their files, where the program git-lfs is installed."""
        attributes = folder / ".gitattributes"
        if not attributes.is_file() or "filter=lfs" not in attributes.read_text(encoding="utf-8", errors="replace"):
            return
        if shutil.which("git-lfs") is None:
            report(
                f"Warning: {self.uri} keeps files in Git LFS, but git-lfs is not installed: they are pointers only. Install it "
                "(apt install git-lfs)."
            )
            return
        # In the copy's own configuration: on the command line it would apply to a local remote as well.
        with (folder / ".git" / "config").open("a") as config:
            config.write(f'[lfs]\n\tstorage = "{_escaped(str(cache / "lfs"))}"\n')
        self._insist(git.run("lfs", "pull", folder=folder))

    def _add_submodules(
        self, folder: Path, commit: str, parent: GitUrl, git: GitProgram, report: _Report, depth: int
    ) -> None:
        """Checks submodules out, recursively and through the cache."""
        if not (folder / ".gitmodules").is_file():
            return
        if depth >= _MAX_SUBMODULE_DEPTH:
            raise FetchError(f"{self.uri!r} has submodules nested more than {_MAX_SUBMODULE_DEPTH} deep.", uri=self.uri)
        for path, address in _submodule_addresses(folder, git).items():
            listed = git.run("--literal-pathspecs", "ls-tree", commit, "--", path, folder=folder)
            self._insist(listed)
            if not listed.text.startswith("160000 commit "):
                continue
            submodule_commit = listed.text.split()[2]
            target = folder / PurePosixPath(path)
            url = self._submodule_url(parent, path, address, folder, git)
            credentials = find_credentials(self.credentials, url, self.url)
            with use_git(url, credentials, git.stop, self.uri) as submodule_git:
                repository = CachedRepository(url, strip_user_info(url.url), submodule_git, report)
                repository.fetch_commit(submodule_commit)
                target.mkdir(parents=True, exist_ok=True)
                self._check_out(repository.directory, submodule_commit, url, target, submodule_git, report)
                self._add_submodules(target, submodule_commit, url, submodule_git, report, depth + 1)

    def _submodule_url(self, parent: GitUrl, path: str, address: str, folder: Path, git: GitProgram) -> GitUrl:
        # Git's own default ("user") refuses local paths in submodules (CVE-2022-39253).
        local_paths = git.run("config", "--get", "protocol.file.allow", folder=folder).text == "always"
        url = resolve_submodule_url(parent, address, local_paths=local_paths)
        if url is None or not (folder / PurePosixPath(path)).resolve().is_relative_to(folder.resolve()):
            refused = address.startswith("/") and not local_paths and parent.scheme == "file"
            advice = " If you trust it, run `git config --global protocol.file.allow always`." if refused else ""
            raise SourceUnavailableError(
                f"{self.uri!r} has a submodule {path!r} that can't be fetched from {strip_user_info(address)!r}.{advice}",
                uri=self.uri,
            )
        check_trusted(url.url, self.uri)
        return url

    def _insist(self, answer: GitAnswer) -> None:
        if answer.succeeded:
            return
        failure = explain_failure(answer.text, scheme=self.url.scheme, host=self.url.host)
        raise SourceUnavailableError(
            f"{self.uri!r} can't be checked out: {failure.text}. {failure.advice}".rstrip(), uri=self.uri
        )


def _refuse_links_out(folder: Path, shown: str) -> None:
    """Raises a `FetchError` for a symbolic link to something outside of a working copy: its text could get into a message."""
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder):
        for link in filter(os.path.islink, (os.path.join(parent, name) for name in (*folders, *files))):  # noqa: PTH118
            target = os.path.realpath(link)
            if os.path.commonpath((root, target)) != root and os.path.exists(target):  # noqa: PTH110
                raise FetchError(
                    f"{shown!r} is not used: its link {os.path.relpath(link, folder)!r} leads out of the project, to "
                    f"{os.readlink(link)!r}. Remove the link, or run the project from a folder of this machine.",  # noqa: PTH115
                    uri=shown,
                )


def _submodule_addresses(folder: Path, git: GitProgram) -> dict[str, str]:
    """Returns the URLs in ``.gitmodules`` by path."""
    answer = git.run("config", "--file", ".gitmodules", "--get-regexp", r"^submodule\..*\.(path|url)$", folder=folder)
    values: dict[str, dict[str, str]] = {"path": {}, "url": {}}
    for line in answer.lines:
        key, _, value = line.partition(" ")
        name, _, variable = key.rpartition(".")
        values[variable][name] = value
    return {path: values["url"][name] for name, path in values["path"].items() if name in values["url"]}


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
