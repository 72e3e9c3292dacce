"""The variables that a program sees in a conda environment, as ``conda activate`` would set them.

Conda's rules: https://docs.conda.io/projects/conda/en/stable/dev-guide/deep-dives/activation.html. A package's activation
scripts (``etc/conda/activate.d/*.sh``) are run in bash each time, since they may build on the caller's variables; without
any, nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from prefect_mlprojects._support.files import write_private
from prefect_mlprojects._support.process.run import run_tool
from prefect_mlprojects._support.process.tree import COOKIE_VARIABLE
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.environments.activation import (
    CONDA_STATE_FILE,
    environment_without_ours,
    prepend_to_path,
    variables_of_conda,
)
from prefect_mlprojects.environments.errors import stopped_error
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

_UNSET = "***unset***"  # conda's word for a variable to remove
# What a shell changes by itself.
_SHELLS_OWN = frozenset(("_", "PWD", "OLDPWD", "SHLVL", "BASH_EXECUTION_STRING", COOKIE_VARIABLE))
_SCRIPT = """\
mlprojects_python=$0 mlprojects_dump=$1 mlprojects_out=$2
shift 2
for mlprojects_script in "$@"; do . "$mlprojects_script"; done
exec "$mlprojects_python" -I -S -c "$mlprojects_dump" "$mlprojects_out"
"""
# Our own Python writes the variables: no shell can tell them from what is only printed.
_DUMP = "import os, sys; open(sys.argv[1], 'wb').write(b'\\0'.join(k + b'=' + v for k, v in os.environb.items()))"


def conda_variables(
    environ: Mapping[str, str], location: Path, own_prefix: Path | None, report: Callable[[str], None], stop: StopSignal
) -> dict[str, str]:
    """The variables of a program that runs in a conda environment.

    The environment that the caller has activated is deactivated first, and nothing is left of the one that runs this
    package.

    Args:
        environ: The environment variables of this process.
        location: The environment's folder.
        own_prefix: The environment that runs this package, or None when none does.
        report: Takes what activation scripts print.
        stop: Asks for the end.

    Returns:
        The whole environment of the program.

    Raises:
        EnvironmentBuildError: An activation script ended the shell, or there is no bash.
    """
    active = environ.get("CONDA_PREFIX")
    variables = environment_without_ours(environ, own_prefix)
    scripts: list[Path] = []
    if active:
        scripts += reversed(_scripts(Path(active), "deactivate.d"))
    variables |= {
        "PATH": prepend_to_path(location / "bin", variables["PATH"]),
        "CONDA_PREFIX": str(location),
        "CONDA_DEFAULT_ENV": str(location),
        "CONDA_SHLVL": "1",
        "CONDA_PROMPT_MODIFIER": f"({location.name}) ",
    }
    for name, value in variables_of_conda(location).items():
        if value == _UNSET:
            variables.pop(name, None)
        else:
            variables[name] = value
    scripts += _scripts(location, "activate.d")
    return _after_scripts(variables, scripts, location, report, stop) if scripts else variables


def write_state(location: Path, variables: Mapping[str, str]) -> None:
    """Keeps an environment file's ``variables:`` in the environment, where conda keeps them.

    Raises:
        OSError: They can't be written.
    """
    if variables:
        file = location / CONDA_STATE_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_private(file, json.dumps({"env_vars": dict(variables)}))


def _scripts(prefix: Path, folder: str) -> list[Path]:
    try:
        return sorted((prefix / "etc/conda" / folder).glob("*.sh"))
    except OSError:
        return []


def _after_scripts(
    variables: Mapping[str, str],
    scripts: list[Path],
    location: Path,
    report: Callable[[str], None],
    stop: StopSignal,
) -> dict[str, str]:
    bash = shutil.which("bash", path=variables["PATH"]) or shutil.which("bash")
    if bash is None:
        raise EnvironmentBuildError(
            f"The environment in {location} has activation scripts, and there is no bash to run them. Install bash.",
            manager="conda",
        )
    with tempfile.TemporaryDirectory(prefix="mlprojects-activate-") as folder:
        out = Path(folder, "variables")
        arguments = [sys.executable, _DUMP, str(out), *map(str, scripts)]
        command = [bash, "--noprofile", "--norc", "-c", _SCRIPT, *arguments]
        result = run_tool(command, cwd=None, env=variables, report=lambda line: report(redact(line)), stop=stop)
        if stop.requested:
            raise stopped_error("conda", stop)
        data = b""
        with contextlib.suppress(OSError):
            data = out.read_bytes()
    if result.exit_code != 0 or not data:
        tail = tuple(redact(line) for line in result.output_tail)
        names = ", ".join(script.name for script in scripts)
        said = "\nThey said last:\n" + "\n".join(f"  {line}" for line in tail) if tail else ""
        raise EnvironmentBuildError(
            f"The conda environment in {location} can't be activated: its activation scripts ({names}) ended the shell "
            f"(exit code {result.exit_code}).{said}",
            manager="conda",
            output_tail=tail,
        )
    after = dict(os.fsdecode(item).partition("=")[::2] for item in data.split(b"\0"))
    for name in _SHELLS_OWN:
        after.pop(name, None)
        if name in variables:
            after[name] = variables[name]
    return after
