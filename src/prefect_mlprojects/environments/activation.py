"""Activates environments: the variables of a command in one, without traces of the environment that runs this package."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect_mlprojects._support.files import list_directory, write_private
from prefect_mlprojects._support.process.run import run_tool
from prefect_mlprojects._support.process.tree import COOKIE_VARIABLE
from prefect_mlprojects._support.process_folders import private_folder
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.environments.cache import Report, last_output, stopped_error
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

# The variables by which Python, and tools such as uv, pip and cmake, find their environment.
_ENVIRONMENT_MARKER = re.compile(
    r"PYTHON(HOME|PATH|EXECUTABLE)|__PYVENV_LAUNCHER__|VIRTUAL_ENV(_PROMPT)?|PYENV_(VERSION|VIRTUAL_ENV)"
    r"|CONDA_(DEFAULT_ENV|PROMPT_MODIFIER|SHLVL|PREFIX(_\d+)?)|(PIPENV|POETRY)_ACTIVE"
    r"|UV_(PROJECT_ENVIRONMENT|RUN_RECURSION_DEPTH)"
)
# Variables of the launcher and of Prefect for a flow run's process; a flow that the project starts is another flow run.
_INTERNAL = re.compile(r"PREFECT__.*|__PYVENV_LAUNCHER__")
_STATE_FILE = "conda-meta/state"  # where conda keeps the `variables:` of an environment's conda.yaml


def local_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of a command in the caller's own environment: `environ` without this process's internals."""
    return {name: value for name, value in environ.items() if not _INTERNAL.fullmatch(name)}


def environment_without_ours(environ: Mapping[str, str], own_prefix: Path | None) -> dict[str, str]:
    """Returns `environ`, always with PATH, without the environment in `own_prefix` and the caller's active ones."""
    variables = local_variables(environ)
    variables = {name: value for name, value in variables.items() if not _ENVIRONMENT_MARKER.fullmatch(name)}
    active = [Path(value) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if (value := environ.get(name))]
    for prefix in active:
        for name, value in variables_of_conda(prefix).items():
            if variables.get(name) == value:
                del variables[name]
    # On PATH, a command would find their ``pip`` or ``mlflow`` where the new environment has none.
    hidden = {os.path.realpath(prefix / "bin") for prefix in (own_prefix, *active) if prefix is not None}
    folders = (environ.get("PATH") or os.defpath).split(os.pathsep)
    variables["PATH"] = os.pathsep.join(
        folder for folder in folders if not folder or os.path.realpath(folder) not in hidden
    )
    return variables


def activated_variables(environ: Mapping[str, str], location: Path, own_prefix: Path | None = None) -> dict[str, str]:
    """Returns the variables of a command in a virtual environment, as its ``activate`` script would set them."""
    variables = environment_without_ours(environ, own_prefix)
    return variables | {"PATH": _path_with(location, variables["PATH"]), "VIRTUAL_ENV": str(location)}


def variables_of_conda(prefix: Path) -> dict[str, str]:
    """Returns the variables that a conda environment sets without scripts: its packages', then its own."""
    found: dict[str, object] = {}
    for file in _files(prefix / "etc/conda/env_vars.d", ".json"):
        found |= read_json(file)
    state = read_json(prefix / _STATE_FILE).get("env_vars")
    return {str(name): str(value) for name, value in (found | (state if isinstance(state, dict) else {})).items()}


def _files(folder: Path, suffix: str) -> list[Path]:
    return [Path(entry.path) for entry in list_directory(folder) if entry.name.endswith(suffix)]


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if it can't be read."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _path_with(location: Path, path: str) -> str:
    return os.pathsep.join(filter(None, (str(location / "bin"), path)))


def own_environment() -> Path | None:
    """Returns the virtual or conda environment that runs this process, if any."""
    prefix = Path(sys.prefix)
    return prefix if sys.prefix != sys.base_prefix or (prefix / "conda-meta").is_dir() else None


_UNSET = "***unset***"  # conda's value for a variable to remove
_SHELL_VARIABLES = frozenset(("_", "PWD", "OLDPWD", "SHLVL", "BASH_EXECUTION_STRING", COOKIE_VARIABLE))
_SCRIPT = """\
mlprojects_python=$0 mlprojects_dump=$1 mlprojects_out=$2
shift 2
for mlprojects_script in "$@"; do . "$mlprojects_script"; done
exec "$mlprojects_python" -I -S -c "$mlprojects_dump" "$mlprojects_out"
"""
# Our own Python writes the variables to a file: scripts may print to stdout.
_DUMP = "import os, sys; open(sys.argv[1], 'wb').write(b'\\0'.join(k + b'=' + v for k, v in os.environb.items()))"


def conda_variables(
    environ: Mapping[str, str], location: Path, own_prefix: Path | None, report: Report, stop: StopSignal
) -> dict[str, str]:
    """Returns the variables of a command in a conda environment; the caller's active one is deactivated first.

    Raises an ``EnvironmentBuildError`` if a script exits the shell, bash is missing, or a stop was requested.
    """
    active = environ.get("CONDA_PREFIX")
    variables = environment_without_ours(environ, own_prefix)
    scripts = _files(Path(active, "etc/conda/deactivate.d"), ".sh")[::-1] if active else []
    variables |= {
        "PATH": _path_with(location, variables["PATH"]),
        "CONDA_PREFIX": str(location),
        "CONDA_DEFAULT_ENV": str(location),
        "CONDA_SHLVL": "1",
        "CONDA_PROMPT_MODIFIER": f"({location.name}) ",
    }
    variables |= variables_of_conda(location)
    variables = {name: value for name, value in variables.items() if value != _UNSET}
    scripts += _files(location / "etc/conda/activate.d", ".sh")
    return _after_scripts(variables, scripts, location, report, stop) if scripts else variables


def write_state(location: Path, variables: Mapping[str, str]) -> None:
    """Writes the ``variables:`` of a conda.yaml to the environment, where conda keeps them."""
    if variables:
        file = location / _STATE_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_private(file, json.dumps({"env_vars": dict(variables)}))


def _after_scripts(
    variables: Mapping[str, str], scripts: list[Path], location: Path, report: Report, stop: StopSignal
) -> dict[str, str]:
    bash = shutil.which("bash", path=variables["PATH"]) or shutil.which("bash")
    if bash is None:
        message = f"The environment in {location} has activation scripts, which need bash. Install bash."
        raise EnvironmentBuildError(message, manager="conda")
    with private_folder() as folder:
        out = folder / "variables"
        arguments = [sys.executable, _DUMP, str(out), *map(str, scripts)]
        command = [bash, "--noprofile", "--norc", "-c", _SCRIPT, *arguments]
        result = run_tool(command, cwd=None, env=variables, report=lambda line: report(redact(line)), stop=stop)
        if stop.requested:
            raise stopped_error("conda", stop)
        data = out.read_bytes() if out.is_file() else b""
    if result.exit_code != 0 or not data:
        tail = tuple(map(redact, result.output_tail))
        names = ", ".join(script.name for script in scripts)
        message = (
            f"The conda environment in {location} can't be activated: its activation scripts ({names}) ended the shell "
            f"(exit code {result.exit_code}).{last_output(tail)}"
        )
        raise EnvironmentBuildError(message, manager="conda", output_tail=tail)
    after = dict(os.fsdecode(item).partition("=")[::2] for item in data.split(b"\0"))
    after = {name: value for name, value in after.items() if name not in _SHELL_VARIABLES}
    return after | {name: variables[name] for name in _SHELL_VARIABLES if name in variables}
