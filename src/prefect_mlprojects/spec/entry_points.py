"""Calls of a project: the entry point or script that a call names, its command line, and all mistakes of a call at once."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import ParameterError, Problem, ProjectSpecError, shown
from prefect_mlprojects.spec.arguments import (
    adapt_template,
    appended_parameters,
    command_values,
    misplaced_parameters,
)
from prefect_mlprojects.spec.parameters import CheckedParameters, check_parameters, place_problems
from prefect_mlprojects.spec.parser import PROJECT_FILE_NAME, load_project, parse_project
from prefect_mlprojects.spec.project import EntryPoint, Project
from prefect_mlprojects.spec.template import expanded, is_plain, parse_template

_LISTED_NAMES = 20


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


def build_command(entry_point: EntryPoint, parameters: CheckedParameters) -> str:
    """Returns the shell command line of a call, to be run by ``bash -c``; each value is quoted here, and only here.

    Undeclared parameters follow as ``--name value`` in the order given. Secret ones are not in the line: the shell gets them in
    ``CheckedParameters.variables`` and expands them. MLflow builds the same line
    (``EntryPoint.compute_command``), except for the differences in ``docs/compatibility.md``.

    Raises:
        ParameterError: A downloaded file's path can't be quoted at its placeholder; ``check_parameters`` checks other values.
        ValueError: A parameter is still to be downloaded.
    """
    if parameters.downloads:
        raise ValueError(f"still to be downloaded: {', '.join(parameters.downloads)}")
    template = adapt_template(
        parse_template(entry_point.command), entry_point, parameters.declared, parameters.secrets.keys()
    )
    values, variables = command_values(entry_point, parameters.declared), parameters.variables
    problems = place_problems(template, values, parameters.extra, parameters.secrets.keys())
    if problems:
        raise ParameterError(f"Parameters of entry point '{entry_point.name}' do not fit", problems)
    command = template.render(values, variables)
    if not parameters.extra:
        return command
    if template.line_ends:
        command = command.rstrip()
    options = (
        f"--{shlex.quote(name)} {expanded(variables[name], 'word') if name in variables else shlex.quote(value)}"
        for name, value in parameters.extra.items()
    )
    return " ".join([command, *options])


def find_entry_point(project: Project, name: str, uri: str | None = None) -> EntryPoint:
    """Returns the entry point of that name, or the script (``.py``, ``.sh``, ``.R``) at that path in the project's folder.

    Messages name the project by its redacted `uri`, or else by its folder.

    Raises:
        ProjectSpecError: Neither exists, or the entry point's command has unusable placeholders.
    """
    entry_point = _look_up(project, name, uri)
    if problems := command_problems(project, entry_point):
        raise ProjectSpecError(f"Entry point '{name}' of project '{project.display_name}' can't be used", problems)
    return entry_point


def check_call(
    directory: Path,
    name: str,
    values: Mapping[str, Any] | None,
    uri: str | None = None,
    *,
    spark_job: bool = False,
    hidden: Collection[str] = (),
    root: Path | None = None,
) -> tuple[Project, EntryPoint, CheckedParameters]:
    """Parses the project in a folder and checks a call of it; reports the problems of file, command and values together.

    The parameters `hidden` are secret, whether the project says so or not. `root` is that of the project. With `spark_job`, the
    entry point is the ``python_file`` of a Databricks Spark job.

    Raises:
        ProjectSpecError: The file is malformed, or the entry point does not exist or can't be used.
        ParameterError: Only the values are wrong.
    """
    project, problems = parse_project(directory, root=root)
    entry_point, checked, error = _check_values(
        project, problems, name, values, uri, spark_job=spark_job, hidden=hidden
    )
    problems += command_problems(project, entry_point) if entry_point else ()
    if problems:
        headline = f"Entry point '{name}' of project '{project.display_name}' can't be run"
        raise ProjectSpecError(headline, [*problems, *(error.problems if error else ())])
    if entry_point is None or checked is None:
        assert error is not None
        raise error
    return project, entry_point, checked


def _check_values(
    project: Project,
    file_problems: tuple[Problem, ...],
    name: str,
    values: Mapping[str, Any] | None,
    uri: str | None = None,
    *,
    spark_job: bool = False,
    hidden: Collection[str] = (),
) -> tuple[EntryPoint | None, CheckedParameters | None, ProjectSpecError | ParameterError | None]:
    # A file without any readable entry point would only add follow-up errors.
    if file_problems and not project.entry_points:
        return None, None, None
    entry_point = spark_job_entry_point(project, name) if spark_job else None
    try:
        entry_point = entry_point or _look_up(project, name, uri)
        return entry_point, check_parameters(entry_point, values, project.directory, hidden), None
    except (ProjectSpecError, ParameterError) as error:
        return entry_point, None, error


def _look_up(project: Project, name: str, uri: str | None) -> EntryPoint:
    if name in project.entry_points:
        return project.entry_points[name]
    headline = f"Project '{project.display_name}' has no entry point '{name}'"
    if project.databricks_spark_job is not None:
        raise ProjectSpecError(headline, [_unknown_in_spark_job(project, name)])
    make_command = _SCRIPT_COMMANDS.get(PurePosixPath(name).suffix)
    # Path.is_file raises for names that are too long; links are not resolved: they are the project's own business.
    file = os.path.normpath(os.path.join(project.directory, name))  # noqa: PTH118
    if make_command is not None and not Path(file).is_relative_to(os.path.normpath(project.directory)):
        outside = Problem(f"the script {name!r} is outside the project's folder, {project.directory}")
        raise ProjectSpecError(headline, [outside])
    if make_command is None or not os.path.isfile(file):  # noqa: PTH113
        if project.file is None:
            raise _no_project_file(project, name, uri or str(project.directory))
        raise ProjectSpecError(headline, _unknown(project, name))
    # The command is a template: braces of the script's name are not placeholders.
    command = make_command(name).replace("{", "{{").replace("}", "}}")
    return EntryPoint(name=name, command=command, parameters={}, script=name)


def spark_job_entry_point(project: Project, name: str) -> EntryPoint | None:
    """Returns the entry point of a Databricks Spark job with a ``python_file``; None for other projects.

    Such a project declares no entry points: its file runs whatever `name` is, with the parameters of the MLproject file.
    """
    file = (project.databricks_spark_job or {}).get("python_file")
    if file is None:
        return None
    return EntryPoint(name=name, command=f"python {file}".replace("{", "{{").replace("}", "}}"), parameters={})


def _unknown_in_spark_job(project: Project, name: str) -> Problem:
    if spark_job_entry_point(project, name) is not None:
        message = "it is a Databricks Spark job with a 'python_file' and has no entry points"
        return Problem(message, project.file, fix="run it on Databricks")
    message = f"it declares {', '.join(project.entry_points)}; a Databricks Spark job runs no scripts by name"
    return Problem(message, project.file, fix=_did_you_mean(name, project.entry_points))


def _unknown(project: Project, name: str) -> list[Problem]:
    scripts = _scripts(project)
    declared = f"it declares {', '.join(project.entry_points)}" if project.entry_points else "it declares none"
    has = f"has the scripts {_listed(scripts)}" if scripts else "has no scripts (.py, .sh, .R)"
    problem = Problem(f"{declared} and {has}", project.file, fix=_did_you_mean(name, [*project.entry_points, *scripts]))
    # A misspelled 'entry_points' is only a warning otherwise.
    related = () if project.entry_points else (each for each in project.warnings if each.file == project.file)
    return [problem, *related]


def _no_project_file(project: Project, name: str, uri: str) -> ProjectSpecError:
    is_script = PurePosixPath(name).suffix in _SCRIPT_COMMANDS
    headline = f"No {PROJECT_FILE_NAME} file found in {uri}" + (f", and no script {name!r}" if is_script else "")
    scripts = _scripts(project)
    problems = [*project.warnings, *_sub_folder_problems(project, uri)]
    if scripts and (is_script or not problems):
        command = shlex.join(["mlprojects", "run", uri, "-e", nearest(name, scripts) or scripts[0]])
        message = f"the folder has the script{'s' if len(scripts) > 1 else ''} {_listed(scripts)}"
        problems.append(Problem(message, fix=f"to run one, name it: `{command}`"))
    create = f"create a file named {PROJECT_FILE_NAME}, or give the URI of the folder that has one"
    return ProjectSpecError(
        headline, problems or [Problem("the folder has no scripts (.py, .sh, .R) either", fix=create)]
    )


def _sub_folder_problems(project: Project, uri: str) -> list[Problem]:
    """Returns a problem that names the sub-folders (at most two levels below) with an MLproject file; empty without any."""
    if project.file is not None:
        return []
    found = (file for pattern in ("*", "*/*") for file in project.directory.glob(f"{pattern}/{PROJECT_FILE_NAME}"))
    folders = sorted(file.parent.relative_to(project.directory).as_posix() for file in found if file.is_file())
    folders = [folder for folder in folders if not folder.startswith(".")]
    if not folders:
        return []
    where = f"one is in {folders[0]}" if len(folders) == 1 else f"the sub-folders {_listed(folders)} have one"
    target = f"{uri}{'/' if '#' in uri else '#'}{folders[0]}"
    return [Problem(where, fix=f"use {target}" if len(folders) == 1 else f"name one of them, such as {target}")]


def _scripts(project: Project) -> list[str]:
    return sorted(each.name for each in project.directory.glob("*") if each.suffix in _SCRIPT_COMMANDS)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return f"{', '.join(names[:_LISTED_NAMES])}{more}"


def _did_you_mean(name: str, known: Iterable[str]) -> str | None:
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else None


def command_problems(project: Project, entry_point: EntryPoint) -> tuple[Problem, ...]:
    """Returns the faults of an entry point's command template, and its placeholders that no parameter declares."""
    template = parse_template(entry_point.command)
    subject = f"the command of entry point {entry_point.name!r}"
    line = entry_point.command_line or entry_point.line
    problems = [Problem(f"{subject} {message}", project.file, line, fix) for message, fix in template.faults]
    for name in dict.fromkeys(placeholder.name for placeholder in template.placeholders):
        if name in entry_point.parameters:
            continue
        near = nearest(name, entry_point.parameters)
        message = f"{subject} has the placeholder {{{name}}}, which no parameter declares"
        fix = f"did you mean {{{near}}}?" if near else "declare it, or write {{ and }} for braces"
        problems.append(Problem(message, project.file, line, fix))
    for name in misplaced_parameters(template, entry_point):
        message = f"{subject} has {{{name}}} within another word or quotes, but it stands for several words, or none"
        problems.append(Problem(message, project.file, line, "put blanks around it", name))
    if template.end != "word" and (names := [each.name for each in appended_parameters(template, entry_point)]):
        message = f"{subject} can't be followed by {', '.join(names)}: it ends within quotes or a comment"
        problems.append(Problem(message, project.file, line, "write the placeholders into the command"))
    return tuple(problems)


def _unquotable_warnings(project: Project, entry_point: EntryPoint) -> list[Problem]:
    line = entry_point.command_line or entry_point.line
    where = f"in the command of entry point {entry_point.name!r}"
    messages = {
        "unquotable": "values can't be quoted at {{{}}}; values with other than plain characters are refused",
        "number": "the shell calculates at {{{}}}; values other than numbers are refused",
    }
    fix = "values are quoted already: write placeholders as words of their own"
    placeholders = parse_template(entry_point.command).placeholders
    return [
        Problem(f"{where}, {messages[place].format(name)}", project.file, line, fix, name)
        for name, place in dict.fromkeys((each.name, each.place) for each in placeholders)
        if place in messages
        if name in entry_point.parameters and entry_point.parameters[name].type not in {"int", "float"}
    ]


@dataclass(frozen=True)
class Finding:
    """A finding of a lint: an ``error`` makes a run fail, a ``warning`` does not."""

    severity: Literal["error", "warning"]
    problem: Problem

    def __str__(self) -> str:
        location = str(self.problem.file) if self.problem.file else "call"
        if self.problem.line is not None:
            location += f":{self.problem.line}"
        fix = f" ({self.problem.fix})" if self.problem.fix else ""
        return shown(f"{location}: {self.severity}: {self.problem.message}{fix}")


def lint(
    path: str | Path,
    entry_point: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    root: Path | None = None,
) -> list[Finding]:
    """Returns the findings in a project's MLproject file, all entry points included, in the order of the file.

    With `entry_point`, a call of it with these parameters is checked, too. `root` is that of the project.

    Raises:
        ProjectSpecError: The folder does not exist.
    """
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        load_project(path)
    project, problems = parse_project(directory, strict=True, root=root)
    errors, warnings = list(problems), list(project.warnings)
    warnings += (
        Problem(f"no {PROJECT_FILE_NAME} file found in {path}: {each.message}", fix=each.fix)
        for each in _sub_folder_problems(project, str(path))
    )
    for declared in project.entry_points.values():
        errors += command_problems(project, declared)
        warnings += _unquotable_warnings(project, declared)
    if entry_point is not None:
        _, checked, error = _check_values(project, problems, entry_point, parameters)
        errors += error.problems if error else ()
        warnings += checked.warnings if checked else ()
    findings = [Finding("error", each) for each in dict.fromkeys(errors)]
    findings += [Finding("warning", each) for each in dict.fromkeys(warnings) if each not in errors]
    return sorted(findings, key=lambda finding: (str(finding.problem.file or "~"), finding.problem.line or 0))
