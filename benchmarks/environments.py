"""Measures the environment of scikit-learn and pandas, cold and warm, against ``mlflow run``, as ratios within one run.

    uv run python benchmarks/environments.py [--warm-runs 3] [--managers uv virtualenv]

Cold means: no environment yet, and the caches of uv and pip empty, so that all packages are downloaded. Warm is the same
command again. Everything is kept in a temporary folder; the embedded Prefect server is started before the clock. MLflow's
virtualenv manager needs pyenv on PATH.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

MLPROJECT = """\
name: sklearn
python_env: python_env.yaml
entry_points:
  main:
    command: "python -c 'import sklearn, pandas'"
"""
PYTHON_ENV = """\
python: "{version}"
build_dependencies: [pip, setuptools, wheel]
dependencies: [scikit-learn==1.5.2, pandas==2.2.3, numpy==2.1.3]
"""
RESOLVE = """\
import sys, time
from pathlib import Path
from prefect_mlprojects.environments.managers import environment_manager
from prefect_mlprojects.spec import load_project
from prefect_mlprojects.types import StopSignal
project = load_project(Path(sys.argv[1]))
start = time.perf_counter()
manager = environment_manager(sys.argv[2])
made = manager.prepare(project, manager.plan(project), print, StopSignal())
assert made.reused
print(time.perf_counter() - start)
"""


def timed(command: list[str], variables: Mapping[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return seconds


def compare(manager: str, project: Path, root: Path, warm_runs: int) -> None:
    folder = root / manager
    programs = Path(sys.executable).parent

    def variables(who: str) -> dict[str, str]:
        own = folder / who
        return {
            **os.environ,
            # MLflow looks for virtualenv and uv on PATH.
            "PATH": os.pathsep.join((str(programs), os.environ["PATH"])),
            "UV_CACHE_DIR": str(own / "uv"),
            "PIP_CACHE_DIR": str(own / "pip"),
            "MLFLOW_ENV_ROOT": str(own / "environments"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{own}.db",
            "PREFECT_MLPROJECTS_CACHE_DIR": str(own / "cache"),
        }

    def run(who: str) -> float:
        return timed([str(programs / who), "run", str(project), "--env-manager", manager], variables(who))

    for who in ("mlprojects", "mlflow"):
        # The tracking database is made before the clock, too.
        (folder / who).mkdir(parents=True)
        timed([str(programs / "mlflow"), "experiments", "search"], variables(who))
    report(f"{manager}, cold", run("mlprojects"), run("mlflow"))
    pairs = [(run("mlprojects"), run("mlflow")) for _ in range(warm_runs)]
    report(f"{manager}, warm", statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs))
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, str(project), manager],
        env=variables("mlprojects"),
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"| {manager}, warm: finding the environment alone | {float(done.stdout):.3f} s | | |", flush=True)


def report(name: str, ours: float, theirs: float) -> None:
    print(f"| {name} | {ours:.2f} s | {theirs:.2f} s | {ours / theirs:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--warm-runs", type=int, default=3)
    parser.add_argument("--managers", nargs="+", default=["uv", "virtualenv"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlp-bench-") as folder:
        root = Path(folder)
        os.environ.update(
            PREFECT_HOME=str(root / "prefect"),
            PREFECT_MLPROJECTS_SERVER_PORT=os.environ.get("PREFECT_MLPROJECTS_SERVER_PORT", "4290"),
            PREFECT_MLPROJECTS_SERVER_DIR=str(root / "server"),
        )
        os.environ.pop("PREFECT_API_URL", None)
        # With it, what uv installs would be compiled anew by every import.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        project = root / "project"
        project.mkdir()
        (project / "MLproject").write_text(MLPROJECT)
        (project / "python_env.yaml").write_text(PYTHON_ENV.format(version=platform.python_version()))
        mlprojects = str(Path(sys.executable).with_name("mlprojects"))
        subprocess.run([mlprojects, "server", "start"], check=True, capture_output=True)
        try:
            print("| scikit-learn and pandas | mlprojects run | mlflow run | ratio |\n|---|---|---|---|", flush=True)
            for manager in options.managers:
                compare(manager, project, root, options.warm_runs)
        finally:
            subprocess.run([mlprojects, "server", "stop"], check=False, capture_output=True)


if __name__ == "__main__":
    main()
