"""The manager that makes conda environments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from prefect_mlprojects import settings
from prefect_mlprojects.environments.activation import own_environment
from prefect_mlprojects.environments.base import EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.environments.cache import EnvironmentCache, EnvironmentRecord, now
from prefect_mlprojects.environments.conda.activation import conda_variables, write_state
from prefect_mlprojects.environments.conda.recipe import (
    CondaRecipe,
    describe_problems,
    make_conda_recipe,
    spec_problems,
)
from prefect_mlprojects.environments.errors import cache_errors
from prefect_mlprojects.environments.pins import release_pin
from prefect_mlprojects.environments.provision import PIN, new_build, obtain
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
    from prefect_mlprojects.environments.building import Build, install_with_uv
    from prefect_mlprojects.environments.conda.locking import installed_by_pip, write_lock, write_pip_lock
    from prefect_mlprojects.environments.conda.solving import CondaBuild, python_version_of

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
