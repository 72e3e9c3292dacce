"""Writes an MLproject file, and the list of its packages, for a script. The script is read, never run."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prefect_mlprojects._support.documents import read_limited
from prefect_mlprojects._support.files import write_atomically
from prefect_mlprojects.exceptions import Problem, ProjectSpecError
from prefect_mlprojects.scaffold.argparse_options import read_argparse
from prefect_mlprojects.scaffold.click_options import read_click, read_typer
from prefect_mlprojects.scaffold.imports import imported_names, installed_packages, requirements
from prefect_mlprojects.scaffold.options import ScriptCommand, write_yaml
from prefect_mlprojects.spec.parser import PROJECT_FILE_NAME

_USUAL_SCRIPTS = ("main.py", "train.py")
# The first file that exists is the project's environment; the last ones are taken by `mlflow run` in a python_env.yaml only.
_ENVIRONMENTS = {
    "python_env.yaml": "python_env",
    "conda.yaml": "conda_env",
    "requirements.txt": "",
    "pyproject.toml": "python_env",
}


@dataclass(frozen=True)
class Scaffold:
    """The files that make a folder a project, by their names, and what they lack."""

    folder: Path
    files: Mapping[str, str]
    notes: tuple[str, ...]
    mode: int  # the permissions of the files, which are those of the script

    def write(self, *, overwrite: bool) -> None:
        """Writes the files, all or, where one exists and `overwrite` is false, none.

        Raises:
            ProjectSpecError: A file exists, or can't be written.
        """
        existing = [name for name in self.files if (self.folder / name).exists() and not overwrite]
        if existing:
            fix = "use --force to replace it, or --dry-run to see what would be written"
            raise ProjectSpecError(
                "The project can't be made",
                [Problem("the file exists", self.folder / name, fix=fix) for name in existing],
            )
        for name, text in self.files.items():
            try:
                write_atomically(self.folder / name, text)
                (self.folder / name).chmod(self.mode)
            except OSError as error:
                problem = Problem(f"it can't be written: {error.strerror or error}", self.folder / name)
                raise ProjectSpecError("The project can't be made", [problem]) from None


def find_script(folder: Path) -> Path:
    """Returns the script of a folder: ``main.py``, ``train.py``, or the only one that can be run.

    Raises:
        ProjectSpecError: There is none, or there are several.
    """
    for name in _USUAL_SCRIPTS:
        if (folder / name).is_file():
            return folder / name
    found = [each for each in sorted(folder.glob("*.py")) if b"__main__" in _bytes(each)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(each.name for each in found)
    problem = (
        f"{names} can all be run" if found else f"it has no main.py, no train.py, and no script with {'__main__'!r}"
    )
    raise ProjectSpecError(
        f"There is no one script in {folder}", [Problem(problem, folder, fix="name it: mlprojects init SCRIPT")]
    )


def _bytes(file: Path) -> bytes:
    try:
        return read_limited(file)
    except OSError:
        return b""


def scaffold(script: Path, folder: Path, name: str | None, environ: Mapping[str, str]) -> Scaffold:
    """Reads a Python script in a project's `folder` and returns the files of the project.

    Raises:
        ProjectSpecError: The script can't be read, or is no Python.
    """
    try:
        tree = ast.parse(read_limited(script))
    except OSError as error:
        raise ProjectSpecError("The script can't be read", [Problem(error.strerror or str(error), script)]) from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        message = f"it is not a Python program: {error.msg if isinstance(error, SyntaxError) else error}"
        raise ProjectSpecError("The script can't be read", [Problem(message, script, line)]) from None
    commands, notes = _read_commands(tree)
    path = os.path.relpath(script, folder)
    points = {each.name or "main": each.entry_point(path, notes) for each in commands}
    key, files, more = _environment(script, folder, environ)
    lines = [f"name: {write_yaml(name or folder.resolve().name)}", "", *key, *([""] if key else []), "entry_points:"]
    for point, content in points.items():
        lines.append(f"  {write_yaml(point)}:")
        if content["parameters"]:
            lines.append("    parameters:")
            lines += (f"      {write_yaml(each)}: {write_yaml(keys)}" for each, keys in content["parameters"].items())
        lines.append(f"    command: {write_yaml(content['command'])}")
    notes += more
    comments = [f"# {each}" for each in notes]
    text = "\n".join([*comments, *lines]) + "\n"
    return Scaffold(folder, {PROJECT_FILE_NAME: text, **files}, tuple(notes), script.stat().st_mode & 0o666)


def _read_commands(tree: ast.Module) -> tuple[list[ScriptCommand], list[str]]:
    modules = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    readers = {"typer": read_typer, "click": read_click, "argparse": read_argparse}
    for module, read in readers.items():
        if module in modules:
            commands, notes = read(tree)
            if commands:
                return commands, notes
    notes = [
        "the script has no options of argparse, click or typer; each -P NAME=VALUE follows the command as --NAME VALUE"
    ]
    return [ScriptCommand()], notes


def _environment(script: Path, folder: Path, environ: Mapping[str, str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Returns the lines of the MLproject file for the environment, the files to write, and notes."""
    existing = next((name for name in _ENVIRONMENTS if (folder / name).is_file()), None)
    version, installed = installed_packages(environ)
    if existing is not None and (key := _ENVIRONMENTS[existing]):
        notes = ["mlflow run does not read a pyproject.toml"] if existing == "pyproject.toml" else []
        return [f"{key}: {existing}"], {}, notes
    if existing is not None:
        lines, notes = [f"-r {existing}"], []
    else:
        lines, missing = requirements(imported_names(script, folder), installed)
        where = "are not installed here: check their names and versions in python_env.yaml"
        notes = [f"{', '.join(missing)} {where}"] if missing else []
    listed = "".join(f"  - {write_yaml(each)}\n" for each in lines)
    text = f'python: "{version}"\ndependencies:{" []" if not lines else ""}\n{listed}'
    return ["python_env: python_env.yaml"], {"python_env.yaml": text}, notes
