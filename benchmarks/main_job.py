"""Measures the main job against ``mlflow run`` and against bare Prefect, as ratios within one run of this script.

    uv run python benchmarks/main_job.py [--runs 5] [--many 50] [--lines 100000]

It starts an embedded Prefect server of its own in a temporary folder, and stops it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MLPROJECT = """\
name: trivial
entry_points:
  main:
    command: "true"
  lines:
    parameters: {count: int}
    command: "python3 -u lines.py {count}"
"""


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def command(*argv: str) -> Callable[[], object]:
    return lambda: subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def report(name: str, ours: list[float], theirs: list[float], other: str) -> None:
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"| {name} | {a:.2f} s | {b:.2f} s ({other}) | {a / b:.2f} |", flush=True)


def command_line(project: Path, runs: int) -> None:
    bin_directory = Path(sys.executable).parent
    ours = command(str(bin_directory / "mlprojects"), "run", str(project), "--env-manager", "local")
    theirs = command(str(bin_directory / "mlflow"), "run", str(project), "--env-manager", "local")
    ours(), theirs()
    pairs = [(timed(ours), timed(theirs)) for _ in range(runs)]
    report("`mlprojects run` of a trivial project", [a for a, _ in pairs], [b for _, b in pairs], "mlflow run")


def again_in_one_process(project: Path, runs: int) -> None:
    import asyncio
    import logging

    from prefect import flow, task

    from prefect_mlprojects import run

    logging.getLogger("prefect").setLevel(logging.CRITICAL)

    @task
    def sync_step(number: int) -> int:
        if number == 3:
            subprocess.run(["bash", "-c", "true"], check=True)
        return number

    @flow
    def sync_flow() -> None:
        for number in range(4):
            sync_step(number)

    @task
    async def async_step(number: int) -> int:
        if number == 3:
            await asyncio.to_thread(subprocess.run, ["bash", "-c", "true"], check=True)
        return number

    @flow
    async def async_flow() -> None:
        for number in range(4):
            await async_step(number)

    def ours() -> object:
        return run(str(project), env_manager="local")

    ours(), sync_flow(), asyncio.run(async_flow())  # type: ignore[arg-type]
    rows = [
        (timed(ours), timed(sync_flow), timed(lambda: asyncio.run(async_flow())))  # type: ignore[arg-type]
        for _ in range(runs)
    ]
    report("`run()` again in one process", [a for a, _, _ in rows], [b for _, b, _ in rows], "bare sync flow, 4 tasks")
    report("`run()` again in one process", [a for a, _, _ in rows], [c for _, _, c in rows], "bare async flow, 4 tasks")


def many_at_once(project: Path, many: int) -> None:
    import mlflow.projects

    from prefect_mlprojects import run

    def ours() -> None:
        handles = [run(str(project), env_manager="local", synchronous=False) for _ in range(many)]
        assert all(handle.wait() for handle in handles)

    def theirs() -> None:
        handles = [
            mlflow.projects.run(str(project), parameters={}, env_manager="local", synchronous=False)
            for _ in range(many)
        ]
        assert all(handle.wait() for handle in handles)

    report(f"{many} asynchronous runs", [timed(ours)], [timed(theirs)], "mlflow.projects.run")


def many_lines(project: Path, lines: int) -> None:
    from prefect_mlprojects import run

    def child() -> object:
        return subprocess.run(["python3", "-u", "lines.py", str(lines)], cwd=project, check=True, capture_output=True)

    run(str(project), env_manager="local")
    saved = os.dup(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        printing = timed(lambda: run(str(project), "lines", parameters={"count": lines}, env_manager="local"))
        quiet = timed(lambda: run(str(project), env_manager="local"))
    finally:
        os.dup2(saved, 1)
    print(
        f"| {lines} lines of output | {printing:.2f} s | {quiet + timed(child):.2f} s (a run without output, and the child) |",
        end="",
    )
    print(f" {printing / (quiet + timed(child)):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--many", type=int, default=50)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--only", choices=["cli", "again", "lines", "many"], action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ.update(
            PREFECT_HOME=str(root / "prefect"),
            PREFECT_MLPROJECTS_SERVER_PORT="4290",
            PREFECT_MLPROJECTS_CACHE_DIR=str(root / "cache"),
            MLFLOW_TRACKING_URI=f"sqlite:///{root}/mlflow.db",
        )
        os.environ.pop("PREFECT_API_URL", None)
        # mlflow.projects starts the command `mlflow` for each asynchronous run.
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        project = root / "project"
        project.mkdir()
        (project / "MLproject").write_text(MLPROJECT)
        (project / "lines.py").write_text("import sys\nfor n in range(int(sys.argv[1])):\n    print('line', n)\n")
        os.chdir(root)
        from prefect_mlprojects.server.process import ensure_server, stop_server

        address = ensure_server()
        os.environ["PREFECT_API_URL"] = address.api_url
        try:
            print("| what | ours | the other | ratio |\n| --- | --- | --- | --- |")
            chosen = options.only or ["cli", "again", "lines", "many"]
            if "cli" in chosen:
                command_line(project, options.runs)
            if "again" in chosen:
                again_in_one_process(project, options.runs)
            if "lines" in chosen:
                many_lines(project, options.lines)
            if "many" in chosen:
                many_at_once(project, options.many)
        finally:
            stop_server()


if __name__ == "__main__":
    main()
