"""The variables that a program sees: an environment as activated, and nothing of the one that runs this package."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

# What tells a Python, or a tool such as uv, pip or cmake, which environment it is in.
_ENVIRONMENT_MARKERS = frozenset(
    (
        "PYTHONHOME",
        "PYTHONPATH",
        "PYTHONEXECUTABLE",
        "__PYVENV_LAUNCHER__",
        "VIRTUAL_ENV",
        "VIRTUAL_ENV_PROMPT",
        "CONDA_DEFAULT_ENV",
        "CONDA_PROMPT_MODIFIER",
        "CONDA_SHLVL",
        "PYENV_VERSION",
        "PYENV_VIRTUAL_ENV",
        "PIPENV_ACTIVE",
        "POETRY_ACTIVE",
        "UV_PROJECT_ENVIRONMENT",
        "UV_RUN_RECURSION_DEPTH",
    )
)
CONDA_STATE_FILE = "conda-meta/state"
"""Where conda keeps the variables of an environment (``variables:`` of its file)."""

_CONDA_PREFIX = re.compile(r"^CONDA_PREFIX(_\d+)?$")

# Prefect's own variables for the process of a flow run; a flow that the project starts is not that flow run.
_INTERNAL_PREFIX = "PREFECT__"
_LAUNCHER_MARKER = "__PYVENV_LAUNCHER__"


def local_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a program that runs in the caller's own environment.

    As with ``mlflow run --env-manager local``, it is the environment of the shell that counts: ``python`` is what PATH
    says.

    Returns:
        The same without what is internal to this process.
    """
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(_INTERNAL_PREFIX) and name != _LAUNCHER_MARKER
    }


def environment_without_ours(environ: Mapping[str, str], own_prefix: Path | None) -> dict[str, str]:
    """The variables of this process without what tells of the environment that runs it.

    That environment, and the one that the caller's shell has activated, are taken off PATH: else their ``pip`` or
    ``mlflow`` would be found where the new environment has none, and work on the wrong one.

    Args:
        environ: The environment variables of this process.
        own_prefix: The environment that runs this package, or None when none does.

    Returns:
        The variables; PATH is always among them.
    """
    variables = {
        name: value
        for name, value in local_variables(environ).items()
        if name not in _ENVIRONMENT_MARKERS and not _CONDA_PREFIX.match(name)
    }
    active = [Path(value) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if (value := environ.get(name))]
    for prefix in active:
        for name, value in variables_of_conda(prefix).items():
            if variables.get(name) == value:
                del variables[name]
    hidden = {os.path.realpath(prefix / "bin") for prefix in (own_prefix, *active) if prefix is not None}
    folders = (environ.get("PATH") or os.defpath).split(os.pathsep)
    variables["PATH"] = os.pathsep.join(
        folder for folder in folders if not folder or os.path.realpath(folder) not in hidden
    )
    return variables


def activated_variables(environ: Mapping[str, str], location: Path, own_prefix: Path | None = None) -> dict[str, str]:
    """The variables of a program that runs in a virtual environment, as its ``activate`` script would set them.

    Args:
        environ: The environment variables of this process.
        location: The virtual environment's folder.
        own_prefix: The environment that runs this package, or None when none does.

    Returns:
        The whole environment of the program, without anything of the environment that runs this package.
    """
    variables = environment_without_ours(environ, own_prefix)
    variables["PATH"] = prepend_to_path(location / "bin", variables["PATH"])
    variables["VIRTUAL_ENV"] = str(location)
    return variables


def variables_of_conda(prefix: Path) -> dict[str, str]:
    """The variables that a conda environment sets without scripts: those of its packages, then its own."""
    found: dict[str, str] = {}
    try:
        files = sorted((prefix / "etc/conda/env_vars.d").glob("*.json"))
    except OSError:
        files = []
    for file in files:
        found |= {str(name): str(value) for name, value in _read_json(file).items()}
    state = _read_json(prefix / CONDA_STATE_FILE).get("env_vars")
    return found | {str(name): str(value) for name, value in (state if isinstance(state, dict) else {}).items()}


def _read_json(file: Path) -> dict[str, object]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def prepend_to_path(folder: Path, path: str) -> str:
    """Puts a folder before a PATH.

    Args:
        folder: The folder.
        path: The PATH; it may be empty.
    """
    return f"{folder}{os.pathsep}{path}" if path else str(folder)


def own_environment() -> Path | None:
    """The virtual or conda environment that runs this process, or None when it is not run by one."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix)
    return Path(sys.prefix) if Path(sys.prefix, "conda-meta").is_dir() else None
