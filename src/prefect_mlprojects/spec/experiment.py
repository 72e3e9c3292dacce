"""The MLflow experiment that a project's script chooses by ``mlflow.set_experiment``, read without running the script."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from pathlib import Path

from prefect_mlprojects.spec.project import EntryPoint, Project

_MAX_BYTES = 1_000_000


def script_experiment(project: Project, entry_point: EntryPoint) -> str | None:
    """Returns the only experiment name that the entry point's Python scripts set as a text; None for none or several.

    MLflow refuses to continue a run in another experiment than the one that was set, so a run must begin in it.
    """
    names = {name for script in _scripts(project, entry_point) for name in _names(script)}
    return names.pop() if len(names) == 1 else None


def _scripts(project: Project, entry_point: EntryPoint) -> Iterator[Path]:
    try:
        words = shlex.split(entry_point.command, comments=True)
    except ValueError:
        return
    for word in words:
        file = project.directory / word
        if word.endswith(".py") and file.resolve().is_relative_to(project.directory.resolve()) and file.is_file():
            yield file


def _names(script: Path) -> Iterator[str]:
    try:
        if script.stat().st_size > _MAX_BYTES:
            return
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or _called(node.func) != "set_experiment":
            continue
        named = [each.value for each in node.keywords if each.arg == "experiment_name"]
        for argument in [*node.args[:1], *named]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value
            elif isinstance(argument, ast.Name) and argument.id in constants:
                yield constants[argument.id]


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
