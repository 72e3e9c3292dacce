"""The manager that makes conda environments."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rattler


from prefect_mlprojects import settings
from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.environments.activation import conda_variables, own_environment, write_state
from prefect_mlprojects.environments.base import EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.environments.building import PIN, new_build, obtain
from prefect_mlprojects.environments.cache import EnvironmentCache, EnvironmentRecord, cache_errors, now, release_pin
from prefect_mlprojects.environments.conda.configuration import public_url
from prefect_mlprojects.environments.conda.specification import (
    CondaRecipe,
    describe_problems,
    make_conda_recipe,
    spec_problems,
)
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import StopSignal


@dataclass(frozen=True)
class CondaManager:
    """Makes conda environments in the cache, in this process and without conda; an ``EnvironmentManager``."""

    def plan(self, project: Project) -> EnvironmentPlan:
        """Finds out which environment the project will get; see ``EnvironmentManager.plan``."""
        recipe = make_conda_recipe(project, os.environ)
        plan = _plan(recipe, EnvironmentCache(settings.cache_directory()))
        if not plan.ready:
            problems = spec_problems(recipe.specs, recipe.file)
            if problems:
                raise EnvironmentBuildError(describe_problems(project, problems), manager="conda")
        return plan

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

        Raises:
            EnvironmentBuildError: A channel could not be reached (the message names it), no set of packages fits (it
                has the solver's words), an installation or an activation script failed, or the build was stopped.
        """
        cache = EnvironmentCache(settings.cache_directory())
        obtained = obtain(
            cache,
            plan,
            lambda: make_conda_recipe(project, os.environ),
            lambda recipe: _build(recipe, cache, report, stop),
            report,
            stop,
            rebuild=rebuild,
        )
        if obtained.recipe is not None:
            plan = _plan(obtained.recipe, cache)
        record = obtained.record
        location = cache.location(record)
        try:
            variables = conda_variables(os.environ, location, own_environment(), report, stop)
        except BaseException:
            release_pin(obtained.token)
            raise
        return PreparedEnvironment(
            variables,
            replace(plan, location=location, ready=True, python_version=record.python_version or None),
            reused=obtained.reused,
            facts={
                PIN: obtained.token,
                "python": str(location / "bin" / "python"),
                "lock": str(location.with_name(f"{location.name}.lock.yml")),
            },
        )


def _plan(recipe: CondaRecipe, cache: EnvironmentCache) -> EnvironmentPlan:
    record = cache.find(recipe.key)
    return EnvironmentPlan(
        "conda",
        record.description if record is not None else recipe.description,
        recipe.key,
        cache.location(record) if record is not None else cache.next_location(recipe.key),
        record is not None,
        (record.python_version or None) if record is not None else recipe.python_version,
        recipe.file.warnings,
    )


def _build(
    recipe: CondaRecipe, cache: EnvironmentCache, report: Callable[[str], None], stop: StopSignal
) -> EnvironmentRecord:
    # Only a build needs the solver.
    from prefect_mlprojects.environments.conda.solving import CondaBuild, python_version_of
    from prefect_mlprojects.environments.python.manager import Build, install_with_uv

    report(f"Building an environment: {recipe.description}")
    with new_build(cache, recipe.key, "conda") as location:
        records = CondaBuild(recipe, location, cache.root, report, stop).run()
        with cache_errors(cache.root, "conda"):
            write_state(location, recipe.file.variables)
            lock = write_lock(location, recipe, records)
        if recipe.pip.lines or recipe.pip.arguments:
            environ = dict(os.environ)
            activated = conda_variables(environ, location, own_environment(), report, stop)
            before = installed_by_pip(location)
            build = Build("conda", recipe.project, location, cache.root, environ, activated, report, stop)
            install_with_uv(build, "pip_section", recipe.pip)
            with cache_errors(cache.root, "conda"):
                write_pip_lock(location, installed_by_pip(location) - before)
        _check_unchanged(recipe)
        report(f"The solution is in {lock}")
        version = python_version_of(records)
        described = recipe.description
        if version and recipe.python_version is None:
            described = described.replace("conda, ", f"conda, Python {version}, ", 1)
        record = EnvironmentRecord(
            key=recipe.key,
            build=int(location.name),
            manager="conda",
            description=described,
            python_version=version,
            created=now(),
            size=0,
            facts={
                "project": recipe.project.display_name,
                "directory": str(recipe.project.directory),
                "lock": str(lock),
            },
        )
        with cache_errors(cache.root, "conda"):
            return cache.complete(record)


def _check_unchanged(recipe: CondaRecipe) -> None:
    """Makes sure that the files were read in the state that the key was made from."""
    again = make_conda_recipe(recipe.project, os.environ)
    if (again.specs, again.channels, again.pip.text_facts) != (recipe.specs, recipe.channels, recipe.pip.text_facts):
        raise EnvironmentBuildError(
            f"The requirements of project '{recipe.project.display_name}' changed while its environment was built "
            "from them. Run it again.",
            manager="conda",
        )


_URL = re.compile(r"(?:https?|s3|gcs|oci|file)://[^\s'\"]+")


def lock_file(location: Path) -> Path:
    """Where the solution of an environment lies: beside its folder."""
    return location.with_name(f"{location.name}.lock.yml")


def pip_lock_file(location: Path) -> Path:
    """Where the versions that the pip section got are written, in the format of a requirements file."""
    return location.with_name(f"{location.name}.requirements.txt")


def write_lock(location: Path, recipe: CondaRecipe, records: tuple[rattler.RepoDataRecord, ...]) -> Path:
    """Writes which conda packages an environment holds, from where and with their hashes, as a lock file of rattler.

    Pixi and ``rattler`` read the format (https://docs.rs/rattler_lock). Passwords and tokens are left out.

    Returns:
        The file.

    Raises:
        OSError: It can't be written.
    """
    import rattler
    from rattler.lock import LockChannel, LockPlatform

    platform = LockPlatform(recipe.configuration.subdir)
    lock = rattler.LockFile([platform])
    lock.set_channels("default", [LockChannel(public_url(url)) for url in recipe.channels])
    for record in records:
        lock.add_conda_package("default", platform, record)
    file = lock_file(location)
    lock.to_path(file)
    text = file.read_text(encoding="utf-8")
    clean = _URL.sub(lambda match: public_url(strip_user_info(match[0])), text)
    if clean != text:
        file.write_text(clean, encoding="utf-8")
    return file


def installed_by_pip(location: Path) -> frozenset[tuple[str, str]]:
    """The names and versions of Python packages in an environment that no conda package brought."""
    from importlib.metadata import distributions

    conda = {file.name for file in (location / "conda-meta").glob("*.json")}
    folders = [str(folder) for folder in (location / "lib").glob("python*/site-packages")]
    found = set()
    for distribution in distributions(path=folders):
        installer = (distribution.read_text("INSTALLER") or "").strip()
        name, version = distribution.metadata["Name"], distribution.version
        if name and installer != "conda" and not any(file.startswith(f"{name}-{version}-") for file in conda):
            found.add((str(name), str(version)))
    return frozenset(found)


def write_pip_lock(location: Path, packages: frozenset[tuple[str, str]]) -> None:
    """Writes which versions the pip section got.

    Raises:
        OSError: It can't be written.
    """
    lines = sorted(f"{name}=={version}\n" for name, version in packages)
    pip_lock_file(location).write_text("".join(lines), encoding="utf-8")
