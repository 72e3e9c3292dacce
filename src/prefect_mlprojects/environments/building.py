"""Builds an environment once and shares it: what every manager with a cache does alike."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from prefect_mlprojects.environments.base import EnvironmentPlan
from prefect_mlprojects.environments.cache import EnvironmentCache, EnvironmentRecord, cache_errors, stopped_error
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

PIN = "pin"
"""The key in ``PreparedEnvironment.facts`` under which the use of a cached environment is noted."""


class Keyed(Protocol):
    """Everything that decides what an environment holds."""

    @property
    def key(self) -> str:
        """The content hash that names it."""


RecipeT = TypeVar("RecipeT", bound=Keyed)


@dataclass(frozen=True)
class Obtained(Generic[RecipeT]):
    """An environment that is kept from being removed.

    Attributes:
        record: What the cache knows of it.
        token: Names the use; ``release_pin`` takes it.
        reused: Whether it was there already.
        recipe: What it was made, or looked for, from; None when what was planned was there.
    """

    record: EnvironmentRecord
    token: str
    reused: bool
    recipe: RecipeT | None


def obtain(
    cache: EnvironmentCache,
    plan: EnvironmentPlan,
    make_recipe: Callable[[], RecipeT],
    build: Callable[[RecipeT], EnvironmentRecord],
    report: Callable[[str], None],
    stop: StopSignal,
    *,
    rebuild: bool,
) -> Obtained[RecipeT]:
    """Uses the environment that was planned, and builds it first when it is not there.

    Returns:
        The environment.

    Raises:
        EnvironmentBuildError: It could not be built, or was stopped.
    """
    token = uuid.uuid4().hex
    if not rebuild and plan.key is not None:
        record = cache.use(plan.key, token)
        if record is not None:
            return Obtained(record, token, reused=True, recipe=None)
    if stop.requested:
        raise stopped_error(plan.manager, stop)
    # The project's files may have changed since they were planned, and what is built must be what its key says.
    recipe = make_recipe()
    before = cache.read(recipe.key)
    with cache.lock(recipe.key, plan.manager, report, stop):
        record = cache.use(recipe.key, token)
        # Someone may have built it, or built it anew, while this caller waited.
        reused = record is not None and (not rebuild or record != before)
        if record is None or not reused:
            record = cache.use(build(recipe).key, token)
    if record is None:
        raise EnvironmentBuildError(
            f"The environment in {cache.folder / recipe.key} vanished right after it was built; was the cache "
            "folder emptied?",
            manager=plan.manager,
        )
    return Obtained(record, token, reused=reused, recipe=recipe)


@contextlib.contextmanager
def new_build(cache: EnvironmentCache, key: str, manager: str) -> Iterator[Path]:
    """Gives a build its folder, and removes that when the block fails; the key's lock must be held.

    Yields:
        Where to build; it is not there yet.

    Raises:
        EnvironmentBuildError: The cache can't be written.
    """
    with cache_errors(cache.root, manager):
        location = cache.begin(key)
    try:
        yield location
    except BaseException:
        cache.abandon(key, location)
        raise
