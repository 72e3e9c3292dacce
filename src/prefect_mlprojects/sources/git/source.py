"""Projects in git repositories: each run gets its own working copy from the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources.base import (
    SourceKind,
    WorkingCopy,
    apply_subdirectory,
    create_run_folder,
    remove_run_folder,
)
from prefect_mlprojects.sources.git.credentials import GitCredentials, GitCredentialsLookup
from prefect_mlprojects.sources.git.program import GitAnswer, GitProgram, explain_failure, use_git
from prefect_mlprojects.sources.git.repository import CachedRepository
from prefect_mlprojects.sources.git.urls import GitUrl, resolve_submodule_url
from prefect_mlprojects.sources.local import check_trusted
from prefect_mlprojects.types import StopSignal

_MAX_SUBMODULE_DEPTH = 10


@dataclass(frozen=True)
class GitSource:
    """A git repository.

    Attributes:
        url: Its address.
        subdirectory: What stood after the ``#``; empty for the whole repository.
        version: A branch, a tag or a commit; None for the default branch.
        uri: The requested URI, redacted.
        credentials: Finds credentials for it and its submodules; None leaves that to git.
    """

    url: GitUrl
    subdirectory: str
    version: str | None
    uri: str
    credentials: GitCredentialsLookup | None = field(default=None, repr=False)

    @property
    def kind(self) -> SourceKind:
        """Where it is: ``git``."""
        return "git"

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Makes a working copy of the version; see ``Source``.

        Raises:
            FetchError: There is no such repository, version or subdirectory; the remote refused or can't be reached; or the
                fetch was stopped.
        """
        if stop.requested:
            raise FetchError(f"Fetching {self.uri!r} was stopped.", uri=self.uri)
        with use_git(self.url, self._credentials_for(self.url), stop, self.uri) as git:
            repository = CachedRepository(self.url, self.uri, git, report)
            resolved = repository.fetch_version(self.version)
            folder = create_run_folder(self.uri)
            try:
                self._check_out(repository.directory, resolved.commit, self.url, folder, git, report)
                self._add_submodules(folder, resolved.commit, self.url, git, report, depth=0)
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
        )

    def remove(self, copy: WorkingCopy) -> None:
        """Removes the working copy, unless it is to be kept; see ``Source``."""
        remove_run_folder(copy.directory)

    def _credentials_for(self, url: GitUrl) -> GitCredentials | None:
        if url.credentials is not None and url.credentials.token is not None:
            return url.credentials
        found = self.credentials(strip_user_info(url.url), url.host) if self.credentials is not None else None
        return found if found is not None and found.fits(url.host) else url.credentials

    def _check_out(
        self, cache: Path, commit: str, url: GitUrl, folder: Path, git: GitProgram, report: Callable[[str], None]
    ) -> None:
        """Fills a folder with a commit's files: a separate repository that borrows the cache's objects."""
        self._succeed(git.run("init", "--quiet", "--template=", "--", str(folder)))
        inside = folder / ".git"
        (inside / "objects" / "info").mkdir(parents=True, exist_ok=True)
        (inside / "objects" / "info" / "alternates").write_text(f"{cache / 'objects'}\n")
        if (cache / "shallow").exists():
            shutil.copyfile(cache / "shallow", inside / "shallow")
        with (inside / "config").open("a") as config:
            config.write(f'[remote "origin"]\n\turl = "{_escaped(strip_user_info(url.address))}"\n')
        self._succeed(git.run("checkout", "--quiet", "--detach", commit, "--", folder=folder))
        self._add_large_files(folder, cache, git, report)

    def _add_large_files(self, folder: Path, cache: Path, git: GitProgram, report: Callable[[str], None]) -> None:
        """Replaces the pointers of Git LFS by the files that they name, where the program git-lfs is installed."""
        attributes = folder / ".gitattributes"
        if not attributes.is_file() or "filter=lfs" not in attributes.read_text(encoding="utf-8", errors="replace"):
            return
        if shutil.which("git-lfs") is None:
            report(
                f"Warning: {self.uri} keeps files in Git LFS, but git-lfs is not installed: they are pointers only. Install it "
                "(apt install git-lfs)."
            )
            return
        # In the copy's own configuration: given on the command line it would hold for a local remote as well.
        with (folder / ".git" / "config").open("a") as config:
            config.write(f'[lfs]\n\tstorage = "{_escaped(str(cache / "lfs"))}"\n')
        self._succeed(git.run("lfs", "pull", folder=folder))

    def _add_submodules(
        self, folder: Path, commit: str, parent: GitUrl, git: GitProgram, report: Callable[[str], None], depth: int
    ) -> None:
        """Fills the folders of submodules, which come out of the cache too, and those of theirs."""
        if not (folder / ".gitmodules").is_file():
            return
        if depth >= _MAX_SUBMODULE_DEPTH:
            raise FetchError(f"{self.uri!r} has submodules nested more than {_MAX_SUBMODULE_DEPTH} deep.", uri=self.uri)
        # Git's own default ("user") refuses local paths in submodules (CVE-2022-39253).
        local_paths = git.run("config", "--get", "protocol.file.allow", folder=folder).text == "always"
        for path, address in self._submodule_addresses(folder, git).items():
            listed = git.run("--literal-pathspecs", "ls-tree", commit, "--", path, folder=folder)
            self._succeed(listed)
            if not listed.text.startswith("160000 commit "):
                continue
            submodule_commit = listed.text.split()[2]
            url = resolve_submodule_url(parent, address, local_paths=local_paths)
            place = folder / PurePosixPath(path)
            if url is None or not place.resolve().is_relative_to(folder.resolve()):
                local = address.startswith("/") and not local_paths
                advice = " If you trust it, run `git config --global protocol.file.allow always`." if local else ""
                raise FetchError(
                    f"{self.uri!r} has a submodule {path!r} that can't be fetched from {strip_user_info(address)!r}.{advice}",
                    uri=self.uri,
                )
            check_trusted(url.url, self.uri)
            with use_git(url, self._credentials_for(url), git.stop, self.uri) as submodule_git:
                shown = strip_user_info(url.url)
                repository = CachedRepository(url, shown, submodule_git, report)
                repository.fetch_commit(submodule_commit)
                place.mkdir(parents=True, exist_ok=True)
                self._check_out(repository.directory, submodule_commit, url, place, submodule_git, report)
                self._add_submodules(place, submodule_commit, url, submodule_git, report, depth + 1)

    def _submodule_addresses(self, folder: Path, git: GitProgram) -> dict[str, str]:
        """Reads ``.gitmodules``: URL by path."""
        answer = git.run(
            "config", "--file", ".gitmodules", "--get-regexp", r"^submodule\..*\.(path|url)$", folder=folder
        )
        paths: dict[str, str] = {}
        urls: dict[str, str] = {}
        for line in answer.lines:
            key, _, value = line.partition(" ")
            name, _, kind = key.rpartition(".")
            (paths if kind == "path" else urls)[name] = value
        return {path: urls[name] for name, path in paths.items() if name in urls}

    def _succeed(self, answer: GitAnswer) -> None:
        if answer.succeeded:
            return
        failure = explain_failure(answer.text, scheme=self.url.scheme, host=self.url.host)
        raise FetchError(f"{self.uri!r} can't be checked out: {failure.text}. {failure.advice}".rstrip(), uri=self.uri)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
