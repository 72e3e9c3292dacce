"""Everything that can be said of a project file, and of a call, without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefect_mlprojects.exceptions import ParameterError, Problem, ProjectSpecError
from prefect_mlprojects.spec.entry_points import command_problems, find_entry_point, quoted_placeholder_warnings
from prefect_mlprojects.spec.parameters import check_parameters
from prefect_mlprojects.spec.parser import load_project, parse_project


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
        warnings += quoted_placeholder_warnings(project, declared)
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
