"""The managers that make virtual environments: uv, and virtualenv with pip."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import assert_never

from prefect_mlprojects import settings
from prefect_mlprojects.environments.activation import activated_variables, own_environment
from prefect_mlprojects.environments.base import EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.environments.cache import EnvironmentCache, EnvironmentRecord, now
from prefect_mlprojects.environments.errors import cache_errors, stopped_error
from prefect_mlprojects.environments.interpreters import Interpreter, find_interpreter
from prefect_mlprojects.environments.provision import PIN, new_build, obtain
from prefect_mlprojects.environments.recipe import Recipe, VenvManagerName, make_recipe, no_python_message
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import StopSignal


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
        from prefect_mlprojects.environments.building import Build, build_with_uv, build_with_virtualenv

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
        from prefect_mlprojects.environments.python_downloads import download_python

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
