"""Projects whose packages are built on the spot, without any index, so that real builds are quick."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from uv import find_uv_bin

from prefect_mlprojects.environments import PreparedEnvironment
from prefect_mlprojects.environments.managers import environment_manager, release_environment
from prefect_mlprojects.spec.project import (
    CondaEnvironment,
    NoEnvironment,
    Project,
    ProjectEnvironment,
    PythonEnvironment,
)
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal

# A build backend of twenty lines, kept in the package itself. It says what it does, waits while there is a file "hang"
# beside it, and fails when there is a file "fail".
BACKEND = """\
import os, sys, time, zipfile

NAME = "{name}"


def _wheel(folder, editable):
    print("building " + NAME, file=sys.stderr, flush=True)
    with open("builds.log", "a") as log:
        log.write("built\\n")
    while os.path.exists("hang"):
        time.sleep(0.05)
    if os.path.exists("fail"):
        raise OSError(open("fail").read())
    file = NAME + "-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, file), "w") as wheel:
        if editable:
            wheel.writestr(NAME + ".pth", os.path.join(os.getcwd(), "src"))
        else:
            wheel.writestr(NAME + ".py", open("src/" + NAME + ".py").read())
        info = NAME + "-1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: " + NAME + "\\nVersion: 1.0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\\n" + NAME + "-hello = " + NAME + ":hello\\n")
        wheel.writestr(info + "RECORD", "")
    return file


def build_wheel(folder, config_settings=None, metadata_directory=None):
    return _wheel(folder, False)


def build_editable(folder, config_settings=None, metadata_directory=None):
    return _wheel(folder, True)
"""


def package(name: str, value: str = "one") -> dict[str, str]:
    """The files of a tiny package, in a folder of its name."""
    return {
        f"{name}/pyproject.toml": (
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n\n'
            f'[project]\nname = "{name}"\nversion = "1.0"\n'
        ),
        f"{name}/backend.py": BACKEND.format(name=name),
        f"{name}/src/{name}.py": f"VALUE = {value!r}\n\ndef hello():\n    print('hello from', VALUE)\n",
    }


@dataclass
class Workshop:
    """Makes projects in a temporary folder, and their environments in a temporary cache."""

    root: Path
    cache: Path
    lines: list[str] = field(default_factory=list)
    prepared: list[PreparedEnvironment] = field(default_factory=list)

    def project(self, files: Mapping[str, str], folder: str = "project") -> Project:
        directory = self.root / folder
        directory.mkdir(exist_ok=True)
        for path, text in files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text, encoding="utf-8")
        environment: ProjectEnvironment = NoEnvironment()
        if "python_env.yaml" in files:
            environment = PythonEnvironment(directory / "python_env.yaml")
        elif "conda.yaml" in files:
            environment = CondaEnvironment(directory / "conda.yaml")
        return Project(directory, None, "demo", {}, environment)

    def prepare(
        self,
        project: Project,
        manager: EnvironmentManagerName = "uv",
        *,
        rebuild: bool = False,
        stop: StopSignal | None = None,
        report: Callable[[str], None] | None = None,
    ) -> PreparedEnvironment:
        chosen = environment_manager(manager)
        plan = chosen.plan(project)
        prepared = chosen.prepare(project, plan, report or self.lines.append, stop or StopSignal(), rebuild=rebuild)
        self.prepared.append(prepared)
        return prepared

    def run(self, environment: PreparedEnvironment, command: str, cwd: Path | None = None) -> str:
        """What a shell command prints in an environment, as a backend would run it."""
        done = subprocess.run(
            ["bash", "-c", command],
            env=dict(environment.variables),
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def leftovers(self) -> list[str]:
        """What the cache holds besides its lock files and what interpreters answered."""
        folder = self.cache / "environments"
        return sorted(entry.name for entry in folder.iterdir() if entry.name != ".locks") if folder.exists() else []


class Kit:
    """What tests need besides a workshop."""

    package = staticmethod(package)
    release_environment = staticmethod(release_environment)

    @staticmethod
    def lock(project: Path) -> None:
        """Makes a project's ``uv.lock``, without any index."""
        command = [find_uv_bin(), "lock", "--quiet", "--no-index", "--offline", "--python", sys.executable]
        subprocess.run(command, cwd=project, check=True)


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    cache = tmp_path / "cache"
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(cache))
    made = Workshop(tmp_path, cache)
    yield made
    for prepared in made.prepared:
        release_environment(prepared)
