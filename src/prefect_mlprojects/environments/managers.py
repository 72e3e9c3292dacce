"""Selects the environment manager of a project, and lists and prunes the cached environments."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import get_args

from typing_extensions import TypedDict, Unpack

from prefect_mlprojects._support.files import disk_usage
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.environments import EnvironmentManager, EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.environments.activation import local_variables, own_environment
from prefect_mlprojects.environments.cache import EnvironmentCache, EnvironmentRecord, Report, release_pin, user_cache
from prefect_mlprojects.environments.conda import CondaManager, check_conda_environment
from prefect_mlprojects.environments.python import Contents, VirtualEnvironmentManager, read_contents
from prefect_mlprojects.exceptions import InvalidEnvironmentError, Problem
from prefect_mlprojects.settings import default_env_manager
from prefect_mlprojects.spec.project import CondaEnvironment, DockerEnvironment, Project, PythonEnvironment
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal

MANAGER_NAMES: tuple[EnvironmentManagerName, ...] = get_args(EnvironmentManagerName)  # in the order of messages


def choose_manager(project: Project, requested: str | None = None) -> EnvironmentManagerName:
    """Selects the environment manager as ``mlflow run`` does, except that uv builds Python environments.

    A project without an environment file gets an empty environment of the running Python (or, with ``pyproject.toml``
    and ``uv.lock``, the locked one): MLflow, too, treats it as a Python project. Raises an ``EnvironmentBuildError`` if
    the requested manager is unknown or can't build this kind of environment.
    """
    # A nested run inherits the manager of the run that it is part of, where that fits the project.
    inherited = default_env_manager() if requested is None else None
    if inherited != "conda" or isinstance(project.environment, CondaEnvironment):
        requested = requested if inherited is None else inherited
    name = next((name for name in MANAGER_NAMES if name == requested), None)
    if requested is not None and name is None:
        near = nearest(requested.lower(), MANAGER_NAMES)
        message = f"There is no environment manager {requested!r}; there are {', '.join(MANAGER_NAMES)}."
        raise InvalidEnvironmentError(message + (f" Did you mean {near!r}?" if near else ""), manager=requested)
    environment = project.environment
    if isinstance(environment, DockerEnvironment):
        return "local"  # whatever was requested: the container is its environment
    if name == "conda" and not isinstance(environment, CondaEnvironment):
        what = environment.file.name if isinstance(environment, PythonEnvironment) else "no conda environment file"
        message = (
            f"Project '{project.display_name}' can't be run with --env-manager conda: it has {what}, and conda only makes "
            "environments from a conda.yaml. Use --env-manager uv, virtualenv or local, or give the project a conda_env."
        )
        raise InvalidEnvironmentError(message, manager="conda")
    return name or ("conda" if isinstance(environment, CondaEnvironment) else "uv")


def check_environment(project: Project) -> tuple[Problem, ...]:
    """Returns the problems of a project's environment files; none for a Docker project."""
    if isinstance(project.environment, DockerEnvironment):
        return ()
    if isinstance(project.environment, CondaEnvironment):
        return check_conda_environment(project)
    contents = read_contents(project, "uv")
    return contents if isinstance(contents, tuple) else ()


def environment_manager(name: EnvironmentManagerName) -> EnvironmentManager:
    """Returns the environment manager with a name."""
    if name == "local":
        return LocalManager()
    return CondaManager() if name == "conda" else VirtualEnvironmentManager(name)


def missing_module_advice(project: Project, kind: str, output_tail: Iterable[str]) -> str:
    """Returns advice on a module that a program's last output names as missing, or ""; `kind`: manager or backend."""
    names = [match[1] for line in output_tail if (match := _MISSING_MODULE.search(line)) is not None]
    if not names:
        return ""
    module, environment = names[-1].partition(".")[0], project.environment
    if (project.directory / module).is_dir() or (project.directory / f"{module}.py").is_file():
        return f"'{module}' is in the project's folder, which is not on Python's path: put PYTHONPATH=. before the command."
    if isinstance(environment, DockerEnvironment) or kind == "docker":
        return f"The image has no module '{module}': install the package that contains it in the image."
    if kind == "local":
        lacks = f"The caller's own environment (env_manager local) has no module '{module}'"
        return f"{lacks}: install the package that contains it, or choose another environment manager."
    if isinstance(environment, PythonEnvironment | CondaEnvironment):
        omitted = _omitted_requirement(project, kind, module)
        # The path of a temporary working copy means nothing after the run.
        file = os.path.relpath(environment.file, project.directory) if project.temporary else environment.file
        return f"{omitted}Add the package that contains '{module}' to {file}."
    if (project.directory / "uv.lock").is_file() and kind != "virtualenv":
        return f"Add the package that contains '{module}' to the project's pyproject.toml and run 'uv lock'."
    lacks = "its environment ({}) has no packages" if kind in ("uv", "virtualenv") else "it ran in the Python of {}"
    advice = f"List the package that contains '{module}' in a python_env.yaml, or use --env-manager local."
    return f"The project has no environment file, so {lacks.format(kind)}. {advice}"


_MISSING_MODULE = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")


def _omitted_requirement(project: Project, kind: str, module: str) -> str:
    """Returns a sentence about the requirement with a module's name that was left out, or is for other machines only."""
    contents = None if kind == "conda" else read_contents(project, "virtualenv" if kind == "virtualenv" else "uv")
    if not isinstance(contents, Contents):
        return ""
    name = re.compile(rf"\b{re.escape(module).replace('_', '[-_.]')}\b", re.IGNORECASE)
    for warning in contents.warnings:
        if name.search(warning):
            return f"{warning}. Use --env-manager conda to install them. "
    for text in contents.run.text_inputs:
        requirement, separator, marker = text.partition(";")
        if separator and name.match(requirement):
            return f"'{requirement.strip()}' is only required where {marker.strip()}. "
    return ""


def release_environment(environment: PreparedEnvironment) -> None:
    """Ends this process's use of an environment that it prepared, so that it may be pruned. Idempotent."""
    release_pin(environment.token or "")


@dataclass(frozen=True)
class LocalManager:
    """Uses the caller's environment unchanged, like ``mlflow run --env-manager local``; an ``EnvironmentManager``.

    ``python`` is the one on PATH: mlprojects may be installed as a tool in another environment.
    """

    def plan(self, project: Project) -> EnvironmentPlan:  # noqa: ARG002 - the contract's signature
        """Implements ``EnvironmentManager.plan``. It never fails."""
        python = shutil.which("python", path=_local_variables()["PATH"])
        if python is None:
            return EnvironmentPlan("local", "local, no python on PATH")
        own = own_environment()
        found, ours = (python, sys.executable) if own is None else (Path(python).parent, own / "bin")
        is_running = os.path.realpath(found) == os.path.realpath(ours)
        warnings: tuple[str, ...] = ()
        if own is not None and not is_running:
            warnings = (
                f"local: the project runs with {python}, the first python on PATH, not with {sys.executable}, which runs "
                f"mlprojects; activate {own} to change that",
            )
        version = "{}.{}.{}".format(*sys.version_info[:3]) if is_running else None
        description = f"local, {'Python ' + version + ' at ' if version else ''}{python}"
        return EnvironmentPlan("local", description, python_version=version, warnings=warnings)

    def prepare(
        self, project: Project, plan: EnvironmentPlan, report: Report, stop: StopSignal, *, rebuild: bool = False
    ) -> PreparedEnvironment:
        """Implements ``EnvironmentManager.prepare``. It never fails."""
        del project, report, stop, rebuild
        return PreparedEnvironment(_local_variables(), plan)


def _local_variables() -> dict[str, str]:
    """Returns the caller's variables; without any ``python``, PATH gets the folder of our own at its end."""
    variables = local_variables(os.environ)
    path = variables.get("PATH") or os.defpath
    if shutil.which("python", path=path) is None and sys.executable:
        path = os.pathsep.join((path, str(Path(sys.executable).parent)))
    return variables | {"PATH": path}


@dataclass(frozen=True)
class CachedEnvironment:
    """An environment in the cache: times in seconds since the epoch, size in bytes."""

    key: str
    manager: str
    description: str
    project: str  # that it was built for; others may use it too
    python_version: str
    location: Path
    created: float
    last_used: float
    size: int
    in_use: bool
    complete: bool  # False after an interrupted build, which has no manager, project and times


@dataclass(frozen=True)
class PruneResult:
    """The environments that were removed (or would be), and selected ones that were kept: in use, or being built."""

    removed: tuple[CachedEnvironment, ...]
    kept: tuple[CachedEnvironment, ...]

    @property
    def freed(self) -> int:
        """The removed ones' size in bytes."""
        return sum(environment.size for environment in self.removed)


class Selection(TypedDict, total=False):
    """Selects environments: built longer ago, unused for longer, the least recently used over `max_size` bytes, or all."""

    older_than: timedelta | None
    unused: timedelta | None
    max_size: int | None
    everything: bool


def list_environments() -> tuple[CachedEnvironment, ...]:
    """Returns the environments in the cache, interrupted builds included, the most recently used first."""
    cache = user_cache()
    found = (_describe(cache, key) for key in cache.list_keys())
    return tuple(sorted(found, key=lambda environment: environment.last_used, reverse=True))


def find_environment(prefix: str) -> CachedEnvironment:
    """Returns the environment whose key starts with `prefix`; raises an ``EnvironmentBuildError`` unless one matches."""
    cache = user_cache()
    keys = [key for key in cache.list_keys() if prefix and key.startswith(prefix)]
    if len(keys) == 1:
        return _describe(cache, keys[0])
    found = "is no environment" if not keys else f"are {len(keys)} environments"
    advice = "give more of the key" if keys else "'mlprojects env list' shows what there is"
    message = f"There {found} in {cache.folder} whose key begins with {prefix!r}; {advice}."
    raise InvalidEnvironmentError(message, manager="")


def prune_environments(*, dry_run: bool = False, **selection: Unpack[Selection]) -> PruneResult:
    """Removes (unless `dry_run`) the selected environments, but none in use or being built, and partial builds."""
    cache = user_cache()
    selected = select_environments(list_environments(), time.time(), **selection)
    gone = [not environment.in_use if dry_run else cache.remove(environment.key) for environment in selected]
    if not dry_run:
        cache.remove_partial_removals()
    removed = tuple(itertools.compress(selected, gone))
    return PruneResult(removed, tuple(environment for environment in selected if environment not in removed))


def select_environments(
    environments: Iterable[CachedEnvironment], now: float, **selection: Unpack[Selection]
) -> tuple[CachedEnvironment, ...]:
    """Selects environments to remove at the time `now`, the least recently used first; incomplete ones in any case."""
    older_than, unused, max_size = selection.get("older_than"), selection.get("unused"), selection.get("max_size")
    ordered = sorted(environments, key=lambda environment: environment.last_used)
    chosen = {
        environment.key
        for environment in ordered
        if selection.get("everything")
        or not environment.complete
        or (older_than is not None and now - environment.created > older_than.total_seconds())
        or (unused is not None and not environment.in_use and now - environment.last_used > unused.total_seconds())
    }
    if max_size is not None:
        total = sum(environment.size for environment in ordered if environment.key not in chosen)
        for environment in ordered:
            if total > max_size and environment.key not in chosen and not environment.in_use:
                chosen.add(environment.key)
                total -= environment.size
    return tuple(environment for environment in ordered if environment.key in chosen)


def _describe(cache: EnvironmentCache, key: str) -> CachedEnvironment:
    found, in_use = cache.find(key), cache.in_use(key)
    record = found or EnvironmentRecord(key, 0, "", "incomplete", "", 0.0, disk_usage(cache.folder / key))
    return CachedEnvironment(
        key,
        record.manager,
        record.description,
        record.project,
        record.python_version,
        cache.location(found) if found is not None else cache.folder / key,
        record.created,
        (found and cache.last_used(key)) or record.created,
        record.size,
        in_use,
        complete=found is not None,
    )
