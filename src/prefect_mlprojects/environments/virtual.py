"""The managers that make virtual environments: uv, and virtualenv with pip."""

from __future__ import annotations

import os
import uuid
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
from prefect_mlprojects.environments.recipe import Recipe, VenvManagerName, make_recipe, no_python_message
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.project import Project
from prefect_mlprojects.types import StopSignal

PIN = "pin"
"""The key in ``PreparedEnvironment.facts`` under which the use of a cached environment is noted."""


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
        token = uuid.uuid4().hex
        if not rebuild and plan.key is not None:
            record = cache.use(plan.key, token)
            if record is not None:
                return self._prepared(record, plan, cache, token, reused=True)
        if stop.requested:
            raise stopped_error(self.name, stop)
        # The project's files may have changed since they were planned, and what is built must be what its key says.
        recipe = make_recipe(project, self.name, os.environ, cache.root)
        before = cache.read(recipe.key)
        with cache.lock(recipe.key, self.name, report, stop):
            record = cache.use(recipe.key, token)
            # Someone may have built it, or built it anew, while this caller waited.
            reused = record is not None and (not rebuild or record != before)
            if record is None or not reused:
                record = self._build(recipe, cache, report, stop)
                record = cache.use(record.key, token)
        if record is None:
            raise EnvironmentBuildError(
                f"The environment in {cache.folder / recipe.key} vanished right after it was built; was the cache "
                "folder emptied?",
                manager=self.name,
            )
        return self._prepared(record, self._plan(recipe, cache), cache, token, reused=reused)

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

    def _prepared(
        self, record: EnvironmentRecord, plan: EnvironmentPlan, cache: EnvironmentCache, token: str, *, reused: bool
    ) -> PreparedEnvironment:
        location = cache.location(record)
        return PreparedEnvironment(
            activated_variables(os.environ, location, own_environment()),
            replace(plan, location=location, ready=True, python_version=record.python_version),
            reused=reused,
            facts={PIN: token, "python": str(location / "bin" / "python")},
        )

    def _build(
        self, recipe: Recipe, cache: EnvironmentCache, report: Callable[[str], None], stop: StopSignal
    ) -> EnvironmentRecord:
        from prefect_mlprojects.environments.building import Build, build_with_uv, build_with_virtualenv

        interpreter = recipe.interpreter or self._download(recipe, cache.root, report, stop)
        report(f"Building an environment: {recipe.description}")
        with cache_errors(cache.root, self.name):
            location = cache.begin(recipe.key)
        complete = False
        try:
            build = Build(recipe, interpreter, location, cache.root, dict(os.environ), report, stop)
            match self.name:
                case "uv":
                    build_with_uv(build)
                case "virtualenv":
                    build_with_virtualenv(build)
                case _:
                    assert_never(self.name)
            self._check_unchanged(recipe, cache.root)
            with cache_errors(cache.root, self.name):
                record = cache.complete(_record(recipe, location))
            complete = True
            return record
        finally:
            if not complete:
                cache.abandon(recipe.key, location)

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
