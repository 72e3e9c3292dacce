"""The settings of this package: environment variables with the prefix ``PREFECT_MLPROJECTS_``, read on each use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefect_mlprojects.exceptions import InvalidInputError
from prefect_mlprojects.types import WorkerStop

PREFIX = "PREFECT_MLPROJECTS_"

OWN_VARIABLES = f"{PREFIX}OWN_VARIABLES"
"""Names the variables that the command line set for itself, separated by blanks; a project's command does not get them."""

POLICY_VARIABLE = f"{PREFIX}POLICY"
"""Names a worker's policy file. It counts in the environment of the worker: that of a run can add a policy, not replace one."""

_T = TypeVar("_T")
_N = TypeVar("_N", int, float)


def _read(name: str, default: _T, convert: Callable[[str], _T], expected: str) -> _T:
    text = os.environ.get(PREFIX + name, "").strip()
    if not text:
        return default
    try:
        return convert(text)
    except ValueError:
        raise InvalidInputError(
            f"The environment variable {PREFIX}{name} is {text!r}; it must be {expected}."
        ) from None


def _number(convert: type[_N], least: float, most: float = math.inf) -> Callable[[str], _N]:
    def parse(text: str) -> _N:
        value = convert(text)
        if not (least <= value <= most and value < math.inf):
            raise ValueError(text)
        return value

    return parse


def _switch(text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _directory(variable: str) -> Path | None:
    configured = os.environ.get(variable, "").strip()
    return Path(configured).expanduser().absolute() if configured else None


def cache_directory() -> Path:
    """The folder of environments and fetched projects (``PREFECT_MLPROJECTS_CACHE_DIR``, default: the user's cache folder)."""
    import platformdirs

    return _directory(f"{PREFIX}CACHE_DIR") or Path(platformdirs.user_cache_dir("prefect-mlprojects"))


def server_directory() -> Path:
    """The folder of the embedded server (``PREFECT_MLPROJECTS_SERVER_DIR``, default ``mlprojects`` in ``PREFECT_HOME``)."""
    home = _directory("PREFECT_HOME") or Path("~/.prefect").expanduser().absolute()
    return _directory(f"{PREFIX}SERVER_DIR") or home / "mlprojects"


def server_port(last: int | None = None) -> int:
    """The preferred port of the embedded server (``PREFECT_MLPROJECTS_SERVER_PORT``, default: its `last` one, or 4200)."""
    return _read("SERVER_PORT", last or 4200, _number(int, 1, 65535), "a port number, 1 to 65535")


def server_start_timeout() -> float:
    """Seconds that the embedded server may take to start (``PREFECT_MLPROJECTS_SERVER_START_TIMEOUT``, default 120)."""
    return _read("SERVER_START_TIMEOUT", 120.0, _number(float, 0), "a number of seconds, 0 or more")


def server_auth() -> bool:
    """Whether the embedded server asks for a password (``PREFECT_MLPROJECTS_SERVER_AUTH``, default true).

    Without one, every user and program of this machine can read its secrets and start commands as the user of its workers.
    """
    return _read("SERVER_AUTH", True, _switch, "true or false")


def max_concurrent_runs() -> int:
    """The maximum number of concurrent runs in one process (``PREFECT_MLPROJECTS_MAX_CONCURRENT_RUNS``, default 16)."""
    return _read("MAX_CONCURRENT_RUNS", 16, _number(int, 1), "a whole number, 1 or more")


def worker_stop() -> WorkerStop:
    """What a worker does with its runs when it is stopped (``PREFECT_MLPROJECTS_WORKER_STOP``, default ``cancel``)."""

    def parse(text: str) -> WorkerStop:
        if text.lower() == "wait":
            return "wait"
        if text.lower() != "cancel":
            raise ValueError(text)
        return "cancel"

    return _read("WORKER_STOP", "cancel", parse, "cancel or wait")


def grace_period() -> float:
    """Seconds between SIGTERM and SIGKILL for a run's processes (``PREFECT_MLPROJECTS_GRACE_PERIOD``, default 10)."""
    return _read("GRACE_PERIOD", 10.0, _number(float, 0), "a number of seconds, 0 or more")


def default_env_manager() -> str | None:
    """The environment manager of runs that name none (``PREFECT_MLPROJECTS_ENV_MANAGER``); a run passes its own to nested runs."""
    return os.environ.get(f"{PREFIX}ENV_MANAGER", "").strip() or None


def keep_working_copies() -> bool:
    """Whether working copies of git and zip projects are kept after a run (``PREFECT_MLPROJECTS_KEEP_WORKING_COPIES``)."""
    return _read("KEEP_WORKING_COPIES", False, _switch, "true or false")


def log_uncommitted_changes() -> bool:
    """Whether uncommitted changes of a project are logged as an artifact (``PREFECT_MLPROJECTS_LOG_DIFF``, default true)."""
    return _read("LOG_DIFF", True, _switch, "true or false")


def output_artifact_bytes() -> int:
    """How much of a run's output is kept with the MLflow run, its end if it is more (``PREFECT_MLPROJECTS_OUTPUT_ARTIFACT_MB``).

    In megabytes, default 10; 0 switches it off.
    """
    return int(_read("OUTPUT_ARTIFACT_MB", 10.0, _number(float, 0), "a number of megabytes, 0 or more") * 1_000_000)


def max_zip_bytes() -> int:
    """The maximum total size of the files in a zip archive, in bytes (``PREFECT_MLPROJECTS_MAX_ZIP_BYTES``, default 10 GiB)."""
    return _read("MAX_ZIP_BYTES", 10 * 1024**3, _number(int, 1), "a whole number of bytes, 1 or more")


_policy_sources: list[tuple[str, ...]] = []


def limit_sources(patterns: tuple[str, ...]) -> None:
    """Restricts the projects that this process may run, whatever ``PREFECT_MLPROJECTS_TRUSTED_SOURCES`` is."""
    _policy_sources.append(patterns or ("",))


def source_limits() -> tuple[tuple[str, ...], ...]:
    """URI patterns of projects that may run: of the worker's policy, and of the setting; each has to allow a project."""
    configured = tuple(os.environ.get(f"{PREFIX}TRUSTED_SOURCES", "").split())
    return (*_policy_sources, *((configured,) if configured else ()))


def trusted_sources() -> tuple[str, ...]:
    """URI patterns of projects that may run (``PREFECT_MLPROJECTS_TRUSTED_SOURCES``, separated by spaces); empty: all."""
    return next(reversed(source_limits()), ())


def public_variables() -> frozenset[str]:
    """Names of variables whose values may be stored, whatever they look like (``PREFECT_MLPROJECTS_PUBLIC_VARIABLES``)."""
    return frozenset(os.environ.get(f"{PREFIX}PUBLIC_VARIABLES", "").replace(",", " ").split())
