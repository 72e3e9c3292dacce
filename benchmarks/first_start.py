"""Measures the embedded server's first start, as ratios within one run.

    uv run python benchmarks/first_start.py [--runs 5]

Three ways to a database: `ready` finds an empty one that is already migrated (the least that any way can take, and what a
schema shipped as SQL comes close to), `ours` migrates a new one as the package does, `prefect` lets Prefect migrate an
empty file. Ratios are medians of ours / the other in the same round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prefect_mlprojects.server.process import ensure_server, stop_server

CREATE = "import sys; from prefect_mlprojects.server.application import ensure_sqlite_database as e; e(sys.argv[1])"


def start_and_stop(folder: Path, prepare: Callable[[Path], object]) -> float:
    """Returns the seconds until a new server with a prepared database answers."""
    os.environ["PREFECT_MLPROJECTS_SERVER_DIR"] = str(folder)
    folder.mkdir()
    prepare(folder / "prefect.db")
    started = time.monotonic()
    ensure_server(lambda _: None)
    seconds = time.monotonic() - started
    stop_server()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs: int = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["PREFECT_HOME"] = str(root / "home")
        for variable in [variable for variable in os.environ if variable.startswith("PREFECT_") and "API" in variable]:
            del os.environ[variable]
        ready = root / "ready.db"
        subprocess.run([sys.executable, "-c", CREATE, f"sqlite+aiosqlite:///{ready}"], check=True)
        start_and_stop(root / "warm-up", lambda _: None)
        ways: dict[str, Callable[[Path], object]] = {
            "ready": lambda path: shutil.copyfile(ready, path),
            "ours": lambda _: None,
            "prefect": lambda path: path.touch(),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(runs):
            for way, prepare in ways.items():
                seconds[way].append(start_and_stop(root / f"{way}-{number}", prepare))
            print("  ".join(f"{way} {times[-1]:.1f} s" for way, times in seconds.items()), file=sys.stderr)
    for way, times in seconds.items():
        ratio = statistics.median(ours / other for ours, other in zip(seconds["ours"], times, strict=True))
        print(f"{way:8} median {statistics.median(times):5.1f} s   ours / {way}: {ratio:.2f}")


if __name__ == "__main__":
    main()
