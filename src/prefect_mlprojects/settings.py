"""The settings of this package: environment variables with the prefix ``PREFECT_MLPROJECTS_``, read when they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefect_mlprojects.exceptions import ExecutionException

PREFIX = "PREFECT_MLPROJECTS_"

OWN_VARIABLES = f"{PREFIX}OWN_VARIABLES"
"""Names the variables that the command line set for itself, separated by blanks; a project's command does not get them."""

_T = TypeVar("_T")


def _read(name: str, default: _T, convert: Callable[[str], _T], expected: str) -> _T:
    text = os.environ.get(PREFIX + name, "").strip()
    if not text:
        return default
    try:
        return convert(text)
    except ValueError:
        raise ExecutionException(
            f"The environment variable {PREFIX}{name} is {text!r}; it must be {expected}."
        ) from None


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _switch(text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _port(text: str) -> int:
    value = int(text)
    if not 0 < value < 65536:
        raise ValueError(text)
    return value


def cache_directory() -> Path:
    """Where environments and fetched projects are kept (``PREFECT_MLPROJECTS_CACHE_DIR``, else the user's cache folder)."""
    configured = os.environ.get(f"{PREFIX}CACHE_DIR", "").strip()
    if configured:
        return Path(configured).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("prefect-mlprojects"))


def server_directory() -> Path:
    """Where the embedded Prefect server keeps its database, log and state (below ``PREFECT_HOME``, default ``~/.prefect``)."""
    configured = os.environ.get(f"{PREFIX}SERVER_DIR", "").strip()
    if configured:
        return Path(configured).expanduser().absolute()
    home = os.environ.get("PREFECT_HOME", "").strip() or "~/.prefect"
    return Path(home).expanduser().absolute() / "mlprojects"


def server_port(last: int | None = None) -> int:
    """The port that the embedded server prefers (``PREFECT_MLPROJECTS_SERVER_PORT``, default: its `last` one, or 4200)."""
    return _read("SERVER_PORT", last or 4200, _port, "a port number, 1 to 65535")


def server_start_timeout() -> float:
    """Seconds that the embedded server may take to answer (``PREFECT_MLPROJECTS_SERVER_START_TIMEOUT``, default 120)."""
    return _read("SERVER_START_TIMEOUT", 120.0, _positive_float, "a number of seconds, 0 or more")


def max_concurrent_runs() -> int:
    """How many runs one process executes at the same time (``PREFECT_MLPROJECTS_MAX_CONCURRENT_RUNS``, default 16)."""
    return _read("MAX_CONCURRENT_RUNS", 16, _positive_int, "a whole number, 1 or more")


def grace_period() -> float:
    """Seconds between asking a run's processes to end and killing them (``PREFECT_MLPROJECTS_GRACE_PERIOD``, default 10)."""
    return _read("GRACE_PERIOD", 10.0, _positive_float, "a number of seconds, 0 or more")


def keep_working_copies() -> bool:
    """Whether the files of git and zip projects are kept when a run has ended (``PREFECT_MLPROJECTS_KEEP_WORKING_COPIES``)."""
    return _read("KEEP_WORKING_COPIES", False, _switch, "true or false")


def log_uncommitted_changes() -> bool:
    """Whether a run of a changed git checkout keeps the changes as an artifact (``PREFECT_MLPROJECTS_LOG_DIFF``, default true)."""
    return _read("LOG_DIFF", True, _switch, "true or false")


def max_zip_bytes() -> int:
    """How many bytes the files of a zip archive may have (``PREFECT_MLPROJECTS_MAX_ZIP_BYTES``, default 10 GiB)."""
    return _read("MAX_ZIP_BYTES", 10 * 1024**3, _positive_int, "a whole number of bytes, 1 or more")


def trusted_sources() -> tuple[str, ...]:
    """Patterns of the projects that may run (``PREFECT_MLPROJECTS_TRUSTED_SOURCES``, divided by spaces); none: all may."""
    return tuple(os.environ.get(f"{PREFIX}TRUSTED_SOURCES", "").split())
