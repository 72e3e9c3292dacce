"""Measures runs of a Docker project that build an image, against ``mlflow run``, as ratios within one run of this script.

    uv run python benchmarks/docker.py [--image busybox:latest] [--runs 3] [--megabytes 50]

It needs a Docker engine (``DOCKER_HOST``, or the default one) with the image on it. Three pairs: the first run, a second one with
nothing changed, and one with a changed file. The embedded Prefect server of the user is used.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def make_project(folder: Path, image: str, megabytes: int) -> None:
    folder.mkdir()
    (folder / "MLproject").write_text(
        f"name: {folder.name}\ndocker_env: {{image: '{image}'}}\nentry_points:\n  main: {{command: 'true'}}\n"
    )
    (folder / "changing.txt").write_text("0")
    for number in range(megabytes):
        (folder / f"data-{number}.bin").write_bytes(os.urandom(1_000_000))


def report(name: str, ours: list[float], theirs: list[float]) -> None:
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"| {name} | {a:.2f} s | {b:.2f} s | {a / b:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--image", default="busybox:latest")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=50)
    options = parser.parse_args()
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as place:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(place) / 'store' / 'mlflow.db'}"
        (Path(place) / "store").mkdir()
        os.chdir(Path(place) / "store")
        folders = {name: Path(place) / f"benchmark-{name}" for name in ("mlprojects", "mlflow")}
        for folder in folders.values():
            make_project(folder, options.image, options.megabytes)

        def run(name: str) -> float:
            return timed(str(programs / name), "run", str(folders[name]), "--build-image")

        # Starts the Prefect server and makes the store, which is not what is measured.
        warm = Path(place) / "warm"
        make_project(warm, options.image, 0)
        timed(str(programs / "mlprojects"), "run", str(warm))
        print(
            f"a project of {options.megabytes} MB\n\n| run | ours | `mlflow run` | ratio |\n| --- | --- | --- | --- |"
        )
        report("first", [run("mlprojects")], [run("mlflow")])
        pairs = [(run("mlprojects"), run("mlflow")) for _ in range(options.runs)]
        report("again, nothing changed", [a for a, _ in pairs], [b for _, b in pairs])
        pairs = []
        for number in range(options.runs):
            for folder in folders.values():
                (folder / "changing.txt").write_text(str(number + 1))
            pairs.append((run("mlprojects"), run("mlflow")))
        report("again, one file changed", [a for a, _ in pairs], [b for _, b in pairs])


if __name__ == "__main__":
    main()
