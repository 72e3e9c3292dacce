"""Lists the cached environments and removes those that are no longer wanted (``mlprojects env list|path|prune``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from prefect_mlprojects import settings
from prefect_mlprojects._support.files import disk_usage
from prefect_mlprojects.environments.cache import EnvironmentCache, now
from prefect_mlprojects.exceptions import EnvironmentBuildError


@dataclass(frozen=True)
class CachedEnvironment:
    """An environment in the cache.

    Attributes:
        key: The content hash that names it.
        manager: The environment manager that made it; empty for an incomplete one.
        description: For people to read ("uv, Python 3.11.7, 3 requirements").
        project: The project that it was made for first; others may use it too.
        python_version: Its Python's version.
        location: Its folder.
        created: When it was made, seconds since the epoch; 0 for an incomplete one.
        last_used: When a run last began to use it, seconds since the epoch; 0 for an incomplete one.
        size: Bytes it takes on the disk.
        in_use: Whether a live process uses it.
        complete: Whether it can be used; an interrupted build can't.
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
    """What a removal did.

    Attributes:
        removed: The environments that are gone, or would be.
        kept: Those that were to go but are in use, or being built.
        freed: Bytes of the removed ones.
    """

    removed: tuple[CachedEnvironment, ...]
    kept: tuple[CachedEnvironment, ...]

    @property
    def freed(self) -> int:
        """Bytes of the removed ones."""
        return sum(environment.size for environment in self.removed)


def list_environments(cache_directory: Path | None = None) -> tuple[CachedEnvironment, ...]:
    """Lists the environments in the cache, the most recently used first.

    Args:
        cache_directory: The cache directory; None for the one the settings name.

    Returns:
        Every environment, interrupted builds included.
    """
    cache = _cache(cache_directory)
    found = [_describe(cache, key) for key in cache.list_keys()]
    return tuple(sorted(found, key=lambda environment: environment.last_used, reverse=True))


def find_environment(prefix: str, cache_directory: Path | None = None) -> CachedEnvironment:
    """Finds the one environment whose key begins so.

    Args:
        prefix: The beginning of its key.
        cache_directory: The cache directory; None for the one the settings name.

    Returns:
        The environment.

    Raises:
        EnvironmentBuildError: There is none, or more than one.
    """
    cache = _cache(cache_directory)
    keys = [key for key in cache.list_keys() if prefix and key.startswith(prefix)]
    if len(keys) == 1:
        return _describe(cache, keys[0])
    found = "is no environment" if not keys else f"are {len(keys)} environments"
    advice = "give more of the key" if keys else "'mlprojects env list' shows what there is"
    raise EnvironmentBuildError(
        f"There {found} in {cache.folder} whose key begins with {prefix!r}; {advice}.", manager=""
    )


def remove_environment(key: str, cache_directory: Path | None = None) -> bool:
    """Removes one environment, unless a run uses it or builds it.

    Args:
        key: Its whole key.
        cache_directory: The cache directory; None for the one the settings name.

    Returns:
        Whether it is gone.
    """
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
    """Removes environments from the cache; what interrupted builds and removals left goes in any case.

    One that a run uses or builds is never removed.

    Args:
        older_than: Removes those made longer ago than this.
        unused: Removes those that no run has used for longer than this.
        max_size: Removes the least recently used until the rest takes at most so many bytes.
        everything: Removes all.
        dry_run: Removes nothing and tells what would go.
        cache_directory: The cache directory; None for the one the settings name.

    Returns:
        What is gone and what had to stay.
    """
    cache = _cache(cache_directory)
    chosen = select_environments(
        list_environments(cache.root),
        now(),
        older_than=older_than,
        unused=unused,
        max_size=max_size,
        everything=everything,
    )
    removed: list[CachedEnvironment] = []
    kept: list[CachedEnvironment] = []
    for environment in chosen:
        gone = not environment.in_use if dry_run else cache.remove(environment.key)
        (removed if gone else kept).append(environment)
    if not dry_run:
        cache.remove_graves()
    return PruneResult(tuple(removed), tuple(kept))


def select_environments(
    environments: Iterable[CachedEnvironment],
    at: float,
    *,
    older_than: timedelta | None = None,
    unused: timedelta | None = None,
    max_size: int | None = None,
    everything: bool = False,
) -> tuple[CachedEnvironment, ...]:
    """Chooses what to remove; see ``prune_environments``.

    Args:
        environments: What there is.
        at: The time now, seconds since the epoch.
        older_than: Chooses those made longer ago than this.
        unused: Chooses those that no run has used for longer than this.
        max_size: Chooses the least recently used until the rest takes at most so many bytes.
        everything: Chooses all.

    Returns:
        The chosen ones, the least recently used first.
    """
    ordered = sorted(environments, key=lambda environment: environment.last_used)
    chosen = {
        environment.key
        for environment in ordered
        if everything
        or not environment.complete
        or (older_than is not None and at - environment.created > older_than.total_seconds())
        or (unused is not None and not environment.in_use and at - environment.last_used > unused.total_seconds())
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
    record = cache.find(key)
    if record is None:
        folder = cache.folder / key
        return CachedEnvironment(
            key,
            "",
            "incomplete",
            "",
            "",
            folder,
            0.0,
            0.0,
            disk_usage(folder),
            in_use=cache.in_use(key),
            complete=False,
        )
    return CachedEnvironment(
        key,
        record.manager,
        record.description,
        record.facts.get("project", ""),
        record.python_version,
        cache.location(record),
        record.created,
        cache.last_used(key) or record.created,
        record.size,
        in_use=cache.in_use(key),
        complete=True,
    )
