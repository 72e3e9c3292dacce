"""Checks the files that describe a project's environment, without building anything."""

from __future__ import annotations

from prefect_mlprojects.environments.conda.recipe import check_conda_environment
from prefect_mlprojects.environments.recipe import read_contents
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.project import CondaEnvironment, DockerEnvironment, Project


def check_environment(project: Project) -> tuple[Problem, ...]:
    """Checks the files that describe a project's environment.

    Returns:
        Everything that is wrong with the files; nothing for a Docker project.
    """
    if isinstance(project.environment, DockerEnvironment):
        return ()
    if isinstance(project.environment, CondaEnvironment):
        return check_conda_environment(project)
    contents = read_contents(project, "uv")
    return contents if isinstance(contents, tuple) else ()
