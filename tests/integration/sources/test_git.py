"""Projects in git repositories, over real transports."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.services.git import git

from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources import WorkingCopy, detect_source
from prefect_mlprojects.sources.git import GitCredentials, GitUrl
from prefect_mlprojects.types import StopSignal

from .conftest import TOKEN, USER, Fetch, Remote, commit


def text_of(copy: WorkingCopy) -> str:
    return (copy.directory / "version.txt").read_text()


@pytest.mark.parametrize(
    ("version", "expected", "branch"),
    [
        (None, "three", "trunk"),
        ("trunk", "three", "trunk"),
        ("feature/with/slashes", "feature", "feature/with/slashes"),
        ("light", "one", None),
        ("annotated", "two", None),
        ("FULL one", "one", None),
        ("SHORT two", "two", None),
        ("FULL lonely", "lonely", None),
        ("refs/pull/7/head", "lonely", None),
        ("refs/heads/trunk", "three", "trunk"),
    ],
)
def test_version_of_each_kind_is_checked_out(
    version: str | None, expected: str, branch: str | None, remote: Remote, fetch: Fetch
) -> None:
    if version is not None and version.startswith(("FULL ", "SHORT ")):
        kind, _, name = version.partition(" ")
        version = remote.commits[name] if kind == "FULL" else remote.commits[name][:8]

    copy = fetch(remote.uri, version)

    assert text_of(copy) == expected
    assert (copy.commit, copy.branch, copy.repository_url) == (remote.commits[expected], branch, remote.uri)
    assert copy.temporary
    assert git(copy.directory, "rev-parse", "HEAD") == remote.commits[expected]
    assert git(copy.directory, "status", "--porcelain") == ""


def test_subdirectory_in_fragment_is_the_project(remote: Remote, fetch: Fetch) -> None:
    copy = fetch(f"{remote.uri}#sub")

    assert (copy.directory / "MLproject").read_text() == "name: inner\n"
    assert copy.source_name == f"{remote.uri}#sub"
    with pytest.raises(FetchError, match="leads out of the project"):
        fetch(f"{remote.uri}#../..")


def test_address_is_passed_to_git_unchanged(remote: Remote, fetch: Fetch, cache: Path) -> None:
    """``insteadOf`` is compared with what the user wrote."""
    settings = Path(os.environ["GIT_CONFIG_GLOBAL"])
    settings.write_text(f'[url "{remote.root.as_uri()}/"]\n\tinsteadOf = git@nowhere.invalid:team/\n')
    assert text_of(fetch("git@nowhere.invalid:team/project.git")) == "three"
    # The short names that people give their hosts have no user.
    settings.write_text(f'[url "{remote.root.as_uri()}/"]\n\tinsteadOf = work:\n')
    assert text_of(fetch("work:project.git")) == "three"
    assert fetch("work:project.git#/sub/").directory.name == "sub"


def test_address_without_user_uses_ssh(
    remote: Remote, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of ssh, which gets the host and git's command for it, a script runs the command in the server's home."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\nfor last; do :; done\necho "$@" >> {tmp_path}/calls\ncd {remote.root} && eval "$last"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(ssh))
    copy = fetch("example.org:project.git", "annotated")

    assert text_of(copy) == "two"
    assert "example.org git-upload-pack 'project.git'" in (tmp_path / "calls").read_text()


def test_repository_of_another_user_suggests_safe_directory(
    remote: Remote, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Git's own way to be tested for this without being root.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(FetchError, match=f"git config --global --add safe.directory {remote.bare}`"):
        fetch(remote.uri)
    settings = Path(os.environ["GIT_CONFIG_GLOBAL"])
    settings.write_text(f"[safe]\n\tdirectory = {remote.bare}\n\tdirectory = *\n")
    assert text_of(fetch(remote.uri)) == "three"


def test_versions_over_the_git_protocol(git_daemon: str, remote: Remote, fetch: Fetch) -> None:
    for version, expected in (
        (None, "three"),
        (remote.commits["lonely"], "lonely"),
        (remote.commits["one"][:7], "one"),
    ):
        assert text_of(fetch(git_daemon, version)) == expected


def test_branch_after_push_follows_remote(remote: Remote, fetch: Fetch) -> None:
    assert text_of(fetch(remote.uri)) == "three"
    commit(remote.work, "four")
    remote.push()
    assert text_of(fetch(remote.uri)) == "four"
    # Also when it was rewritten.
    git(remote.work, "reset", "-q", "--hard", remote.commits["one"])
    commit(remote.work, "rewritten")
    remote.push()
    assert text_of(fetch(remote.uri)) == "rewritten"


def test_cached_commit_uses_no_network(remote: Remote, fetch: Fetch) -> None:
    sha = str(fetch(remote.uri, "light").commit)
    shutil.rmtree(remote.bare)
    (remote.bare / "objects").mkdir(parents=True)
    (remote.bare / "refs").mkdir()
    (remote.bare / "HEAD").touch()

    assert text_of(fetch(remote.uri, sha)) == "one"
    assert text_of(fetch(remote.uri, sha[:10])) == "one"
    with pytest.raises(FetchError):
        fetch(remote.uri, "light")


def test_runs_do_not_see_each_others_files(remote: Remote, fetch: Fetch, cache: Path) -> None:
    source = detect_source(remote.uri)
    first = source.fetch(StopSignal(), lambda _: None)
    (first.directory / "version.txt").write_text("changed")
    (first.directory / "more.txt").touch()
    git(first.directory, "commit", "-qam", "changed")
    git(first.directory, "tag", "light", "--force")
    second = source.fetch(StopSignal(), lambda _: None)

    assert text_of(second) == "three"
    assert not (second.directory / "more.txt").exists()
    assert text_of(fetch(remote.uri, "light")) == "one"
    source.remove(first)
    assert not first.directory.exists()
    assert text_of(second) == "three"


def test_version_of_local_checkout_leaves_checkout_unchanged(remote: Remote, fetch: Fetch) -> None:
    (remote.work / "version.txt").write_text("not committed")
    before = sorted(path for path in remote.work.rglob("*"))
    copy = fetch(str(remote.work), "annotated")
    inner = fetch(str(remote.work / "sub"), remote.commits["one"])

    assert text_of(copy) == "two"
    assert inner.directory.name == "sub"
    assert inner.commit == remote.commits["one"]
    assert (remote.work / "version.txt").read_text() == "not committed"
    assert git(remote.work, "symbolic-ref", "--short", "HEAD") == "trunk"
    assert sorted(path for path in remote.work.rglob("*")) == before


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("feature/with/slahes", "Did you mean 'feature/with/slashes'"),
        ("0123456789012345678901234567890123456789", "has no branch, tag or commit"),
        ("deadbeef", "has no branch, tag or commit 'deadbeef'"),
        ("trunk~1", "is no version"),
        ("a..b", "is no version"),
        ("refs/heads/*", "is no version"),
    ],
)
def test_unknown_version_raises(version: str, words: str, remote: Remote, fetch: Fetch) -> None:
    with pytest.raises(FetchError, match=words):
        fetch(remote.uri, version)


def test_empty_repository_raises(tmp_path: Path, fetch: Fetch) -> None:
    git(tmp_path, "init", "-q", "--bare", "empty.git")
    with pytest.raises(FetchError, match="has no commit to run"):
        fetch(str(tmp_path / "empty.git"))


def test_checkout_runs_in_place_unless_git_is_requested(remote: Remote, fetch: Fetch) -> None:
    (remote.work / "version.txt").write_text("not committed")

    assert text_of(fetch(remote.work.as_uri())) == "not committed"
    assert text_of(fetch(f"git+{remote.work.as_uri()}")) == "three"
    assert fetch(f"git+{remote.work.as_uri()}#sub").directory.name == "sub"


def test_nested_submodules_are_checked_out(remote: Remote, tmp_path: Path, fetch: Fetch) -> None:
    for name, inner in (("inner", None), ("middle", "inner")):
        git(tmp_path, "init", "-q", "-b", "trunk", name)
        commit(tmp_path / name, name)
        if inner:
            git(tmp_path / name, "submodule", "add", "-q", f"../{inner}", "deeper")
            git(tmp_path / name, "commit", "-qm", "with a submodule")
    git(remote.work, "submodule", "add", "-q", (tmp_path / "middle").as_uri(), "lib/middle")
    git(remote.work, "commit", "-qm", "with a submodule")
    remote.push()

    for _ in range(2):
        copy = fetch(remote.uri)
        assert (copy.directory / "lib/middle/version.txt").read_text() == "middle"
        assert (copy.directory / "lib/middle/deeper/version.txt").read_text() == "inner"


def test_submodule_with_local_path_requires_git_permission(remote: Remote, tmp_path: Path, fetch: Fetch) -> None:
    git(tmp_path, "init", "-q", "-b", "trunk", "other")
    commit(tmp_path / "other", "other")
    git(remote.work, "submodule", "add", "-q", str(tmp_path / "other"), "lib/other")
    git(remote.work, "commit", "-qm", "with a submodule")
    remote.push()

    with pytest.raises(FetchError, match=r"submodule 'lib/other'.*git config --global protocol.file.allow always"):
        fetch(remote.uri)
    Path(os.environ["GIT_CONFIG_GLOBAL"]).write_text('[protocol "file"]\n\tallow = always\n')
    assert (fetch(remote.uri).directory / "lib/other/version.txt").read_text() == "other"


def test_submodule_from_untrusted_source_raises(
    remote: Remote, tmp_path: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q", "-b", "trunk", "other")
    commit(tmp_path / "other", "other")
    git(remote.work, "submodule", "add", "-q", (tmp_path / "other").as_uri(), "other")
    git(remote.work, "commit", "-qm", "with a submodule")
    remote.push()
    monkeypatch.setenv("PREFECT_MLPROJECTS_TRUSTED_SOURCES", f"{remote.root}/*")

    with pytest.raises(FetchError, match="may not run here"):
        fetch(remote.uri)


def test_submodule_with_ext_transport_raises(remote: Remote, tmp_path: Path, fetch: Fetch) -> None:
    (remote.work / ".gitmodules").write_text(
        f'[submodule "x"]\n\tpath = x\n\turl = "ext::sh -c touch% {tmp_path / "pwned"}"\n'
    )
    git(remote.work, "update-index", "--add", "--cacheinfo", f"160000,{remote.commits['one']},x")
    git(remote.work, "add", ".gitmodules")
    git(remote.work, "commit", "-qm", "hostile")
    remote.push()

    with pytest.raises(FetchError, match="submodule 'x' that can't be fetched"):
        fetch(remote.uri)
    assert not (tmp_path / "pwned").exists()


def test_git_lfs_files_are_fetched(remote: Remote, fetch: Fetch, need_program: Callable[[str], str]) -> None:
    need_program("git-lfs")
    git(remote.work, "lfs", "install", "--local")
    git(remote.work, "lfs", "track", "*.bin")
    (remote.work / "data.bin").write_bytes(b"large" * 1000)
    git(remote.work, "add", "-A")
    git(remote.work, "commit", "-qm", "large")
    remote.push()

    assert (fetch(remote.uri).directory / "data.bin").read_bytes() == b"large" * 1000


# Credentials


def test_missing_password_names_credentials_block_to_create(git_http: str, fetch: Fetch, cache: Path) -> None:
    with pytest.raises(FetchError, match=r"git-credentials block for the host 127\.0\.0\.1:\d+") as caught:
        fetch(f"{git_http}/project.git")

    assert "prompt" not in str(caught.value).lower() or "disabled" in str(caught.value)
    assert not list((cache / "working-copies").glob("run-*")) if (cache / "working-copies").exists() else True


def test_wrong_password_raises_authentication_error(git_http: str, fetch: Fetch) -> None:
    wrong = git_http.replace("http://", f"http://{USER}:wrong-one@")
    with pytest.raises(FetchError, match="Authentication failed") as caught:
        fetch(f"{wrong}/project.git")

    assert "wrong-one" not in str(caught.value)


def test_public_repository_needs_no_password(git_http: str, remote: Remote, fetch: Fetch) -> None:
    assert text_of(fetch(f"{git_http}/open/project.git", "annotated")) == "two"


def test_credentials_are_in_no_command_line_log_or_file(
    git_http: str, remote: Remote, fetch: Fetch, cache: Path
) -> None:
    seen: set[str] = set()
    done = threading.Event()

    def watch_processes() -> None:
        while not done.is_set():
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
                except OSError:
                    continue

    watcher = threading.Thread(target=watch_processes)
    watcher.start()
    lines: list[str] = []
    asked: list[str] = []

    def lookup(url: GitUrl) -> GitCredentials | None:
        asked.append(url.url)
        return GitCredentials(USER, TOKEN, hosts=(git_http,))

    with_block = fetch(f"{git_http}/project.git", None, lines.append, lookup)
    in_url = fetch(f"{git_http.replace('http://', f'http://{USER}:{TOKEN}@')}/project.git", "light", lines.append)
    done.set()
    watcher.join()

    assert (text_of(with_block), text_of(in_url)) == ("three", "one")
    assert asked == [f"{git_http}/project.git"]
    assert any("fetch" in line for line in seen)
    assert not any(TOKEN in line for line in seen)
    assert not any(TOKEN in line for line in lines)
    kept = [file for file in cache.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    assert kept == []
    assert TOKEN not in repr(with_block) + repr(in_url)


def test_credentials_for_another_host_are_not_sent(git_http: str, fetch: Fetch) -> None:
    other = GitCredentials(USER, TOKEN, hosts=("github.com",))
    with pytest.raises(FetchError, match="git-credentials block"):
        fetch(f"{git_http}/project.git", credentials=lambda url: other)


def test_credential_helper_of_user_is_used(git_http: str, fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "gitconfig").write_text(
        f'[credential]\n\thelper = "!f() {{ echo username={USER}; echo password={TOKEN}; }}; f"\n'
    )
    assert text_of(fetch(f"{git_http}/project.git")) == "three"
    assert text_of(fetch(f"{git_http.replace('http://', f'http://{USER}@')}/project.git")) == "three"


def test_unreachable_server_is_reported(fetch: Fetch) -> None:
    with pytest.raises(FetchError, match=r"Connection refused|Failed to connect|Couldn't connect"):
        fetch("http://127.0.0.1:9/project.git")
    with pytest.raises(FetchError, match=r"onnection refused"):
        fetch("git://127.0.0.1:9/project.git")


# Many at once, and the end in the middle

FETCHER = """
import sys
from prefect_mlprojects.sources import WorkingCopy, detect_source
from prefect_mlprojects.types import StopSignal
source = detect_source(sys.argv[1], sys.argv[2] or None)
copy = source.fetch(StopSignal(), lambda line: print(line, file=sys.stderr))
print((copy.directory / "version.txt").read_text())
source.remove(copy)
"""


def start_fetcher(uri: str, version: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCHER, uri, version], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_eight_processes_at_once(git_http: str, remote: Remote, cache: Path) -> None:
    uri = f"{git_http}/open/project.git"
    versions = ["", "light", "annotated", "feature/with/slashes", remote.commits["lonely"], "", "trunk", "light"]
    expected = ["three", "one", "two", "feature", "lonely", "three", "three", "one"]
    fetchers = [start_fetcher(uri, version) for version in versions]
    outputs = [fetcher.communicate(timeout=120) for fetcher in fetchers]

    assert [output.strip() for output, _ in outputs] == expected, [errors for _, errors in outputs]
    assert len(list((cache / "repositories").glob("*.git"))) == 1
    assert list((cache / "working-copies").iterdir()) == []


def test_killed_fetch_is_repaired_by_next_fetch(remote: Remote, cache: Path, fetch: Fetch) -> None:
    # A large file that can't be compressed makes the fetch long enough to be killed in the middle.
    (remote.work / "large.bin").write_bytes(os.urandom(60_000_000))
    commit(remote.work, "large")
    remote.push()
    fetcher = start_fetcher(remote.uri)
    deadline = time.monotonic() + 60
    while not list((cache / "repositories").glob("*.git/objects/pack/tmp_*")) and fetcher.poll() is None:
        assert time.monotonic() < deadline
    fetcher.send_signal(signal.SIGKILL)
    fetcher.communicate()
    assert fetcher.returncode == -signal.SIGKILL, "it was done before it could be killed"
    repository = next((cache / "repositories").glob("*.git"))
    (repository / "shallow.lock").touch()

    copy = fetch(remote.uri)
    assert text_of(copy) == "large"
    assert (copy.directory / "large.bin").stat().st_size == 60_000_000
    assert not list((repository / "objects" / "pack").glob("tmp_*"))


def test_broken_cache_is_recreated(remote: Remote, cache: Path, fetch: Fetch) -> None:
    fetch(remote.uri, "light")
    repository = next((cache / "repositories").glob("*.git"))
    (repository / "HEAD").write_text("nonsense\n")

    lines: list[str] = []
    assert text_of(fetch(remote.uri, "annotated", lines.append)) == "two"
    assert any("is broken and is created again" in line for line in lines)


def test_fetch_after_stop_request_is_interrupted(remote: Remote, cache: Path) -> None:
    (remote.work / "large.bin").write_bytes(os.urandom(60_000_000))
    commit(remote.work, "large")
    remote.push()
    stop = StopSignal()
    errors: list[FetchError] = []

    def run() -> None:
        try:
            detect_source(remote.uri).fetch(stop, lambda _: None)
        except FetchError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 60
    while not list((cache / "repositories").glob("*.git/objects/pack/tmp_*")) and thread.is_alive():
        assert time.monotonic() < deadline
    stop.request("enough")
    thread.join(60)

    assert "was stopped: enough" in str(errors[0])
    assert not list((cache / "working-copies").glob("run-*")) if (cache / "working-copies").exists() else True


def test_unwritable_cache_is_reported(
    remote: Remote, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "file"))

    with pytest.raises(FetchError, match=r"can't be kept in the cache.*PREFECT_MLPROJECTS_CACHE_DIR"):
        fetch(remote.uri)


def test_missing_git_is_reported(remote: Remote, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(FetchError, match="The program git was not found"):
        fetch(remote.uri)
