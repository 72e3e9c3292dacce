"""MLproject files: parsing, parameters, command lines."""

from prefect_mlprojects.spec.entry_points import (
    Finding,
    build_command,
    check_call,
    find_entry_point,
    lint,
    spark_job_entry_point,
)
from prefect_mlprojects.spec.parameters import CheckedParameters, check_parameters
from prefect_mlprojects.spec.parser import load_project
from prefect_mlprojects.spec.project import (
    CondaEnvironment,
    DockerEnvironment,
    EntryPoint,
    NoEnvironment,
    Project,
    ProjectEnvironment,
    ProjectParameter,
    PythonEnvironment,
)

__all__ = [
    "CheckedParameters",
    "CondaEnvironment",
    "DockerEnvironment",
    "EntryPoint",
    "Finding",
    "NoEnvironment",
    "Project",
    "ProjectEnvironment",
    "ProjectParameter",
    "PythonEnvironment",
    "build_command",
    "check_call",
    "check_parameters",
    "find_entry_point",
    "lint",
    "load_project",
    "spark_job_entry_point",
]
