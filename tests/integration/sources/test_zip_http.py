"""Zip archives behind a real http server."""

from __future__ import annotations

import functools
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.types import StopSignal


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_zip_archive_over_http_is_unpacked(site: tuple[str, Path], cache: Path) -> None:
    address, folder = site
    with zipfile.ZipFile(folder / "p.zip", "w") as archive:
        archive.writestr("sub/MLproject", "name: zipped")
        archive.writestr("README", "")
    source = detect_source(f"{address}/p.zip#sub")
    copy = source.fetch(StopSignal(), lambda _: None)

    assert (copy.directory / "MLproject").read_text() == "name: zipped"
    assert copy.source_name == f"{address}/p.zip#sub"
    source.remove(copy)
    assert list((cache / "working-copies").iterdir()) == []


@pytest.mark.parametrize(("name", "words"), [("missing.zip", "no such file"), ("text.zip", "no zip archive")])
def test_missing_or_invalid_archive_is_rejected(name: str, words: str, site: tuple[str, Path], cache: Path) -> None:
    address, folder = site
    (folder / "text.zip").write_text("<html>Sign in</html>")
    with pytest.raises(FetchError, match=words):
        detect_source(f"{address}/{name}").fetch(StopSignal(), lambda _: None)
    assert list((cache / "working-copies").iterdir()) == []
