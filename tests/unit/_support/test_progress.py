"""Progress reports: receivers and values."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_mlprojects._support.progress import report_progress, send_progress_to
from prefect_mlprojects.sources.downloads import download_all
from prefect_mlprojects.types import StopSignal


def test_progress_reaches_only_threads_of_its_context() -> None:
    received: list[tuple[str, float]] = []

    async def listen() -> None:
        with send_progress_to(lambda what, fraction: received.append((what, fraction))):
            await asyncio.to_thread(report_progress, "work", 1, 4)
        report_progress("later", 1, 2)

    asyncio.run(listen())
    thread = threading.Thread(target=report_progress, args=("elsewhere", 1, 2))
    thread.start()
    thread.join()
    assert received == [("work", 0.25)]


@pytest.mark.parametrize(("done", "total", "received"), [(5, 4, [1.0]), (-1, 4, [0.0]), (1, 0, []), (0, 3, [0.0])])
def test_fraction_is_clamped_between_0_and_1(done: float, total: float, received: list[float]) -> None:
    reported: list[float] = []
    with send_progress_to(lambda _, fraction: reported.append(fraction)):
        report_progress("work", done, total)
    assert reported == received


@pytest.fixture
def big_file(tmp_path: Path) -> Iterator[str]:
    """The address of a file of 8 MB on a web server."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "big.bin").write_bytes(b"x" * 8_000_000)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "served"))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/big.bin"
        server.shutdown()


def test_download_reports_its_progress(big_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    reported: list[tuple[str, float]] = []
    with send_progress_to(lambda what, fraction: reported.append((what, fraction))):
        download_all({"data": big_file}, tmp_path / "here", report=lambda _: None, stop=StopSignal())
    assert {what for what, _ in reported} == {f"downloading {big_file}"}
    fractions = [fraction for _, fraction in reported]
    assert fractions == sorted(fractions)
    assert len(fractions) > 1
    assert fractions[-1] == 1.0
