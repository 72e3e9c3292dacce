"""Reads MLproject files.

The format is MLflow's (``mlflow/projects/_project_spec.py``, https://mlflow.org/docs/latest/ml/projects): what it accepts is
accepted here. What it would trip over later, or silently misread, is reported with file and line, everything at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from prefect_mlprojects.exceptions import Problem, ProjectSpecError
from prefect_mlprojects.spec.project import (
    CondaEnvironment,
    DockerEnvironment,
    EntryPoint,
    NoEnvironment,
    ParameterType,
    Project,
    ProjectEnvironment,
    ProjectParameter,
    PythonEnvironment,
)
from prefect_mlprojects.spec.yaml_lines import YamlDocument, read_yaml

PROJECT_FILE_NAME = "MLproject"
_ENVIRONMENT_KEYS = ("python_env", "conda_env", "docker_env")
_TOP_LEVEL_KEYS = ("name", "entry_points", *_ENVIRONMENT_KEYS, "databricks_spark_job")
_DEFAULT_FILES = {"python_env": "python_env.yaml", "conda_env": "conda.yaml"}


def load_project(path: str | Path) -> Project:
    """Parses and validates the project in a folder.

    Args:
        path: The project's folder; one without an MLproject file is a project without entry points, whose scripts can be run
            by name.

    Raises:
        ProjectSpecError: There is no such folder, or its MLproject file is malformed; with every problem found.
    """
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        what = "is not a folder" if directory.exists() else "does not exist"
        raise ProjectSpecError(f"Project {path} can't be loaded", [Problem(f"{directory} {what}")])
    project, problems = parse_project(directory)
    if problems:
        raise ProjectSpecError(f"Project {directory} can't be loaded", problems)
    return project


def parse_project(directory: Path) -> tuple[Project, tuple[Problem, ...]]:
    """Parses the project in an existing folder.

    Returns:
        The project as far as it could be understood, and all problems; the project is to be used only when there are none.
    """
    files = sorted(
        (entry for entry in directory.iterdir() if entry.name.lower() == PROJECT_FILE_NAME.lower() and entry.is_file()),
        key=lambda entry: (entry.name != PROJECT_FILE_NAME, entry.name),
    )
    if not files:
        return Project(directory, None, None, {}, _default_environment(directory)), ()
    document = read_yaml(files[0])
    warnings = [Problem(f"it is not read: {files[0].name} stands beside it", file=extra) for extra in files[1:]]
    if document.problems:
        return Project(directory, files[0], None, {}, NoEnvironment()), document.problems
    if document.content is None:
        empty = Problem("the file is empty", files[0], fix="give it at least 'name:' or 'entry_points:'")
        return Project(directory, files[0], None, {}, NoEnvironment()), (empty,)
    if not isinstance(document.content, dict):
        shape = document.problem(
            f"the file must hold a mapping of keys such as 'name' and 'entry_points', not a {_kind(document.content)}"
        )
        return Project(directory, files[0], None, {}, NoEnvironment()), (shape,)
    parser = _Parser(directory, document, warnings)
    project = parser.parse()
    return project, tuple(sorted(parser.problems, key=lambda problem: problem.line or 0))


def _default_environment(directory: Path) -> ProjectEnvironment:
    if (directory / _DEFAULT_FILES["python_env"]).is_file():
        return PythonEnvironment(directory / _DEFAULT_FILES["python_env"])
    if (directory / _DEFAULT_FILES["conda_env"]).is_file():
        return CondaEnvironment(directory / _DEFAULT_FILES["conda_env"])
    return NoEnvironment()


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


class _Parser:
    """Walks over one MLproject file and collects what is wrong with it."""

    def __init__(self, directory: Path, document: YamlDocument, warnings: list[Problem]) -> None:
        self._directory = directory
        self._document = document
        self._content: Mapping[Any, Any] = document.content
        self._warnings = warnings
        self.problems: list[Problem] = []

    def _fail(self, message: str, *path: str, fix: str | None = None, parameter: str | None = None) -> None:
        self.problems.append(self._document.problem(message, *path, fix=fix, parameter=parameter))

    def _warn(self, message: str, *path: str, fix: str | None = None) -> None:
        self._warnings.append(self._document.problem(message, *path, fix=fix))

    def parse(self) -> Project:
        for key in self._content:
            if key not in _TOP_LEVEL_KEYS:
                near = get_close_matches(str(key), _TOP_LEVEL_KEYS, n=1)
                self._warn(
                    f"unknown key {str(key)!r}; it is ignored",
                    str(key),
                    fix=f"did you mean {near[0]!r}?" if near else None,
                )
        name = self._content.get("name")
        if name is not None and isinstance(name, dict | list):
            self._fail(f"'name' must be text, not a {_kind(name)}", "name")
        entry_points = self._entry_points()
        environment = self._environment()
        spark_job = self._spark_job(entry_points)
        return Project(
            directory=self._directory,
            file=self._document.file,
            name=None if name is None else str(name),
            entry_points=entry_points,
            environment=environment,
            databricks_spark_job=spark_job,
            warnings=tuple(self._warnings),
        )

    def _entry_points(self) -> dict[str, EntryPoint]:
        section = self._content.get("entry_points")
        if section is None:
            return {}
        if not isinstance(section, dict):
            self._fail(
                f"'entry_points' must be a mapping of names to entry points, not a {_kind(section)}",
                "entry_points",
                fix="write 'main:' and below it 'command: …'",
            )
            return {}
        return {str(name): self._entry_point(str(name), content) for name, content in section.items()}

    def _entry_point(self, name: str, content: Any) -> EntryPoint:
        path = ("entry_points", name)
        line = self._document.line(*path)
        if not isinstance(content, dict):
            self._fail(
                f"entry point {name!r} must be a mapping with a 'command', not {_kind(content)}",
                *path,
                fix="write 'command: …' below it",
            )
            return EntryPoint(name, "", {}, line)
        for key in content:
            if key not in {"parameters", "command"}:
                near = get_close_matches(str(key), ("parameters", "command"), n=1)
                hint = f"did you mean {near[0]!r}?" if near else None
                self._warn(
                    f"unknown key {str(key)!r} in entry point {name!r}; it is ignored", *path, str(key), fix=hint
                )
        command = content.get("command")
        if not isinstance(command, str) or not command.strip():
            said = "it has none" if command is None else f"not {_kind(command)}"
            self._fail(f"entry point {name!r} needs a 'command' that is text; {said}", *path, "command")
            command = ""
        return EntryPoint(name, command, self._parameters(path, content.get("parameters")), line)

    def _parameters(self, path: tuple[str, ...], section: Any) -> dict[str, ProjectParameter]:
        if section is None:
            return {}
        if not isinstance(section, dict):
            self._fail(
                f"'parameters' of entry point {path[1]!r} must be a mapping of names to types, not a {_kind(section)}",
                *path,
                "parameters",
                fix="write 'alpha: float' or 'alpha: {type: float, default: 0.1}'",
            )
            return {}
        return {
            str(name): self._parameter((*path, "parameters", str(name)), content) for name, content in section.items()
        }

    def _parameter(self, path: tuple[str, ...], content: Any) -> ProjectParameter:
        name, line = path[-1], self._document.line(*path)
        default: Any = None
        declared: Any = content
        if isinstance(content, dict):
            for key in content:
                if key not in {"type", "default", "description"}:
                    near = get_close_matches(str(key), ("type", "default"), n=1)
                    hint = f"did you mean {near[0]!r}?" if near else None
                    self._warn(
                        f"unknown key {str(key)!r} in parameter {name!r}; it is ignored", *path, str(key), fix=hint
                    )
            declared, default = content.get("type", "string"), content.get("default")
        if not isinstance(declared, str):
            self._fail(
                f"parameter {name!r} must have a type or a mapping of 'type' and 'default', not {_kind(declared)}",
                *path,
                fix=f"write '{name}: float' or '{name}: {{type: float, default: 0.1}}'",
                parameter=name,
            )
            declared = "string"
        if isinstance(default, dict | list):
            self._fail(f"the default of parameter {name!r} must be one value, not a {_kind(default)}", *path, "default")
            default = None
        known: dict[str, ParameterType] = {each: each for each in get_args(ParameterType)}
        if declared not in known:
            near = get_close_matches(declared, known, n=1)
            self._warn(
                f"parameter {name!r} has the unknown type {declared!r}; it is treated as string",
                *path,
                fix=f"did you mean {near[0]!r}?" if near else f"the types are {', '.join(known)}",
            )
        # MLflow substitutes str() of what YAML makes of the default: 0.10 becomes 0.1 and true becomes True.
        text = None if default is None else str(default)
        return ProjectParameter(name, declared, known.get(declared, "string"), text, line)

    def _environment(self) -> ProjectEnvironment:
        given = [key for key in _ENVIRONMENT_KEYS if key in self._content]
        if len(given) > 1:
            self._fail(
                f"a project has at most one environment, but this one has {' and '.join(given)}",
                given[-1],
                fix="remove all but one",
            )
        found: ProjectEnvironment = _default_environment(self._directory)
        for key in given:
            value = self._content[key]
            if not value:
                continue
            if key == "docker_env":
                found = self._docker(value)
            elif (file := self._environment_file(key, value)) is not None:
                found = PythonEnvironment(file) if key == "python_env" else CondaEnvironment(file)
        return found

    def _environment_file(self, key: str, value: Any) -> Path | None:
        if not isinstance(value, str):
            self._fail(
                f"{key!r} must name a file, not a {_kind(value)}", key, fix=f"write '{key}: {_DEFAULT_FILES[key]}'"
            )
            return None
        file = self._directory / value
        if not file.is_file():
            self._fail(f"{key!r} names the file {value!r}, which is not in the project", key)
            return None
        return file

    def _docker(self, value: Any) -> ProjectEnvironment:
        if not isinstance(value, dict):
            self._fail(f"'docker_env' must be a mapping with an 'image', not a {_kind(value)}", "docker_env")
            return NoEnvironment()
        for key in value:
            if key not in {"image", "volumes", "environment"}:
                near = get_close_matches(str(key), ("image", "volumes", "environment"), n=1)
                hint = f"did you mean {near[0]!r}?" if near else None
                self._warn(f"unknown key {str(key)!r} in 'docker_env'; it is ignored", "docker_env", str(key), fix=hint)
        image = value.get("image")
        if not isinstance(image, str) or not image:
            self._fail(
                "'docker_env' needs an 'image' that is text", "docker_env", "image", fix="write 'image: name:tag'"
            )
            image = ""
        volumes = value.get("volumes") or []
        if not isinstance(volumes, list) or not all(isinstance(each, str) for each in volumes):
            self._fail(
                "'volumes' of 'docker_env' must be a list of texts",
                "docker_env",
                "volumes",
                fix='write ["/host/path:/container/path"]',
            )
            volumes = []
        return DockerEnvironment(image, tuple(volumes), self._docker_variables(value.get("environment") or []))

    def _docker_variables(self, entries: Any) -> tuple[tuple[str, str | None], ...]:
        fix = 'write [["NEW_VARIABLE", "value"], "COPIED_FROM_HOST"]'
        if not isinstance(entries, list):
            self._fail("'environment' of 'docker_env' must be a list", "docker_env", "environment", fix=fix)
            return ()
        variables: list[tuple[str, str | None]] = []
        for index, entry in enumerate(entries):
            if isinstance(entry, str):
                variables.append((entry, None))
            elif isinstance(entry, list) and len(entry) == 2 and not any(isinstance(x, dict | list) for x in entry):
                variables.append((str(entry[0]), str(entry[1])))
            else:
                self._fail(
                    "each of 'environment' must be a name or a pair of name and value",
                    "docker_env",
                    "environment",
                    str(index),
                    fix=fix,
                )
        return tuple(variables)

    def _spark_job(self, entry_points: Mapping[str, EntryPoint]) -> Mapping[str, Any] | None:
        key = "databricks_spark_job"
        job = self._content.get(key)
        if job is None:
            return None
        if not isinstance(job, dict):
            self._fail(f"{key!r} must be a mapping, not a {_kind(job)}", key)
            return None
        if job.get("python_file") is None and not entry_points:
            self._fail(f"{key!r} needs a 'python_file', or the project needs 'entry_points'", key)
        if job.get("python_file") is not None and entry_points:
            self._fail(f"{key!r} with a 'python_file' does not go together with 'entry_points'", key)
        for environment in _ENVIRONMENT_KEYS:
            if environment in self._content:
                self._fail(f"{key!r} does not go together with {environment!r}", environment)
        for entry_point in entry_points.values():
            for parameter in entry_point.parameters.values():
                if parameter.type == "path":
                    self._fail(
                        f"a {key!r} has no parameters of type path, but {parameter.name!r} is one",
                        "entry_points",
                        entry_point.name,
                        "parameters",
                        parameter.name,
                        parameter=parameter.name,
                    )
        return dict(job)
