"""The cache of repositories: one bare repository for each remote, which all runs share and only fetches change."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefect_mlprojects._support.files import replacing
from prefect_mlprojects._support.locks import LockStoppedError, hold_lock
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import FetchError, SourceUnavailableError
from prefect_mlprojects.settings import trusted_sources
from prefect_mlprojects.sources.base import check_trusted, checked_cache
from prefect_mlprojects.sources.git import GitUrl
from prefect_mlprojects.sources.git.program import GitAnswer, GitFailure, GitProgram, explain_failure

_FULL_SHA = re.compile(r"^[0-9a-f]{40}$")
_SHORT_SHA = re.compile(r"^[0-9a-fA-F]{4,40}$")
# What git-check-ref-format(1) forbids in names, and what ls-remote would take for a pattern.
_BAD_VERSION = re.compile(r"^-|[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|^/|//|/$|\.lock$|\.$")

_REDIRECTED = "warning: redirecting to "


@dataclass(frozen=True)
class ResolvedVersion:
    """A version's full SHA, its branch (None for a tag or SHA) and the remote's reference (None for a SHA)."""

    commit: str
    branch: str | None = None
    ref: str | None = None


class CachedRepository:
    """A bare repository in the cache that mirrors parts of a remote one."""

    def __init__(self, url: GitUrl, shown: str, git: GitProgram, report: Callable[[str], None]) -> None:
        self._url = url
        self._shown = shown
        self._git = git
        self._report = report
        self._located: str | None = None
        name = re.sub(r"[^A-Za-z0-9._-]", "-", url.url.rstrip("/").rpartition("/")[2].removesuffix(".git"))[:40]
        key = hashlib.sha256(url.written.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.directory = checked_cache(shown) / "repositories" / f"{name.lstrip('.-') or 'repository'}-{key}.git"

    def fetch_version(self, version: str | None) -> ResolvedVersion:
        """Resolves a branch, tag, SHA or ``refs/…`` (None: the default branch) and fetches its commit if it is not cached.

        A cached SHA needs no network; a branch or tag costs one small request.

        Raises:
            FetchError: The version does not exist, or the remote refused or could not be reached.
        """
        if version is not None and _BAD_VERSION.search(version):
            raise FetchError(
                f"{version!r} is no version: name a branch, a tag or a commit of {self._shown!r}.", uri=self._shown
            )
        if version is not None and _SHORT_SHA.match(version):
            known = self._known_commit(version.lower())
            if known is not None:
                self._insist_on_access()
                return ResolvedVersion(known)
        resolved = self._ask_remote(version)
        if resolved is None:
            assert version is not None
            resolved = self._fetch_sha(version)
        elif not self.has(resolved.commit):
            self._fetch(resolved)
        return resolved

    def fetch_commit(self, commit: str) -> None:
        """Fetches a commit if it is not cached; raises `FetchError` as `fetch_version`."""
        if self.has(commit):
            self._insist_on_access()
        else:
            self._fetch_sha(commit)

    def has(self, commit: str) -> bool:
        """Returns whether the cache has a commit with all its files."""
        # Only a fetch that has succeeded leaves the mark; an object alone may be part of a killed one.
        return self._done_mark(commit).exists() and self._git_in_cache("cat-file", "-e", f"{commit}^{{tree}}").succeeded

    def _insist_on_access(self) -> None:
        """Raises a `FetchError` unless the remote has accepted these credentials: others may have fetched what is cached."""
        if self._url.scheme != "file" and not self._access_mark().exists():
            answer = self._git.run("ls-remote", "--", self._address(), "HEAD")
            if not answer.succeeded:
                raise self._error(answer)
            self._note_access()

    def _note_access(self) -> None:
        mark = self._access_mark()
        mark.parent.mkdir(exist_ok=True)
        mark.touch()

    def _access_mark(self) -> Path:
        return self.directory / "mlprojects-access" / self._git.login

    def _known_commit(self, sha: str) -> str | None:
        if not self.directory.is_dir():
            return None
        if _FULL_SHA.match(sha):
            return sha if self.has(sha) else None
        answer = self._git_in_cache("rev-parse", "--verify", "--quiet", f"{sha}^{{commit}}")
        commit = answer.lines[-1].strip() if answer.succeeded and answer.lines else ""
        # It may be meant as the name of a branch or tag; only the remote knows whether one exists.
        references = (f"refs/heads/{sha}", f"refs/tags/{sha}", f"refs/remotes/origin/{sha}")
        is_reference = self._git_in_cache("for-each-ref", "--count=1", *references).lines != ()
        return commit if commit.startswith(sha) and self.has(commit) and not is_reference else None

    def _address(self) -> str:
        """Returns the argument for git; where only trusted sources may run, the address where redirects end, once it is trusted."""
        if self._located is None:
            self._located = self._url.address
            if trusted_sources() and self._url.scheme in ("http", "https"):
                answer = self._git.run("-c", "http.followRedirects=initial", "ls-remote", "--", self._located, "HEAD")
                if not answer.succeeded:
                    raise self._error(answer)
                for line in answer.lines:
                    if line.startswith(_REDIRECTED):
                        self._located = line.removeprefix(_REDIRECTED).rstrip("/")
                        check_trusted(self._located, f"{self._shown} (redirected to {self._located})")
        return self._located

    def _ask_remote(self, version: str | None) -> ResolvedVersion | None:
        """Resolves a reference at the remote; None if it may be a SHA instead."""
        version = version or "HEAD"
        exact = version == "HEAD" or version.startswith("refs/")
        names = [version] if exact else [f"refs/heads/{version}", f"refs/tags/{version}"]
        patterns = [pattern for name in names for pattern in (name, f"{name}^{{}}")]
        answer = self._git.run("ls-remote", "--symref", "--", self._address(), *patterns)
        if not answer.succeeded:
            raise self._error(answer)
        found, default = _parse_references(answer.lines)
        for name in names:
            # An annotated tag is a separate object; "^{}" is its commit.
            commit = found.get(f"{name}^{{}}") or found.get(name)
            if commit is not None:
                ref = default if name == "HEAD" and default else name
                branch = ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else None
                return ResolvedVersion(commit, branch, ref)
        if names == ["HEAD"]:
            raise FetchError(f"{self._shown!r} is an empty repository: it has no commit to run.", uri=self._shown)
        if _SHORT_SHA.match(version):
            return None
        raise self._unknown(version)

    def _unknown(self, version: str) -> FetchError:
        answer = self._git.run("ls-remote", "--heads", "--tags", "--refs", "--", self._address())
        names = [ref.split("/", 2)[2] for ref in _parse_references(answer.lines)[0] if ref.count("/") >= 2]
        near = nearest(version, names)
        listed = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
        advice = f" Did you mean {near!r}?" if near else f" It has: {listed}." if names else ""
        return FetchError(f"{self._shown!r} has no branch, tag or commit {version!r}.{advice}", uri=self._shown)

    def _fetch(self, resolved: ResolvedVersion) -> None:
        """Fetches one commit without its history."""
        assert resolved.ref is not None
        with self._writing():
            if self.has(resolved.commit):
                return
            self._report(f"fetching {resolved.ref.rpartition('/')[2]} of {self._shown}")
            # By its SHA: the name may have moved on since it was resolved.
            answer = self._fetch_shallow(resolved.commit)
            if not answer.succeeded and self._explain(answer).cause == "unknown-commit":
                answer = self._fetch_everything(resolved.ref)
            self._finish_fetch(answer, resolved.commit)

    def _fetch_sha(self, version: str) -> ResolvedVersion:
        sha = version.lower()
        with self._writing():
            known = self._known_commit(sha)
            if known is not None:
                return ResolvedVersion(known)
            self._report(f"fetching {sha[:12]} of {self._shown}")
            if _FULL_SHA.match(sha):
                answer = self._fetch_shallow(sha)
                if answer.succeeded or self._explain(answer).cause != "unknown-commit":
                    self._finish_fetch(answer, sha)
                    return ResolvedVersion(sha)
            # A short SHA, or one that the server does not give by itself, is only found with the history.
            answer = self._fetch_everything()
            if not answer.succeeded:
                raise self._error(answer)
            return ResolvedVersion(self._find_commit(version, sha))

    def _find_commit(self, version: str, sha: str) -> str:
        answer = self._git_in_cache("rev-parse", "--verify", f"{sha}^{{commit}}")
        if answer.succeeded:
            commit = answer.lines[-1].strip()
            self._finish_fetch(answer, commit)
            return commit
        if "ambiguous" in answer.text:
            raise FetchError(
                f"The commit {version!r} of {self._shown!r} is ambiguous: give more digits of it.", uri=self._shown
            )
        raise self._unknown(version)

    def _fetch_shallow(self, commit: str) -> GitAnswer:
        return self._fetch_by_git(["--depth=1"], [f"+{commit}:refs/mlprojects/{commit}"])

    def _fetch_everything(self, ref: str | None = None) -> GitAnswer:
        deepen = ["--unshallow"] if (self.directory / "shallow").exists() else []
        refspecs = ["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"]
        if ref is not None and not ref.startswith(("refs/heads/", "refs/tags/")):
            refspecs.append(f"+{ref}:refs/mlprojects/{ref}")
        return self._fetch_by_git(deepen, refspecs)

    def _fetch_by_git(self, options: list[str], refspecs: list[str]) -> GitAnswer:
        options = ["--quiet", "--progress", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", *options]
        return self._git_in_cache("fetch", *options, "--", self._address(), *refspecs, report=self._report)

    def _finish_fetch(self, answer: GitAnswer, commit: str) -> None:
        if not answer.succeeded:
            failure = self._explain(answer)
            if failure.cause == "unknown-commit":
                raise FetchError(f"{self._shown!r} has no commit {commit!r}: {failure.text}", uri=self._shown)
            raise self._error(answer)
        mark = self._done_mark(commit)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        self._note_access()

    def _done_mark(self, commit: str) -> Path:
        return self.directory / "mlprojects-complete" / commit

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Locks the repository against other processes, and creates or repairs it if necessary."""
        name = self.directory.name.removesuffix(".git")
        try:
            with hold_lock(
                self.directory.with_name(f"{name}.lock"),
                self._git.stop,
                lambda: self._report(f"waiting for another process that fetches {self._shown}"),
            ):
                self._create_or_repair()
                yield
        except LockStoppedError:
            raise SourceUnavailableError(
                f"The fetch of {self._shown!r} was stopped: {self._git.stop.reason}.", uri=self._shown
            ) from None
        except OSError as error:
            raise SourceUnavailableError(
                f"{self._shown!r} can't be kept in the cache: {error.filename or self.directory}: {error.strerror or error}. "
                "PREFECT_MLPROJECTS_CACHE_DIR names another folder.",
                uri=self._shown,
            ) from None

    def _create_or_repair(self) -> None:
        if self.directory.is_dir():
            # No other process writes while this one holds the lock: these belong to a killed fetch.
            for pattern in ("*.lock", "refs/**/*.lock", "objects/**/tmp_*"):
                for leftover in self.directory.glob(pattern):
                    leftover.unlink(missing_ok=True)
            if self._git_in_cache("rev-parse", "--git-dir").succeeded:
                return
            self._report(f"the cached repository {self.directory} is broken and is created again")
            shutil.rmtree(self.directory)
        with replacing(self.directory) as new:
            new.mkdir(mode=0o700)
            answer = self._git.run("init", "--quiet", "--bare", "--template=", "--", str(new))
            if not answer.succeeded:
                raise self._error(answer, "can't be kept in the cache")

    def _git_in_cache(self, *arguments: str, report: Callable[[str], None] | None = None) -> GitAnswer:
        return self._git.run("--git-dir", str(self.directory), *arguments, report=report)

    def _explain(self, answer: GitAnswer) -> GitFailure:
        return explain_failure(answer.text, scheme=self._url.scheme, host=self._url.host)

    def _error(self, answer: GitAnswer, problem: str = "can't be fetched") -> FetchError:
        failure = self._explain(answer)
        text = failure.text.rstrip(".")
        kind = FetchError if failure.cause == "missing" else SourceUnavailableError
        return kind(f"{self._shown!r} {problem}: {text}. {failure.advice}".rstrip(), uri=self._shown)


def _parse_references(lines: tuple[str, ...]) -> tuple[dict[str, str], str | None]:
    """Parses ``git ls-remote --symref``: SHAs by name, and the target of HEAD."""
    found: dict[str, str] = {}
    default = None
    for line in lines:
        left, tab, name = line.partition("\t")
        if not tab:
            continue
        if left.startswith("ref: "):
            default = left.removeprefix("ref: ").strip() if name == "HEAD" else default
        elif _FULL_SHA.match(left):
            found[name] = left
    return found, default
