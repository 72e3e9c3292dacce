"""Finds the entry point that a call names: one the project declares, or a script."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import ParameterError, Problem, ProjectSpecError
from prefect_mlprojects.spec.parameters import check_parameters
from prefect_mlprojects.spec.parser import load_project, parse_project
from prefect_mlprojects.spec.project import EntryPoint, Project
from prefect_mlprojects.spec.template import is_plain, parse_template

_LISTED_SCRIPTS = 20


def _r_command(script: str) -> str:
    if is_plain(script):
        return f"Rscript -e \"mlflow::mlflow_source('{script}')\" --args"
    literal = script.replace("\\", "\\\\").replace("'", "\\'")
    expression = f"mlflow::mlflow_source('{literal}')"
    return f"Rscript -e {shlex.quote(expression)} --args"


# As MLflow runs them (mlflow/projects/_project_spec.py, Project.get_entry_point).
_SCRIPT_COMMANDS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        ".py": lambda script: f"python {shlex.quote(script)}",
        ".sh": lambda script: f"{shlex.quote(os.environ.get('SHELL') or 'bash')} {shlex.quote(script)}",
        ".R": _r_command,
    }
)


def find_entry_point(project: Project, name: str) -> EntryPoint:
    """Returns the entry point of a name, or the script of that name in the project's folder.

    Args:
        project: The project.
        name: The name, or the path of a script, relative to the project's folder, that ends with ``.py``, ``.sh`` or ``.R``.

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
    make_command = _SCRIPT_COMMANDS.get(PurePosixPath(name).suffix)
    if project.databricks_spark_job is not None:
        raise ProjectSpecError(headline, [_unknown_in_spark_job(project, name)])
    if make_command is None:
        raise ProjectSpecError(headline, [_unknown(project, name)])
    # Path.is_file raises for names that are too long, and resolving links is not wanted: they are the project's own business.
    file = os.path.normpath(os.path.join(project.directory, name))  # noqa: PTH118
    if not Path(file).is_relative_to(os.path.normpath(project.directory)):
        outside = Problem(f"the script {name!r} lies outside the project's folder, {project.directory}")
        raise ProjectSpecError(headline, [outside])
    if not os.path.isfile(file):  # noqa: PTH113
        raise ProjectSpecError(headline, [_unknown(project, name)])
    # The command is a template: braces of the script's name are not placeholders.
    command = make_command(name).replace("{", "{{").replace("}", "}}")
    return EntryPoint(name=name, command=command, parameters={}, script=name)


def spark_job_entry_point(project: Project, name: str) -> EntryPoint | None:
    """Returns what stands for the entry point of a Databricks Spark job with a ``python_file``; None for other projects.

    Such a project has no entry points: whatever is asked for, its file runs, with the parameters of the MLproject file.
    """
    file = (project.databricks_spark_job or {}).get("python_file")
    if file is None:
        return None
    return EntryPoint(name=name, command=f"python {file}".replace("{", "{{").replace("}", "}}"), parameters={})


def _unknown_in_spark_job(project: Project, name: str) -> Problem:
    if (project.databricks_spark_job or {}).get("python_file") is not None:
        return Problem(
            "it is a Databricks Spark job with a 'python_file' and has no entry points",
            project.file,
            fix="run it on Databricks",
        )
    near = nearest(name, project.entry_points)
    return Problem(
        f"it declares {', '.join(project.entry_points)}; a Databricks Spark job runs no scripts by name",
        project.file,
        fix=f"did you mean {near!r}?" if near else None,
    )


def _unknown(project: Project, name: str) -> Problem:
    try:
        scripts = sorted(each.name for each in project.directory.iterdir() if each.suffix in _SCRIPT_COMMANDS)
    except OSError:
        scripts = []
    known = [*project.entry_points, *scripts]
    near = nearest(name, known)
    parts = []
    if project.entry_points:
        parts.append(f"it declares {', '.join(project.entry_points)}")
    else:
        parts.append("it declares none" if project.file else f"there is no MLproject file in {project.directory}")
    if scripts:
        more = f" and {len(scripts) - _LISTED_SCRIPTS} more" if len(scripts) > _LISTED_SCRIPTS else ""
        parts.append(f"and has the scripts {', '.join(scripts[:_LISTED_SCRIPTS])}{more}")
    else:
        parts.append("and has no scripts (.py, .sh, .R)")
    return Problem(" ".join(parts), file=project.file, fix=f"did you mean {near!r}?" if near else None)


def command_problems(project: Project, entry_point: EntryPoint) -> tuple[Problem, ...]:
    """Finds placeholders in an entry point's command that can't be filled in.

    Commands are templates of ``str.format``, as in MLflow: ``{name}`` is a placeholder and ``{{`` a brace.
    """
    template = parse_template(entry_point.command)
    subject = f"the command of entry point {entry_point.name!r}"
    line = entry_point.command_line or entry_point.line
    problems = [Problem(f"{subject} {message}", project.file, line, fix) for message, fix in template.faults]
    for name in dict.fromkeys(placeholder.name for placeholder in template.placeholders):
        if name in entry_point.parameters:
            continue
        near = nearest(name, entry_point.parameters)
        problems.append(
            Problem(
                f"{subject} has the placeholder {{{name}}}, which no parameter declares",
                project.file,
                line,
                f"did you mean {{{near}}}?" if near else "declare it, or write {{ and }} for braces",
            )
        )
    return tuple(problems)


def unquotable_warnings(project: Project, entry_point: EntryPoint) -> tuple[Problem, ...]:
    """Finds placeholders where only plain values can be written."""
    line = entry_point.command_line or entry_point.line
    places: dict[str, Problem] = {}
    for placeholder in parse_template(entry_point.command).placeholders:
        parameter = entry_point.parameters.get(placeholder.name)
        if parameter is None or parameter.type in {"int", "float"} or placeholder.place != "unquotable":
            continue
        places[placeholder.name] = Problem(
            f"in the command of entry point {entry_point.name!r}, {{{placeholder.name}}} is where values can't be quoted; values "
            "with other than plain characters are refused",
            project.file,
            line,
            "values are quoted already: write placeholders as words of their own",
            placeholder.name,
        )
    return tuple(places.values())


@dataclass(frozen=True)
class Finding:
    """Something that a lint found.

    Attributes:
        severity: ``error`` for what makes a run fail, ``warning`` for what is odd.
        problem: What it is and where.
    """

    severity: Literal["error", "warning"]
    problem: Problem

    def __str__(self) -> str:
        place = str(self.problem.file) if self.problem.file else "call"
        if self.problem.line is not None:
            place += f":{self.problem.line}"
        fix = f" ({self.problem.fix})" if self.problem.fix else ""
        return f"{place}: {self.severity}: {self.problem.message}{fix}"


def lint(
    path: str | Path, entry_point: str | None = None, parameters: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Checks a project's MLproject file and, when an entry point is named, a call of it.

    Args:
        path: The project's folder.
        entry_point: The entry point to call; None checks the file only, all its entry points included.
        parameters: The values of the call.

    Returns:
        The findings in the order of the file; empty when all is well.

    Raises:
        ProjectSpecError: There is no such folder.
    """
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        load_project(path)
    project, problems = parse_project(directory)
    errors, warnings = list(problems), list(project.warnings)
    for declared in project.entry_points.values():
        errors += command_problems(project, declared)
        warnings += unquotable_warnings(project, declared)
    # A call of a file that could not be read would only add follow-up errors.
    if entry_point is not None and not problems:
        try:
            warnings += check_parameters(find_entry_point(project, entry_point), parameters).warnings
        except (ProjectSpecError, ParameterError) as error:
            errors += error.problems
    # dict.fromkeys: a bad placeholder of the entry point that is called is found twice.
    findings = [Finding("error", each) for each in dict.fromkeys(errors)]
    findings += [Finding("warning", each) for each in dict.fromkeys(warnings)]
    return sorted(findings, key=lambda finding: (str(finding.problem.file or "~"), finding.problem.line or 0))
