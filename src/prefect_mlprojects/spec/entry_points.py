"""Finds the entry point that a call names: one the project declares, or a script."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import PurePosixPath
from string import Formatter
from types import MappingProxyType

from prefect_mlprojects.exceptions import Problem, ProjectSpecError
from prefect_mlprojects.spec.project import EntryPoint, Project

# As MLflow runs them (mlflow/projects/_project_spec.py, Project.get_entry_point).
_SCRIPT_COMMANDS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        ".py": lambda script: f"python {shlex.quote(script)}",
        ".sh": lambda script: f"{os.environ.get('SHELL', 'bash')} {shlex.quote(script)}",
        ".R": lambda script: f"Rscript -e \"mlflow::mlflow_source('{shlex.quote(script)}')\" --args",
    }
)


def find_entry_point(project: Project, name: str) -> EntryPoint:
    """Returns the entry point of a name, or the script of that name in the project's folder.

    Args:
        project: The project.
        name: The name, or a path relative to the project's folder that ends with ``.py``, ``.sh`` or ``.R``.

    Raises:
        ProjectSpecError: There is neither, or the entry point's command can't be used.
    """
    declared = project.entry_points.get(name)
    if declared is not None:
        problems = command_problems(project, declared)
        if problems:
            raise ProjectSpecError(f"Entry point '{name}' of project '{project.display_name}' can't be used", problems)
        return declared
    headline = f"Project '{project.display_name}' has no entry point '{name}'"
    script = PurePosixPath(name)
    make_command = _SCRIPT_COMMANDS.get(script.suffix)
    if make_command is None:
        raise ProjectSpecError(headline, [_unknown(project, name)])
    if script.is_absolute() or ".." in script.parts:
        raise ProjectSpecError(headline, [Problem(f"the script {name!r} lies outside the project's folder")])
    if not (project.directory / script).is_file():
        raise ProjectSpecError(headline, [_unknown(project, name)])
    # The command is a template: braces of the script's name are not placeholders.
    command = make_command(name).replace("{", "{{").replace("}", "}}")
    return EntryPoint(name=name, command=command, parameters={}, script=name)


def _unknown(project: Project, name: str) -> Problem:
    scripts = sorted(each.name for each in project.directory.iterdir() if each.suffix in _SCRIPT_COMMANDS)
    known = [*project.entry_points, *scripts]
    near = get_close_matches(name, known, n=1)
    parts = []
    if project.entry_points:
        parts.append(f"it declares {', '.join(project.entry_points)}")
    else:
        parts.append("it declares none" if project.file else f"there is no MLproject file in {project.directory}")
    if scripts:
        parts.append(f"and has the scripts {', '.join(scripts)}")
    return Problem(" ".join(parts), file=project.file, fix=f"did you mean {near[0]!r}?" if near else None)


def command_problems(project: Project, entry_point: EntryPoint) -> tuple[Problem, ...]:
    """Finds placeholders in an entry point's command that can't be filled in.

    Commands are templates of ``str.format``, as in MLflow: ``{name}`` is a placeholder and ``{{`` a brace.
    """
    problems = []

    def add(message: str, fix: str | None = None) -> None:
        problems.append(Problem(message, file=project.file, line=entry_point.line, fix=fix))

    try:
        fields = [field for _, field, _, _ in Formatter().parse(entry_point.command) if field is not None]
    except ValueError as error:
        add(f"the command of entry point {entry_point.name!r} has a stray brace: {error}", "write {{ or }} for a brace")
        return tuple(problems)
    for field in dict.fromkeys(fields):
        if field in entry_point.parameters:
            continue
        near = get_close_matches(field, entry_point.parameters, n=1)
        add(
            f"the command of entry point {entry_point.name!r} has the placeholder {{{field}}}, which no parameter declares",
            f"did you mean {{{near[0]}}}?" if near else "declare it, or write {{ and }} for braces",
        )
    return tuple(problems)
