"""Lists the cached environments and removes those that are no longer needed (``mlprojects env list|path|prune``)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from prefect_mlprojects import settings
from prefect_mlprojects._support.files import disk_usage
from prefect_mlprojects.environments.cache import EnvironmentCache
from prefect_mlprojects.exceptions import InvalidEnvironmentError


@dataclass(frozen=True)
class CachedEnvironment:
    """An environment in the cache; that of an interrupted build is not `complete` and has no manager, project and times.

    Times are seconds since the epoch, the size is in bytes. ``project`` is the project that it was built for; others may
    use it too. ``in_use`` says whether a live process uses it.
    """

    key: str
    manager: str
    description: str
    project: str
    python_version: str
    location: Path
    created: float
    last_used: float
    size: int
    in_use: bool
    complete: bool


@dataclass(frozen=True)
class PruneResult:
    """The environments that were removed (or would be), and selected ones that were kept: in use, or being built."""

    removed: tuple[CachedEnvironment, ...]
    kept: tuple[CachedEnvironment, ...]

    @property
    def freed(self) -> int:
        """The removed ones' size in bytes."""
        return sum(environment.size for environment in self.removed)


def list_environments(cache_directory: Path | None = None) -> tuple[CachedEnvironment, ...]:
    """Returns the environments in the cache, interrupted builds included, the most recently used first."""
    cache = _cache(cache_directory)
    found = [_describe(cache, key) for key in cache.list_keys()]
    return tuple(sorted(found, key=lambda environment: environment.last_used, reverse=True))


def find_environment(prefix: str, cache_directory: Path | None = None) -> CachedEnvironment:
    """Returns the environment whose key starts with `prefix`.

    Raises:
        EnvironmentBuildError: None or several match.
    """
    cache = _cache(cache_directory)
    keys = [key for key in cache.list_keys() if prefix and key.startswith(prefix)]
    if len(keys) == 1:
        return _describe(cache, keys[0])
    found = "is no environment" if not keys else f"are {len(keys)} environments"
    advice = "give more of the key" if keys else "'mlprojects env list' shows what there is"
    raise InvalidEnvironmentError(
        f"There {found} in {cache.folder} whose key begins with {prefix!r}; {advice}.", manager=""
    )


def remove_environment(key: str, cache_directory: Path | None = None) -> bool:
    """Removes an environment unless it is in use or being built; returns whether it is gone."""
    return _cache(cache_directory).remove(key)


def prune_environments(
    *,
    older_than: timedelta | None = None,
    unused: timedelta | None = None,
    max_size: int | None = None,
    everything: bool = False,
    dry_run: bool = False,
    cache_directory: Path | None = None,
) -> PruneResult:
    """Removes the environments that `select_environments` selects, except those in use or being built.

    Interrupted builds and removals are cleaned up in any case. `dry_run` removes nothing.
    """
    cache = _cache(cache_directory)
    selected = select_environments(
        list_environments(cache.root),
        time.time(),
        older_than=older_than,
        unused=unused,
        max_size=max_size,
        everything=everything,
    )
    removed: list[CachedEnvironment] = []
    kept: list[CachedEnvironment] = []
    for environment in selected:
        gone = not environment.in_use if dry_run else cache.remove(environment.key)
        (removed if gone else kept).append(environment)
    if not dry_run:
        cache.remove_partial_removals()
    return PruneResult(tuple(removed), tuple(kept))


def select_environments(
    environments: Iterable[CachedEnvironment],
    now: float,
    *,
    older_than: timedelta | None = None,
    unused: timedelta | None = None,
    max_size: int | None = None,
    everything: bool = False,
) -> tuple[CachedEnvironment, ...]:
    """Selects environments to remove, the least recently used first.

    Args:
        environments: The environments in the cache.
        now: The time, seconds since the epoch.
        older_than: Selects those built longer ago.
        unused: Selects those that no run has used for longer.
        max_size: Selects the least recently used until the rest takes at most this many bytes.
        everything: Selects all.
    """
    ordered = sorted(environments, key=lambda environment: environment.last_used)
    chosen = {
        environment.key
        for environment in ordered
        if everything
        or not environment.complete
        or (older_than is not None and now - environment.created > older_than.total_seconds())
        or (unused is not None and not environment.in_use and now - environment.last_used > unused.total_seconds())
    }
    if max_size is not None:
        total = sum(environment.size for environment in ordered if environment.key not in chosen)
        for environment in ordered:
            if total <= max_size:
                break
            if environment.key not in chosen and not environment.in_use:
                chosen.add(environment.key)
                total -= environment.size
    return tuple(environment for environment in ordered if environment.key in chosen)


def _cache(cache_directory: Path | None) -> EnvironmentCache:
    return EnvironmentCache(cache_directory if cache_directory is not None else settings.cache_directory())


def _describe(cache: EnvironmentCache, key: str) -> CachedEnvironment:
    record, in_use = cache.find(key), cache.in_use(key)
    if record is None:
        folder = cache.folder / key
        size = disk_usage(folder)
        return CachedEnvironment(key, "", "incomplete", "", "", folder, 0.0, 0.0, size, in_use, complete=False)
    return CachedEnvironment(
        key,
        record.manager,
        record.description,
        record.project,
        record.python_version,
        cache.location(record),
        record.created,
        cache.last_used(key) or record.created,
        record.size,
        in_use,
        complete=True,
    )
