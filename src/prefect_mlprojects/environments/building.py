"""The steps that build a virtual environment, with uv or with virtualenv and pip."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect_mlprojects._process import ToolResult, run_tool
from prefect_mlprojects._redaction import mask_text
from prefect_mlprojects.environments.activation import activated_variables, own_environment
from prefect_mlprojects.environments.errors import cache_errors, disk_full_message, stopped_error
from prefect_mlprojects.environments.installers import build_variables, uv_arguments
from prefect_mlprojects.environments.interpreters import Interpreter
from prefect_mlprojects.environments.python_downloads import uv_executable
from prefect_mlprojects.environments.recipe import LockedProject, Recipe
from prefect_mlprojects.environments.requirements import RequirementSet
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

_DISK_FULL = ("No space left on device", "os error 28", "Disk quota exceeded")


@dataclass(frozen=True)
class Build:
    """One build under way.

    Attributes:
        recipe: What is built.
        interpreter: The Python it is made from.
        location: Where it is made; not there yet.
        cache_directory: The cache directory, for messages.
        environ: The environment variables of this process.
        report: Takes the tools' output, a line each.
        stop: Asks for the end.
    """

    recipe: Recipe
    interpreter: Interpreter
    location: Path
    cache_directory: Path
    environ: Mapping[str, str]
    report: Callable[[str], None]
    stop: StopSignal

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.location / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """The variables that installers see."""
        return build_variables(self.environ, activated_variables(self.environ, self.location, own_environment()))

    def run(self, step: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        """Runs a tool in the project's folder, where it finds the project's settings and packages.

        Args:
            step: What it does, for messages ("installing the dependencies").
            command: The program and its arguments.
            variables: Its environment; None for that of installers.

        Raises:
            EnvironmentBuildError: It failed, or was stopped.
        """
        manager = self.recipe.manager
        if self.stop.requested:
            raise stopped_error(manager, self.stop)
        try:
            result = run_tool(
                command,
                cwd=self.recipe.project.directory,
                env=self.variables if variables is None else variables,
                report=lambda line: self.report(mask_text(line)),
                stop=self.stop,
            )
        except OSError as error:
            where = self.recipe.project.directory
            raise EnvironmentBuildError(
                f"The environment of project '{self.recipe.project.display_name}' can't be built: "
                f"{command[0]} could not be started in {where}: {error.strerror or error}",
                manager=manager,
            ) from error
        if self.stop.requested:
            raise stopped_error(manager, self.stop)
        if result.exit_code != 0:
            raise self._failure(step, result)

    def _failure(self, step: str, result: ToolResult) -> EnvironmentBuildError:
        tail = tuple(mask_text(line) for line in result.output_tail)
        name, manager = self.recipe.project.display_name, self.recipe.manager
        message = (
            f"The environment of project '{name}' can't be built: "
            f"{manager} failed {step} (exit code {result.exit_code})."
        )
        if any(sign in line for line in tail for sign in _DISK_FULL):
            message += "\n" + disk_full_message(self.cache_directory)
        if tail:
            message += "\nIt said last:\n" + "\n".join(f"  {line}" for line in tail)
        return EnvironmentBuildError(message, manager=manager, output_tail=tail)


def build_with_uv(build: Build) -> None:
    """Makes an environment with uv; see ``Build.run`` for the errors.

    Args:
        build: The build.
    """
    locked = build.recipe.contents.locked
    if locked is not None:
        _sync(build, locked)
        _seed(build)
        return
    command = [uv_executable(), "venv", "--quiet", "--color", "never", "--no-project", "--no-python-downloads"]
    build.run("creating it", [*command, "--python", str(build.interpreter.path), str(build.location)])
    _seed(build)
    installer = [
        uv_executable(),
        "pip",
        "install",
        "--color",
        "never",
        "--python",
        str(build.python),
        *uv_arguments(build.environ),
    ]
    _install(build, "build_dependencies", build.recipe.contents.build, installer)
    _install(build, "dependencies", build.recipe.contents.run, installer)


def build_with_virtualenv(build: Build) -> None:
    """Makes an environment with virtualenv and pip; see ``Build.run`` for the errors.

    Args:
        build: The build.
    """
    # virtualenv is one of our own packages, so it runs with our own interpreter and variables.
    command = [sys.executable, "-m", "virtualenv", "--no-periodic-update", "--python", str(build.interpreter.path)]
    build.run("creating it", [*command, str(build.location)], build_variables(build.environ, build.environ))
    installer = [str(build.python), "-m", "pip", "install", "--progress-bar", "off"]
    _install(build, "build_dependencies", build.recipe.contents.build, installer)
    _install(build, "dependencies", build.recipe.contents.run, installer)


def _install(build: Build, name: str, requirements: RequirementSet, installer: list[str]) -> None:
    if not requirements.lines and not requirements.arguments:
        return
    arguments = list(requirements.arguments)
    if requirements.lines:
        file = build.location / f"{name}.txt"
        with cache_errors(build.cache_directory, build.recipe.manager):
            file.write_text("".join(f"{line}\n" for line in requirements.lines), encoding="utf-8")
        arguments += ["-r", str(file)]
    if build.recipe.manager == "uv":
        arguments += _fresh_arguments(requirements)
    build.run(f"installing the {name.replace('_', ' ')}", [*installer, *arguments])


def _fresh_arguments(requirements: RequirementSet) -> list[str]:
    """Options that make uv build local packages anew.

    uv keeps the wheel of a local folder until its ``pyproject.toml``, ``setup.py`` or ``setup.cfg`` changes, and would
    install old code.
    """
    copied = [package for package in requirements.local_packages if not package.editable]
    names = [package.name for package in copied]
    if None in names:
        return ["--reinstall"]
    return [argument for name in names if name for argument in ("--reinstall-package", name)]


def _sync(build: Build, locked: LockedProject) -> None:
    variables = {**build.variables, "UV_PROJECT_ENVIRONMENT": str(build.location)}
    del variables["VIRTUAL_ENV"]  # uv would warn that it is not the project's .venv
    command = [
        uv_executable(),
        "sync",
        "--color",
        "never",
        "--frozen",
        "--no-dev",
        "--no-editable",
        "--no-python-downloads",
    ]
    for package in locked.packages:
        if package.installed and package.path.is_dir():
            command += ["--reinstall-package", package.name]
    command += [*uv_arguments(build.environ), "--python", str(build.interpreter.path)]
    build.run("installing what uv.lock says", command, variables)


def _seed(build: Build) -> None:
    """Puts in the pip (and for old Pythons the setuptools) that MLflow's environments have, from virtualenv's wheels.

    Without a pip of its own, ``pip install`` in a project's command would find another environment's.
    """
    from virtualenv.seed.wheels.embed import get_embed_wheel

    minor = tuple(int(part) for part in build.recipe.python_version.split(".")[:2])
    names = ("pip",) if minor >= (3, 12) else ("pip", "setuptools")
    wheels = [get_embed_wheel(name, f"{minor[0]}.{minor[1]}") for name in names]
    paths = [str(wheel.path) for wheel in wheels if wheel is not None]
    if paths:
        command = [uv_executable(), "pip", "install", "--quiet", "--color", "never", "--no-index", "--no-deps"]
        build.run("putting pip into it", [*command, "--python", str(build.python), *paths])
