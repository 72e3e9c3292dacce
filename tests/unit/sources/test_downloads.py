from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.memory
import pytest

from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources import downloads
from prefect_mlprojects.sources.downloads import download, download_all
from prefect_mlprojects.types import StopSignal


def fetch(uri: str, directory: Path, **options: Any) -> Path:
    return download(uri, directory, report=lambda line: None, stop=StopSignal(), **options)


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


class WebServer(ThreadingHTTPServer):
    """Answers with what ``answers`` holds for a path: the last one stays, those before it are given once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[tuple[int, bytes, int | None]]] = {}
        self.requests: list[str] = []
        self.etags: dict[str, str] = {}
        self.stalled = threading.Event()
        self.go_on = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: WebServer

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        answers = self.server.answers.get(self.path.partition("?")[0], [(404, b"", None)])
        status, body, length = answers.pop(0) if len(answers) > 1 and with_body else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if self.path in self.server.etags:
            self.send_header("ETag", self.server.etags[self.path])
        self.end_headers()
        if with_body:
            self.wfile.write(body)
            if length is not None and body.startswith(b"stall"):
                self.wfile.flush()
                # The client is to have read what there is, so that it waits for more when it is stopped.
                time.sleep(0.5)
                self.server.stalled.set()
                self.server.go_on.wait(120)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shared downloads."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(folder))
    monkeypatch.setattr(downloads, "_FIRST_PAUSE_SECONDS", 0.01)
    return folder / "downloads"


def test_file_download_keeps_name_and_bytes(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/bucket/data.csv", b"a,b\r\n\0\xff")

    file = fetch("memory://bucket/data.csv", tmp_path)

    assert file.name == "data.csv"
    assert file.is_absolute()
    assert file.read_bytes() == b"a,b\r\n\0\xff"
    assert file.is_relative_to(tmp_path)


def test_folder_download_keeps_tree(memory: Any, tmp_path: Path) -> None:
    memory.pipe({"/bucket/set/a.txt": b"1", "/bucket/set/deep/er/b.txt": b"2", "/bucket/settle": b"not this"})

    folder = fetch("memory://bucket/set", tmp_path)

    assert folder.name == "set"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {"a.txt": b"1", "deep/er/b.txt": b"2"}


def test_downloads_with_same_name_get_separate_folders(memory: Any, tmp_path: Path) -> None:
    memory.pipe({"/one/data.csv": b"1", "/two/data.csv": b"2"})

    first, second = fetch("memory://one/data.csv", tmp_path), fetch("memory://two/data.csv", tmp_path)

    assert (first.read_bytes(), second.read_bytes()) == (b"1", b"2")


def test_local_file_uri_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "with space.txt"
    source.write_text("x")

    file = fetch(f"file://{source}", tmp_path / "downloads")

    assert file.read_text() == "x"
    assert file != source


def test_http_file_is_downloaded(web: WebServer, tmp_path: Path) -> None:
    web.answers["/d/data.csv"] = [(200, b"x" * 100_000, None)]

    file = fetch(web.url("/d/data.csv?token=abc"), tmp_path)

    assert file.name == "data.csv"
    assert file.read_bytes() == b"x" * 100_000


def test_server_error_is_retried(web: WebServer, tmp_path: Path) -> None:
    web.answers["/data.csv"] = [(503, b"busy", None), (200, b"good", None)]
    lines: list[str] = []

    file = download(web.url("/data.csv"), tmp_path, report=lines.append, stop=StopSignal())

    assert file.read_bytes() == b"good"
    assert any("trying again" in line for line in lines)


def test_truncated_transfer_exhausts_retries_and_leaves_nothing(web: WebServer, tmp_path: Path) -> None:
    web.answers["/data.csv"] = [(200, b"half", 8)]
    web.go_on.set()

    with pytest.raises(FetchError, match="can't be downloaded"):
        fetch(web.url("/data.csv"), tmp_path)

    assert web.requests.count("/data.csv") == 4
    assert list(tmp_path.iterdir()) == []


def test_http_403_fails_without_retry(web: WebServer, tmp_path: Path) -> None:
    web.answers["/data.csv"] = [(403, b"no", None)]

    with pytest.raises(FetchError, match="403"):
        fetch(web.url("/data.csv"), tmp_path)

    assert len(web.requests) == 1


def test_unreachable_server_raises_fetch_error(web: WebServer, tmp_path: Path) -> None:
    uri = web.url("/data.csv")
    web.shutdown()
    web.server_close()

    with pytest.raises(FetchError, match=r"Cannot connect|refused"):
        fetch(uri, tmp_path)


def test_missing_file_fails_without_retry(web: WebServer, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no such file or folder"):
        fetch(web.url("/nothing"), tmp_path)

    assert len(web.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_secrets_in_the_uri_are_redacted(web: WebServer, tmp_path: Path) -> None:
    uri = web.url("/nothing?token=hunter2").replace("http://", "http://me:hunter3@")

    with pytest.raises(FetchError) as caught:
        fetch(uri, tmp_path)

    assert "hunter" not in str(caught.value)
    assert "hunter" not in caught.value.uri


def test_missing_driver_error_names_extra(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r'no driver for it is installed. pip install "prefect-mlprojects\[azure\]"'):
        fetch("abfs://container@account.dfs.core.windows.net/data.csv", tmp_path)


def test_unknown_protocol_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="Protocol not known: nonsense"):
        fetch("nonsense://x/y", tmp_path)


def test_path_traversal_in_file_name_is_rejected(memory: Any, tmp_path: Path) -> None:
    memory.store["/bucket/set/../../evil.txt"] = fsspec.implementations.memory.MemoryFile(
        memory, "/bucket/set/../../evil.txt", b"boo"
    )

    with pytest.raises(FetchError, match="would be written outside of its folder"):
        fetch("memory://bucket/set", tmp_path)

    assert list(tmp_path.rglob("*.txt")) == []


def test_uncreatable_folder_error_suggests_storage_dir(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/bucket/data.csv", b"1")
    (tmp_path / "file").touch()

    with pytest.raises(FetchError, match="Set storage_dir to a folder that can be written"):
        fetch("memory://bucket/data.csv", tmp_path / "file")


def test_download_on_stop_request_aborts_and_leaves_nothing(web: WebServer, tmp_path: Path) -> None:
    web.answers["/big"] = [(200, b"stall", 20_000_000)]
    stop = StopSignal()
    caught: list[BaseException] = []

    def work() -> None:
        try:
            download(web.url("/big"), tmp_path, report=lambda line: None, stop=stop)
        except FetchError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert web.stalled.wait(30)
    stop.request("cancelled by a test")
    thread.join(60)

    assert not thread.is_alive()
    assert "was stopped: cancelled by a test" in str(caught[0])
    assert list(tmp_path.iterdir()) == []


def test_several_files_are_returned_by_parameter_name(memory: Any, tmp_path: Path) -> None:
    memory.pipe({f"/bucket/{number}.txt": str(number).encode() for number in range(9)})

    files = download_all(
        {str(number): f"memory://bucket/{number}.txt" for number in range(9)},
        tmp_path / "new",
        report=lambda line: None,
        stop=StopSignal(),
    )

    assert {name: path.read_text() for name, path in files.items()} == {str(n): str(n) for n in range(9)}


def test_download_all_without_uris_creates_no_folder(tmp_path: Path) -> None:
    assert download_all({}, tmp_path / "new", report=lambda line: None, stop=StopSignal()) == {}
    assert not (tmp_path / "new").exists()


def test_when_one_fails_nothing_is_left(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/bucket/good.txt", b"1")

    with pytest.raises(FetchError, match=r"bad\.txt can't be downloaded"):
        download_all(
            {"good": "memory://bucket/good.txt", "bad": "memory://bucket/bad.txt"},
            tmp_path,
            report=lambda line: None,
            stop=StopSignal(),
        )

    assert list(tmp_path.iterdir()) == []


def test_download_all_after_stop_request_downloads_nothing(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/bucket/data.csv", b"1")
    stop = StopSignal()
    stop.request("enough")

    with pytest.raises(FetchError, match="was stopped: enough"):
        download_all({"data": "memory://bucket/data.csv"}, tmp_path, report=lambda line: None, stop=stop)

    assert list(tmp_path.iterdir()) == []


def test_download_after_two_transient_errors_succeeds(web: WebServer, tmp_path: Path) -> None:
    web.answers["/data.csv"] = [(503, b"busy", None), (429, b"slow down", None), (200, b"good", None)]

    assert fetch(web.url("/data.csv"), tmp_path).read_bytes() == b"good"
    assert len(web.requests) == 3


def test_file_with_etag_is_downloaded_once(web: WebServer, tmp_path: Path, cache: Path) -> None:
    web.answers["/data.csv"] = [(200, b"a,b", None)]
    web.etags["/data.csv"] = '"one"'
    first = fetch(web.url("/data.csv"), tmp_path / "first")
    lines: list[str] = []

    second = download(web.url("/data.csv"), tmp_path / "second", report=lines.append, stop=StopSignal())

    assert web.requests == ["/data.csv"]
    assert second.read_bytes() == b"a,b"
    assert first.parent != second.parent
    assert second.samefile(first)
    assert not second.stat().st_mode & 0o222
    assert lines[1:] == [f"{web.url('/data.csv')} has been downloaded before and is unchanged"]
    web.answers["/data.csv"], web.etags["/data.csv"] = [(200, b"new", None)], '"two"'
    assert fetch(web.url("/data.csv"), tmp_path / "third").read_bytes() == b"new"
    assert first.read_bytes() == b"a,b"


def test_file_without_etag_is_downloaded_each_time(web: WebServer, tmp_path: Path, cache: Path) -> None:
    web.answers["/data.csv"] = [(200, b"a,b", None)]

    files = [fetch(web.url("/data.csv"), tmp_path) for _ in range(2)]

    assert web.requests == ["/data.csv"] * 2
    files[0].write_bytes(b"it is the run's own")
    assert files[1].read_bytes() == b"a,b"
    assert not cache.exists()


def test_modified_cached_file_is_downloaded_again(web: WebServer, tmp_path: Path) -> None:
    web.answers["/data.csv"] = [(200, b"a,b", None)]
    web.etags["/data.csv"] = 'W/"weak"'
    first = fetch(web.url("/data.csv"), tmp_path)
    first.chmod(0o644)
    first.write_bytes(b"x,y,z")

    assert fetch(web.url("/data.csv"), tmp_path).read_bytes() == b"a,b"
    assert first.read_bytes() == b"x,y,z"


def test_truncated_transfer_with_etag_leaves_no_cache_entry(web: WebServer, tmp_path: Path, cache: Path) -> None:
    web.answers["/data.csv"] = [(200, b"half", 8)]
    web.etags["/data.csv"] = '"one"'
    web.go_on.set()

    with pytest.raises(FetchError, match="can't be downloaded"):
        fetch(web.url("/data.csv"), tmp_path)

    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == []
    assert list(tmp_path.iterdir()) == []


def test_file_changed_during_download_is_fetched_again(web: WebServer, tmp_path: Path) -> None:
    """Its new content must not be taken for what the old tag names."""

    class Changing(list[tuple[int, bytes, int | None]]):
        def pop(self, *_: Any) -> tuple[int, bytes, int | None]:
            web.etags["/data.csv"] = '"two"'
            return super().pop(0)

    web.etags["/data.csv"] = '"one"'
    web.answers["/data.csv"] = Changing([(200, b"new", None), (200, b"new", None)])
    lines: list[str] = []
    download(web.url("/data.csv"), tmp_path, report=lines.append, stop=StopSignal())
    assert len(web.requests) == 2
    assert "it changed while it was downloaded" in lines[1]

    web.etags["/data.csv"], web.answers["/data.csv"] = '"one"', [(200, b"old", None)]
    assert fetch(web.url("/data.csv"), tmp_path).read_bytes() == b"old"


def test_cache_key_excludes_secret_in_uri(web: WebServer, tmp_path: Path, cache: Path) -> None:
    web.answers["/data.csv"] = [(200, b"a,b", None)]
    web.etags["/data.csv?token=one"] = web.etags["/data.csv?token=two"] = '"one"'
    for token in ("one", "two"):
        fetch(web.url(f"/data.csv?token={token}"), tmp_path)
    assert len(web.requests) == 1


class TaggedFileSystem(fsspec.implementations.memory.MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in memory that tells tags, as S3 does; it stands for stores that can't be had here."""

    protocol = "tagged"
    store: dict[str, Any] = {}  # noqa: RUF012 - as the base class has it
    pseudo_dirs = [""]  # noqa: RUF012
    fetched: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("tagged://")))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return self._tagged(super().info(path, **options))

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        found = super().find(path, *arguments, **options)
        return {name: self._tagged(facts) for name, facts in found.items()} if isinstance(found, dict) else found

    def _tagged(self, facts: dict[str, Any]) -> dict[str, Any]:
        tag = str(hash(self.store[facts["name"]].getvalue())) if facts["type"] == "file" else None
        return {**facts, "ETag": tag}

    def get_file(self, rpath: str, lpath: Any, **options: Any) -> None:
        self.fetched.append(rpath)
        super().get_file(rpath, lpath, **options)


def test_folder_with_etags_is_downloaded_once(tmp_path: Path) -> None:
    fsspec.register_implementation("tagged", TaggedFileSystem, clobber=True)
    store = fsspec.filesystem("tagged")
    store.pipe({"/bucket/set/a.txt": b"1", "/bucket/set/deep/b.txt": b"22"})

    def tree(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    for _ in range(2):
        folder = fetch("tagged://bucket/set", tmp_path)
        assert folder.name == "set"
        assert tree(folder) == {"a.txt": b"1", "deep/b.txt": b"22"}
        (folder / "own.txt").write_text("a run may add files")
    assert len([name for name in store.fetched if name.endswith(".txt")]) == 2
    store.pipe("/bucket/set/deep/b.txt", b"333")
    assert tree(fetch("tagged://bucket/set", tmp_path))["deep/b.txt"] == b"333"


DOWNLOAD = """
import sys
from pathlib import Path
from prefect_mlprojects.sources.downloads import download
from prefect_mlprojects.types import StopSignal
print("ready", flush=True)
sys.stdin.readline()
print(download(sys.argv[1], Path(sys.argv[2]), report=print, stop=StopSignal()).read_bytes()[:5])
"""


def start(uri: str, folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", DOWNLOAD, uri, str(folder)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    return process


def test_eight_processes_download_a_file_once(web: WebServer, tmp_path: Path) -> None:
    web.answers["/big"] = [(200, b"x" * 3_000_000, None)]
    web.etags["/big"] = '"one"'
    processes = [start(web.url("/big"), tmp_path / str(number)) for number in range(8)]
    for process in processes:
        assert process.communicate(timeout=120)[0].endswith("b'xxxxx'\n")
        assert process.returncode == 0
    assert web.requests == ["/big"]


def test_killed_download_is_repeated(web: WebServer, tmp_path: Path, cache: Path) -> None:
    web.answers["/big"] = [(200, b"stall", 2_000_000), (200, b"whole", None)]
    web.etags["/big"] = '"one"'
    process = start(web.url("/big"), tmp_path)
    assert web.stalled.wait(60)
    process.kill()
    process.communicate()
    web.go_on.set()
    assert list(cache.glob(".partial-*"))

    assert fetch(web.url("/big"), tmp_path).read_bytes() == b"whole"
    assert not list(cache.glob(".partial-*"))


def test_unused_entries_are_removed_when_a_new_one_is_added(web: WebServer, tmp_path: Path, cache: Path) -> None:
    for name in ("old", "new", "more"):
        web.answers[f"/{name}"] = [(200, name.encode(), None)]
        web.etags[f"/{name}"] = f'"{name}"'
    kept = fetch(web.url("/old"), tmp_path)
    fetch(web.url("/new"), tmp_path)
    for stamps in cache.glob("*/stamps.json"):
        if "old" in stamps.read_text():
            os.utime(stamps, (0, 0))

    fetch(web.url("/more"), tmp_path)

    names = {file.name for file in cache.glob("*/content/*")}
    assert names == {"new", "more"}
    assert kept.read_bytes() == b"old"


def test_unwritable_cache_is_bypassed(web: WebServer, tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    web.answers["/data.csv"] = [(200, b"a,b", None)]
    web.etags["/data.csv"] = '"one"'

    assert [fetch(web.url("/data.csv"), tmp_path).read_bytes() for _ in range(2)] == [b"a,b"] * 2
    assert len(web.requests) == 2
