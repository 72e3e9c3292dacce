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
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.settings import cache_directory
from prefect_mlprojects.sources.git import GitUrl
from prefect_mlprojects.sources.git.program import GitAnswer, GitFailure, GitProgram, explain_failure

_FULL_SHA = re.compile(r"^[0-9a-f]{40}$")
_SHORT_SHA = re.compile(r"^[0-9a-fA-F]{4,40}$")
# What git-check-ref-format(1) forbids in names, and what ls-remote would take for a pattern.
_BAD_VERSION = re.compile(r"^-|[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|^/|//|/$|\.lock$|\.$")


@dataclass(frozen=True)
class ResolvedVersion:
    """A commit that a version stands for.

    Attributes:
        commit: Its full SHA.
        branch: The branch that was asked for, or the default branch; None for a tag or a SHA.
        ref: The name of the remote's reference; None for a SHA.
    """

    commit: str
    branch: str | None = None
    ref: str | None = None


class CachedRepository:
    """The bare repository in the cache that mirrors parts of a remote one.

    Args:
        url: The remote.
        shown: The requested URI, redacted, for messages.
        git: Git, with the remote's credentials.
        report: Takes lines about the progress.
    """

    def __init__(self, url: GitUrl, shown: str, git: GitProgram, report: Callable[[str], None]) -> None:
        self._url = url
        self._shown = shown
        self._git = git
        self._report = report
        name = re.sub(r"[^A-Za-z0-9._-]", "-", url.url.rstrip("/").rpartition("/")[2].removesuffix(".git"))[:40]
        key = hashlib.sha256(url.address.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.directory = cache_directory() / "repositories" / f"{name.lstrip('.-') or 'repository'}-{key}.git"

    def fetch_version(self, version: str | None) -> ResolvedVersion:
        """Finds the commit that a version stands for, and has it in the cache when it returns.

        A SHA that is there already is not asked of the remote. A branch or tag always is, by one small request; only
        commits that are not there are fetched.

        Args:
            version: A branch, a tag, a full or short SHA, a full reference (``refs/…``); None for the default branch.

        Raises:
            FetchError: There is no such version, or the remote refused or could not be reached.
        """
        if version is not None and _BAD_VERSION.search(version):
            raise FetchError(
                f"{version!r} is no version: name a branch, a tag or a commit of {self._shown!r}.", uri=self._shown
            )
        if version is not None and _SHORT_SHA.match(version):
            known = self._known_commit(version.lower())
            if known is not None:
                return ResolvedVersion(known)
        resolved = self._ask_remote(version)
        if resolved is None:
            assert version is not None
            resolved = self._fetch_sha(version)
        elif not self.has(resolved.commit):
            self._fetch(resolved)
        return resolved

    def fetch_commit(self, commit: str) -> None:
        """Has a commit in the cache when it returns.

        Raises:
            FetchError: The remote does not have it, refused or could not be reached.
        """
        if not self.has(commit):
            self._fetch_sha(commit)

    def has(self, commit: str) -> bool:
        """Returns whether the cache has a commit with all its files."""
        # Each fetch that has succeeded leaves such a reference; an object alone may be part of a fetch that died.
        return self._done_mark(commit).exists() and self._git_in_cache("cat-file", "-e", f"{commit}^{{tree}}").succeeded

    def _known_commit(self, sha: str) -> str | None:
        if not self.directory.is_dir():
            return None
        if _FULL_SHA.match(sha):
            return sha if self.has(sha) else None
        answer = self._git_in_cache("rev-parse", "--verify", "--quiet", f"{sha}^{{commit}}")
        commit = answer.lines[-1].strip() if answer.succeeded and answer.lines else ""
        # A branch or tag of that name may be meant; only the remote knows whether there is one.
        if not commit.startswith(sha) or not self.has(commit) or self._names_a_reference(sha):
            return None
        return commit

    def _names_a_reference(self, name: str) -> bool:
        references = (f"refs/heads/{name}", f"refs/tags/{name}", f"refs/remotes/origin/{name}")
        return self._git_in_cache("for-each-ref", "--count=1", *references).lines != ()

    def _ask_remote(self, version: str | None) -> ResolvedVersion | None:
        """Asks for a reference; None when the remote has none of that name."""
        if version is None or version == "HEAD":
            names = ["HEAD"]
        elif version.startswith("refs/"):
            names = [version]
        else:
            names = [f"refs/heads/{version}", f"refs/tags/{version}"]
        patterns = [pattern for name in names for pattern in (name, f"{name}^{{}}")]
        answer = self._git.run("ls-remote", "--symref", "--", self._url.address, *patterns)
        if not answer.succeeded:
            raise self._error("can't be fetched", self._explain(answer))
        found, default = _parse_references(answer.lines)
        for name in names:
            # An annotated tag is a separate object; "^{}" is the commit that it names.
            commit = found.get(f"{name}^{{}}") or found.get(name)
            if commit is not None:
                ref = default if name == "HEAD" and default else name
                branch = ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else None
                return ResolvedVersion(commit, branch, ref)
        if names == ["HEAD"]:
            raise FetchError(f"{self._shown!r} is an empty repository: it has no commit to run.", uri=self._shown)
        if version is not None and _SHORT_SHA.match(version):
            return None
        raise FetchError(
            f"{self._shown!r} has no branch, tag or commit {version!r}.{self._nearest(version or '')}", uri=self._shown
        )

    def _nearest(self, version: str) -> str:
        from prefect_mlprojects._support.text import nearest

        answer = self._git.run("ls-remote", "--heads", "--tags", "--refs", "--", self._url.address)
        names = [ref.split("/", 2)[2] for ref in _parse_references(answer.lines)[0] if ref.count("/") >= 2]
        near = nearest(version, names)
        if near:
            return f" Did you mean {near!r}?"
        shown = ", ".join(sorted(names)[:8])
        return f" It has: {shown}{', …' if len(names) > 8 else ''}." if names else ""

    def _fetch(self, resolved: ResolvedVersion) -> None:
        """Fetches one commit without its history, as far as the cache does not have it."""
        assert resolved.ref is not None
        with self._writing():
            if self.has(resolved.commit):
                return
            self._report(f"fetching {resolved.ref.rpartition('/')[2]} of {self._shown}")
            # By its SHA, not its name: the name may have moved on since it was asked for.
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
            # Only with all of the history can a short SHA be found, or one that the server does not give by itself.
            answer = self._fetch_everything()
            if not answer.succeeded:
                raise self._error("can't be fetched", self._explain(answer))
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
        raise FetchError(
            f"{self._shown!r} has no branch, tag or commit {version!r}.{self._nearest(version)}", uri=self._shown
        )

    def _fetch_shallow(self, commit: str) -> GitAnswer:
        refspec = f"+{commit}:refs/mlprojects/{commit}"
        return self._fetch_by_git("--depth=1", refspec)

    def _fetch_everything(self, ref: str | None = None) -> GitAnswer:
        deepen = ["--unshallow"] if (self.directory / "shallow").exists() else []
        refspecs = ["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"]
        if ref is not None and not ref.startswith(("refs/heads/", "refs/tags/")):
            refspecs.append(f"+{ref}:refs/mlprojects/{ref}")
        return self._fetch_by_git(*deepen, *refspecs)

    def _fetch_by_git(self, *arguments: str) -> GitAnswer:
        options = [argument for argument in arguments if argument.startswith("--")]
        refspecs = [argument for argument in arguments if not argument.startswith("--")]
        command = [
            "fetch",
            "--quiet",
            "--progress",
            "--no-tags",
            "--no-write-fetch-head",
            "--no-auto-maintenance",
            *options,
        ]
        return self._git_in_cache(*command, "--", self._url.address, *refspecs, report=self._report)

    def _finish_fetch(self, answer: GitAnswer, commit: str) -> None:
        if not answer.succeeded:
            failure = self._explain(answer)
            if failure.cause == "unknown-commit":
                raise FetchError(f"{self._shown!r} has no commit {commit!r}: {failure.text}", uri=self._shown)
            raise self._error("can't be fetched", failure)
        mark = self._done_mark(commit)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()

    def _done_mark(self, commit: str) -> Path:
        return self.directory / "mlprojects-complete" / commit

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keeps other processes from changing the repository, and makes or mends it when it needs that."""
        name = self.directory.name.removesuffix(".git")
        try:
            with hold_lock(
                self.directory.with_name(f"{name}.lock"),
                self._git.stop,
                lambda: self._report(f"waiting for another process that fetches {self._shown}"),
            ):
                self._make_or_mend()
                yield
        except LockStoppedError:
            raise FetchError(
                f"The fetch of {self._shown!r} was stopped: {self._git.stop.reason}.", uri=self._shown
            ) from None
        except OSError as error:
            raise FetchError(
                f"{self._shown!r} can't be kept in the cache: {error.filename or self.directory}: {error.strerror or error}. "
                "PREFECT_MLPROJECTS_CACHE_DIR names another folder.",
                uri=self._shown,
            ) from None

    def _make_or_mend(self) -> None:
        if self.directory.is_dir():
            # Nobody else writes while we have the lock: these belong to a fetch that was killed.
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
                raise self._error("can't be kept in the cache", self._explain(answer))

    def _git_in_cache(self, *arguments: str, report: Callable[[str], None] | None = None) -> GitAnswer:
        return self._git.run("--git-dir", str(self.directory), *arguments, report=report)

    def _explain(self, answer: GitAnswer) -> GitFailure:
        return explain_failure(answer.text, scheme=self._url.scheme, host=self._url.host)

    def _error(self, what: str, failure: GitFailure) -> FetchError:
        text = failure.text.rstrip(".")
        return FetchError(f"{self._shown!r} {what}: {text}. {failure.advice}".rstrip(), uri=self._shown)


def _parse_references(lines: tuple[str, ...]) -> tuple[dict[str, str], str | None]:
    """Reads ``git ls-remote --symref``: SHA by name, and what HEAD points to."""
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
