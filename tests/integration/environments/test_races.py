"""Several processes that want one environment, and processes that are killed while they build it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.services.waiting import wait_for

from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import EnvironmentManagerName

PREPARE = """
import json, sys
from pathlib import Path
from prefect_mlprojects.environments.managers import environment_manager
from prefect_mlprojects.spec.project import Project, PythonEnvironment
from prefect_mlprojects.types import StopSignal

directory = Path(sys.argv[1])
project = Project(directory, None, "demo", {}, PythonEnvironment(directory / "python_env.yaml"))
manager = environment_manager(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
lines = []


def report(line):
    lines.append(line)
    print(line, file=sys.stderr, flush=True)


made = manager.prepare(project, manager.plan(project), report, StopSignal())
print(json.dumps({"reused": made.reused, "location": str(made.plan.location), "lines": lines}))
"""


def start(project: Any, manager: EnvironmentManagerName = "uv") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(project.directory), manager]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output)
    return found


def builds(project: Any) -> int:
    log: Path = project.directory / "tiny/builds.log"
    return log.read_text().count("built") if log.exists() else 0


@pytest.fixture
def project(workshop: Any, kit: Any) -> Any:
    return workshop.project({**kit.package("tiny"), "python_env.yaml": "dependencies: [--no-index, ./tiny]\n"})


@pytest.mark.parametrize("manager", ["uv", "virtualenv"])
def test_eight_processes_build_one_environment_once(
    workshop: Any, project: Any, manager: EnvironmentManagerName
) -> None:
    (project.directory / "tiny/hang").touch()
    processes = [start(project, manager) for _ in range(8)]
    for process in processes:
        go(process)
    wait_for(lambda: builds(project) > 0, "the build", 120)
    first_lines = [_first_line(process) for process in processes]
    (project.directory / "tiny/hang").unlink()
    results = [result(process) for process in processes]
    builder = processes[first_lines.index(_only(first_lines, "Building"))]
    # Those who come between the builder's lock and its name can't name it.
    waiting = [
        f"Waiting for another process{who}, which is building this environment" for who in (f" ({builder.pid})", "")
    ]
    assert set(first_lines) - set(waiting) == {_only(first_lines, "Building")}
    assert sorted(found["reused"] for found in results) == [False] + [True] * 7
    assert len({found["location"] for found in results}) == 1
    assert builds(project) == 1


def _only(lines: list[str], beginning: str) -> str:
    (line,) = (line for line in lines if line.startswith(beginning))
    return line


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline().rstrip()


def test_threads_of_one_process_build_once(workshop: Any, project: Any) -> None:
    made: list[Any] = []
    threads = [threading.Thread(target=lambda: made.append(workshop.prepare(project))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(environment.reused for environment in made) == [False, True, True, True]
    assert builds(project) == 1


@pytest.mark.parametrize("manager", ["uv", "virtualenv"])
def test_killed_build_is_repeated(workshop: Any, project: Any, manager: EnvironmentManagerName) -> None:
    (project.directory / "tiny/hang").touch()
    process = start(project, manager)
    go(process)
    wait_for(lambda: builds(project) > 0, "the build", 120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (half,) = (workshop.cache / "environments").glob("*/1")
    assert (half / "bin" / "python").exists()
    (project.directory / "tiny/hang").unlink()
    environment = workshop.prepare(project, manager)
    assert not environment.reused
    assert environment.plan.location != half
    assert not half.exists()
    assert workshop.run(environment, "tiny-hello") == "hello from one"


def test_waiting_process_builds_after_builder_is_killed(workshop: Any, project: Any) -> None:
    (project.directory / "tiny/hang").touch()
    first = start(project)
    go(first)
    wait_for(lambda: builds(project) > 0, "the build", 120)
    second = start(project)
    go(second)
    assert _first_line(second).startswith(f"Waiting for another process ({first.pid})")
    first.kill()
    first.communicate()
    (project.directory / "tiny/hang").unlink()
    assert result(second)["reused"] is False
    assert workshop.run(workshop.prepare(project), "tiny-hello") == "hello from one"


def test_requirements_that_change_during_the_build_are_not_taken_for_the_old_ones(workshop: Any, kit: Any) -> None:
    project = workshop.project(
        {
            **kit.package("tiny"),
            "tiny/hang": "",
            "python_env.yaml": "dependencies: [-r requirements.txt]\n",
            "requirements.txt": "--no-index\n./tiny\n",
        }
    )

    def report(line: str) -> None:
        if "Building tiny" in line:
            (project.directory / "requirements.txt").write_text("--no-index\n./tiny\n# and\nsix\n")
            (project.directory / "tiny/hang").unlink()

    with pytest.raises(EnvironmentBuildError, match="changed while its environment was built"):
        workshop.prepare(project, report=report)
    assert workshop.leftovers() == []
