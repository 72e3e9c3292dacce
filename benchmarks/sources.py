"""Measures how long it takes to fetch a project from a large git repository, against MLflow, as ratios within one run.

    uv run python benchmarks/sources.py [--commits 5000] [--megabytes 200] [--runs 5]

It makes a repository of so many commits and so much history in a temporary folder. Ours keeps what it fetched; MLflow clones again
for each run.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = 500


def history(commits: int, megabytes: int) -> Iterator[bytes]:
    """A stream for ``git fast-import``: each commit writes one of the files anew, with bytes that can't be compressed."""
    size = megabytes * 1_000_000 // commits
    project = b"name: large\nentry_points:\n  main: {command: 'true'}\n"
    for number in range(commits):
        content = os.urandom(size)
        yield b"commit refs/heads/main\ncommitter A <a@example.com> %d +0000\ndata 1\nx\n" % (1_700_000_000 + number)
        yield b"M 100644 inline data/%d.bin\ndata %d\n" % (number % FILES, size) + content + b"\n"
        if number == 0:
            yield b"M 100644 inline MLproject\ndata %d\n" % len(project) + project + b"\n"


def make_repository(folder: Path, commits: int, megabytes: int) -> None:
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(folder)], check=True)
    importer = subprocess.Popen(["git", "-C", str(folder), "fast-import", "--quiet"], stdin=subprocess.PIPE)
    assert importer.stdin is not None
    for piece in history(commits, megabytes):
        importer.stdin.write(piece)
    importer.stdin.close()
    assert importer.wait() == 0


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Gives the repositories of a folder by git's own protocol; MLflow runs a bare one that it finds by its path in place."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["git", "daemon", "--export-all", f"--base-path={folder}", f"--port={port}", "--listen=127.0.0.1"]
    daemon = subprocess.Popen(command, start_new_session=True)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"git://127.0.0.1:{port}"
    finally:
        os.killpg(daemon.pid, 15)
        daemon.wait()


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ours(uri: str, version: str | None) -> None:
    from prefect_mlprojects.sources import detect_source
    from prefect_mlprojects.types import StopSignal

    source = detect_source(uri, version)
    copy = source.fetch(StopSignal(), lambda _: None)
    assert (copy.directory / "MLproject").is_file()
    source.remove(copy)


def theirs(uri: str, version: str | None) -> None:
    import shutil

    from mlflow.projects import utils

    shutil.rmtree(utils._fetch_project(uri, version))  # type: ignore[no-untyped-call]


def report(name: str, a: float, b: float) -> None:
    print(f"| {name} | {a:.2f} s | {b:.2f} s | {a / b:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--commits", type=int, default=5000)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    import mlflow.projects.utils  # noqa: F401 - its import is not what is measured

    with tempfile.TemporaryDirectory() as place, serve(Path(place)) as address:
        uri = f"{address}/large.git"
        os.environ["PREFECT_MLPROJECTS_CACHE_DIR"] = str(Path(place) / "cache")
        make_repository(Path(place) / "large.git", options.commits, options.megabytes)
        tip = subprocess.run(
            ["git", "-C", str(Path(place) / "large.git"), "rev-parse", "main"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        print(f"{options.commits} commits, {options.megabytes} MB of history\n")
        print("| fetch | ours | MLflow | ratio |\n| --- | --- | --- | --- |")
        report("the default branch, first time", timed(lambda: ours(uri, None)), timed(lambda: theirs(uri, None)))
        for name, version in (("the default branch, again", None), ("a SHA, again", tip)):
            pairs = [
                (timed(lambda v=version: ours(uri, v)), timed(lambda v=version: theirs(uri, v)))
                for _ in range(options.runs)
            ]  # type: ignore[misc]
            report(name, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs))


if __name__ == "__main__":
    main()
