"""Several processes that want one conda environment, and processes that are killed while they build it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.services.waiting import wait_for

PREPARE = """
import json, os, signal, sys
from pathlib import Path
from prefect_mlprojects.environments.managers import environment_manager
from prefect_mlprojects.spec.project import Project, CondaEnvironment
from prefect_mlprojects.types import StopSignal

directory = Path(sys.argv[1])
project = Project(directory, None, "demo", {}, CondaEnvironment(directory / "conda.yaml"))
manager = environment_manager("conda")
print("ready", flush=True)
sys.stdin.readline()


def report(line):
    if line.startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)


made = manager.prepare(project, manager.plan(project), report, StopSignal())
print(json.dumps({"reused": made.reused, "location": str(made.plan.location)}))
"""


def start(project: Any, die_at: str = "never") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(project.directory), die_at]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def project(workshop: Any, kit: Any, conda: Any, pythons: Any) -> Any:
    text = conda.yaml([pythons], "python", more="  - pip: [--no-index, ./tiny]\n")
    return workshop.project({**kit.package("tiny"), "conda.yaml": text})


def builds(project: Any) -> int:
    log: Path = project.directory / "tiny/builds.log"
    return log.read_text().count("built") if log.exists() else 0


def test_eight_processes_build_one_environment_once(workshop: Any, project: Any) -> None:
    processes = [start(project) for _ in range(8)]
    for process in processes:
        go(process)
    results = []
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        results.append(json.loads(output))
    assert sorted(result["reused"] for result in results) == [False] + [True] * 7
    assert len({result["location"] for result in results}) == 1
    assert builds(project) == 1


@pytest.mark.parametrize("moment", ["Solving", "Installing python"])
def test_killed_build_is_repeated(workshop: Any, project: Any, moment: str) -> None:
    process = start(project, moment)
    go(process)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    environment = workshop.prepare(project, "conda")
    assert not environment.reused
    assert workshop.run(environment, "tiny-hello; python -c 'import ssl'") == "hello from one"
    assert {entry.name for entry in environment.plan.location.parent.iterdir() if entry.is_dir()} == {
        environment.plan.location.name
    }


def test_killed_pip_installation_is_repeated(workshop: Any, project: Any) -> None:
    (project.directory / "tiny/hang").touch()
    process = start(project)
    go(process)
    wait_for(lambda: builds(project), "the build", 120)
    process.kill()
    process.communicate()
    (half,) = (workshop.cache / "environments").glob("*/1")
    assert (half / "bin" / "python").exists()
    (project.directory / "tiny/hang").unlink()
    environment = workshop.prepare(project, "conda")
    assert not environment.reused
    assert not half.exists()
    assert not list(half.parent.glob("1.*"))
    assert workshop.run(environment, "tiny-hello") == "hello from one"
