"""The managers that build virtual environments: uv, and virtualenv with pip."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import assert_never

from prefect_mlprojects import settings
from prefect_mlprojects._support.files import write_private
from prefect_mlprojects._support.process.run import ToolResult, run_tool
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.environments.activation import activated_variables, own_environment
from prefect_mlprojects.environments.base import EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.environments.building import PIN, new_build, obtain
from prefect_mlprojects.environments.cache import (
    EnvironmentCache,
    EnvironmentRecord,
    cache_errors,
    disk_full_message,
    now,
    stopped_error,
)
from prefect_mlprojects.environments.python.installers import build_variables, uv_arguments, uv_executable
from prefect_mlprojects.environments.python.interpreters import (
    Interpreter,
    find_interpreter,
)
from prefect_mlprojects.environments.python.requirements import RequirementSet
from prefect_mlprojects.environments.python.specification import (
    LockedProject,
    Recipe,
    VenvManagerName,
    make_recipe,
    no_python_message,
)
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal

_DISK_FULL = ("No space left on device", "os error 28", "Disk quota exceeded")


@dataclass(frozen=True)
class VirtualEnvironmentManager:
    """Makes virtual environments in the cache; an ``EnvironmentManager``.

    Attributes:
        name: Who builds them.
    """

    name: VenvManagerName

    def plan(self, project: Project) -> EnvironmentPlan:
        """Finds out which environment the project will get; see ``EnvironmentManager.plan``."""
        root = settings.cache_directory()
        return self._plan(make_recipe(project, self.name, os.environ, root), EnvironmentCache(root))

    def prepare(
        self,
        project: Project,
        plan: EnvironmentPlan,
        report: Callable[[str], None],
        stop: StopSignal,
        *,
        rebuild: bool = False,
    ) -> PreparedEnvironment:
        """Returns the environment, building it when it is not there; see ``EnvironmentManager.prepare``.

        The environment is kept from being removed until ``release_environment`` is called with what is returned, or
        this process ends.
        """
        cache = EnvironmentCache(settings.cache_directory())
        obtained = obtain(
            cache,
            plan,
            lambda: make_recipe(project, self.name, os.environ, cache.root),
            lambda recipe: self._build(recipe, cache, report, stop),
            report,
            stop,
            rebuild=rebuild,
        )
        if obtained.recipe is not None:
            plan = self._plan(obtained.recipe, cache)
        record = obtained.record
        location = cache.location(record)
        return PreparedEnvironment(
            activated_variables(os.environ, location, own_environment()),
            replace(plan, location=location, ready=True, python_version=record.python_version),
            reused=obtained.reused,
            facts={PIN: obtained.token, "python": str(location / "bin" / "python")},
        )

    def _plan(self, recipe: Recipe, cache: EnvironmentCache) -> EnvironmentPlan:
        record = cache.find(recipe.key)
        description = recipe.description
        if recipe.interpreter is None and record is None:
            description += "; uv will download this Python"
        return EnvironmentPlan(
            self.name,
            description,
            recipe.key,
            cache.location(record) if record is not None else cache.next_location(recipe.key),
            record is not None,
            recipe.python_version,
            recipe.contents.warnings,
        )

    def _build(
        self, recipe: Recipe, cache: EnvironmentCache, report: Callable[[str], None], stop: StopSignal
    ) -> EnvironmentRecord:
        interpreter = recipe.interpreter or self._download(recipe, cache.root, report, stop)
        report(f"Building an environment: {recipe.description}")
        with new_build(cache, recipe.key, self.name) as location:
            environ = dict(os.environ)
            activated = activated_variables(environ, location, own_environment())
            build = Build(self.name, recipe.project, location, cache.root, environ, activated, report, stop)
            match self.name:
                case "uv":
                    build_with_uv(build, recipe, interpreter)
                case "virtualenv":
                    build_with_virtualenv(build, recipe, interpreter)
                case _:
                    assert_never(self.name)
            self._check_unchanged(recipe, cache.root)
            with cache_errors(cache.root, self.name):
                return cache.complete(_record(recipe, location))

    def _check_unchanged(self, recipe: Recipe, root: Path) -> None:
        """Makes sure that the installer read the files that the key was made from."""
        again = make_recipe(recipe.project, self.name, os.environ, root).contents
        then = recipe.contents
        if (again.build.text_facts, again.run.text_facts) != (then.build.text_facts, then.run.text_facts):
            raise EnvironmentBuildError(
                f"The requirements of project '{recipe.project.display_name}' changed while its environment was built "
                "from them. Run it again.",
                manager=self.name,
            )

    def _download(self, recipe: Recipe, root: Path, report: Callable[[str], None], stop: StopSignal) -> Interpreter:
        from prefect_mlprojects.environments.python.installers import download_python

        report(f"Python {recipe.python_version} is not on this machine; uv downloads it")
        result = download_python(recipe.python_version, os.environ, report, stop)
        if stop.requested:
            raise stopped_error(self.name, stop)
        probes = root / "interpreters.json"
        found = find_interpreter(recipe.python_version, os.environ, probes)
        if found is None:
            said = "\n".join(f"  {line}" for line in result.output_tail)
            raise EnvironmentBuildError(
                f"{no_python_message(recipe.contents, os.environ, probes)}\nuv could not download it "
                f"(exit code {result.exit_code}) and said last:\n{said}",
                manager=self.name,
                output_tail=result.output_tail,
            )
        return found


def _record(recipe: Recipe, location: Path) -> EnvironmentRecord:
    return EnvironmentRecord(
        key=recipe.key,
        build=int(location.name),
        manager=recipe.manager,
        description=recipe.description,
        python_version=recipe.python_version,
        created=now(),
        size=0,
        facts={"project": recipe.project.display_name, "directory": str(recipe.project.directory)},
    )


@dataclass(frozen=True)
class Build:
    """One build under way.

    Attributes:
        manager: Who makes it.
        project: The project it is for.
        location: Where it is made; not there yet.
        cache_directory: The cache directory, for messages.
        environ: The environment variables of this process.
        activated: The same with the environment activated.
        report: Takes the tools' output, a line each.
        stop: Asks for the end.
    """

    manager: EnvironmentManagerName
    project: Project
    location: Path
    cache_directory: Path
    environ: Mapping[str, str]
    activated: Mapping[str, str]
    report: Callable[[str], None]
    stop: StopSignal

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.location / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """The variables that installers see."""
        return build_variables(self.environ, self.activated)

    def run(self, step: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        """Runs a tool in the project's folder, where it finds the project's settings and packages.

        Args:
            step: What it does, for messages ("installing the dependencies").
            command: The program and its arguments.
            variables: Its environment; None for that of installers.

        Raises:
            EnvironmentBuildError: It failed, or was stopped.
        """
        if self.stop.requested:
            raise stopped_error(self.manager, self.stop)
        try:
            result = run_tool(
                command,
                cwd=self.project.directory,
                env=self.variables if variables is None else variables,
                report=lambda line: self.report(redact(line)),
                stop=self.stop,
            )
        except OSError as error:
            raise EnvironmentBuildError(
                f"The environment of project '{self.project.display_name}' can't be built: "
                f"{command[0]} could not be started in {self.project.directory}: {error.strerror or error}",
                manager=self.manager,
            ) from error
        if self.stop.requested:
            raise stopped_error(self.manager, self.stop)
        if result.exit_code != 0:
            raise self._failure(step, result)

    def _failure(self, step: str, result: ToolResult) -> EnvironmentBuildError:
        tail = tuple(redact(line) for line in result.output_tail)
        message = (
            f"The environment of project '{self.project.display_name}' can't be built: "
            f"{self.manager} failed {step} (exit code {result.exit_code})."
        )
        if any(sign in line for line in tail for sign in _DISK_FULL):
            message += "\n" + disk_full_message(self.cache_directory)
        if tail:
            message += "\nIt said last:\n" + "\n".join(f"  {line}" for line in tail)
        return EnvironmentBuildError(message, manager=self.manager, output_tail=tail)


def build_with_uv(build: Build, recipe: Recipe, interpreter: Interpreter) -> None:
    """Makes an environment with uv; see ``Build.run`` for the errors."""
    locked = recipe.contents.locked
    if locked is not None:
        _sync(build, locked, interpreter)
        _seed(build, recipe.python_version)
        return
    command = [uv_executable(), "venv", "--quiet", "--color", "never", "--no-project", "--no-python-downloads"]
    build.run("creating it", [*command, "--python", str(interpreter.path), str(build.location)])
    _seed(build, recipe.python_version)
    install_with_uv(build, "build_dependencies", recipe.contents.build)
    install_with_uv(build, "dependencies", recipe.contents.run)


def build_with_virtualenv(build: Build, recipe: Recipe, interpreter: Interpreter) -> None:
    """Makes an environment with virtualenv and pip; see ``Build.run`` for the errors."""
    # virtualenv is one of our own packages, so it runs with our own interpreter and variables.
    command = [sys.executable, "-m", "virtualenv", "--no-periodic-update", "--python", str(interpreter.path)]
    build.run("creating it", [*command, str(build.location)], build_variables(build.environ, build.environ))
    installer = [str(build.python), "-m", "pip", "install", "--progress-bar", "off"]
    for name, requirements in (("build_dependencies", recipe.contents.build), ("dependencies", recipe.contents.run)):
        _install(build, name, requirements, installer)


def install_with_uv(build: Build, name: str, requirements: RequirementSet) -> None:
    """Installs requirements with uv; see ``Build.run`` for the errors."""
    installer = [uv_executable(), "pip", "install", "--color", "never", "--python", str(build.python)]
    _install(build, name, requirements, [*installer, *uv_arguments(build.environ), *_fresh_arguments(requirements)])


def _install(build: Build, name: str, requirements: RequirementSet, installer: list[str]) -> None:
    if not requirements.lines and not requirements.arguments:
        return
    arguments = list(requirements.arguments)
    if requirements.lines:
        file = build.location / f"{name}.txt"
        with cache_errors(build.cache_directory, build.manager):
            # A requirement's URL, or an index's, may hold a password.
            write_private(file, "".join(f"{line}\n" for line in requirements.lines))
        arguments += ["-r", str(file)]
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


def _sync(build: Build, locked: LockedProject, interpreter: Interpreter) -> None:
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
    command += [*uv_arguments(build.environ), "--python", str(interpreter.path)]
    build.run("installing what uv.lock says", command, variables)


def _seed(build: Build, python_version: str) -> None:
    """Puts in the pip (and for old Pythons the setuptools) that MLflow's environments have, from virtualenv's wheels.

    Without a pip of its own, ``pip install`` in a project's command would find another environment's.
    """
    from virtualenv.seed.wheels.embed import get_embed_wheel

    minor = tuple(int(part) for part in python_version.split(".")[:2])
    names = ("pip",) if minor >= (3, 12) else ("pip", "setuptools")
    wheels = [get_embed_wheel(name, f"{minor[0]}.{minor[1]}") for name in names]
    paths = [str(wheel.path) for wheel in wheels if wheel is not None]
    if paths:
        command = [uv_executable(), "pip", "install", "--quiet", "--color", "never", "--no-index", "--no-deps"]
        build.run("putting pip into it", [*command, "--python", str(build.python), *paths])
