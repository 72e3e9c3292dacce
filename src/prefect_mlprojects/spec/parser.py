"""Parses MLproject files.

The format is MLflow's (``mlflow/projects/_project_spec.py``, https://mlflow.org/docs/latest/ml/projects). Everything that MLflow
accepts is accepted; errors that MLflow would find later, or silently misread, are reported with file and line, all at once.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect_mlprojects._support.documents import read_limited
from prefect_mlprojects.exceptions import Problem, ProjectSpecError
from prefect_mlprojects.spec.parameter_parser import ParameterParser
from prefect_mlprojects.spec.project import (
    CondaEnvironment,
    DockerEnvironment,
    EntryPoint,
    NoEnvironment,
    Project,
    ProjectEnvironment,
    ProjectParameter,
    PythonEnvironment,
    expand_volume,
)
from prefect_mlprojects.spec.yaml_lines import YamlDocument, kind_of, read_yaml

PROJECT_FILE_NAME = "MLproject"
_WRONG_SUFFIXES = (".yaml", ".yml", ".txt")
_ENVIRONMENT_KEYS = ("python_env", "conda_env", "docker_env")
_TOP_LEVEL_KEYS = ("name", "entry_points", "experiment", *_ENVIRONMENT_KEYS, "databricks_spark_job")
_FILE_ENVIRONMENTS: Mapping[str, tuple[str, type[PythonEnvironment | CondaEnvironment]]] = {
    "python_env": ("python_env.yaml", PythonEnvironment),
    "conda_env": ("conda.yaml", CondaEnvironment),
}
# Of a pyproject.toml that lists dependencies; others only configure tools.
_DEPENDENCIES = re.compile(r"^\s*(dependencies\s*=|\[tool\.poetry\.dependencies\])", re.MULTILINE)


def load_project(path: str | Path, *, root: Path | None = None) -> Project:
    """Parses and validates the project in a folder; `root` is the one of `Project`.

    Raises:
        ProjectSpecError: The folder does not exist, or its MLproject file is malformed; with every problem found.
    """
    directory = Path(path).expanduser().absolute()
    headline = f"Project {path} can't be loaded"
    if not directory.exists():
        raise ProjectSpecError(headline, [Problem(f"{directory} does not exist")])
    if not directory.is_dir():
        fix = f"give the folder it is in, {directory.parent}"
        raise ProjectSpecError(headline, [Problem(f"{directory} is not a folder", fix=fix)])
    project, problems = parse_project(directory, root=root)
    if problems:
        raise ProjectSpecError(headline, problems)
    return project


def parse_project(
    directory: Path, *, strict: bool = False, root: Path | None = None
) -> tuple[Project, tuple[Problem, ...]]:
    """Parses the project in an existing folder as far as possible; also returns all problems in the order of the file.

    Keys that are given twice are problems if `strict`, else warnings: MLflow takes the last one.
    """
    unusable = Project(directory, None, None, {}, NoEnvironment(), root=root)
    try:
        entries = sorted(directory.iterdir(), key=lambda entry: (entry.name != PROJECT_FILE_NAME, entry.name))
    except OSError as error:
        return unusable, (Problem(f"the folder can't be read: {error.strerror or error}", directory),)
    # A folder of that name is no project file, but a broken link was meant to be one.
    files = [entry for entry in entries if entry.name.lower() == PROJECT_FILE_NAME.lower() and not entry.is_dir()]
    if not files:
        warnings = tuple(
            Problem(f"it is not read: a project file is named {PROJECT_FILE_NAME}", entry, fix="rename it")
            for entry in entries
            if entry.stem.lower() == PROJECT_FILE_NAME.lower() and entry.suffix in _WRONG_SUFFIXES and entry.is_file()
        )
        environment = _default_environment(directory)
        points = _default_entry_points(unusable)
        project = dataclasses.replace(unusable, environment=environment, warnings=warnings, entry_points=points)
        return project, tuple(_outside_problems(project, environment))
    file, *others = files
    unusable = dataclasses.replace(unusable, file=file)
    if not unusable.allows(file):
        return unusable, (Problem("it is a link that leads out of the project's files", file),)
    if file.exists() and not file.is_file():
        return unusable, (Problem("it is not a regular file", file),)
    document = read_yaml(file)
    if document.content is None:
        empty = Problem("the file is empty", file, fix="give it at least 'name:' or 'entry_points:'")
        return unusable, document.problems or (empty,)
    if not isinstance(document.content, dict):
        message = "the file must be a mapping of keys such as 'name' and 'entry_points'"
        return unusable, (Problem(f"{message}, not {kind_of(document.content)}", file, 1),)
    parser = _Parser(unusable, document)
    (parser.problems if strict else parser.warnings).extend(document.duplicates)
    message = f"it is not read, since {file.name} is beside it"
    parser.warnings += (Problem(message, other, fix="remove one") for other in others)
    project = parser.parse()
    return project, tuple(sorted(parser.problems, key=lambda problem: problem.line or 0))


def _outside_problems(project: Project, environment: ProjectEnvironment) -> Iterator[Problem]:
    if isinstance(environment, PythonEnvironment | CondaEnvironment) and not project.allows(environment.file):
        yield Problem("it is a link that leads out of the project's files", environment.file)


def _unused_files(project: Project) -> Iterator[Problem]:
    """Warns of files that list dependencies, which are not installed without an environment file."""
    directory = project.directory
    requirements, package = directory / "requirements.txt", directory / "pyproject.toml"
    message = "it is not used, since the project names no environment"
    if requirements.is_file():
        fix = "write 'python_env: requirements.txt' into the MLproject file, or a python_env.yaml that includes it"
        yield Problem(message, requirements, fix=fix)
    if package.is_file() and not (directory / "uv.lock").is_file() and project.allows(package):
        try:
            text = read_limited(package).decode("utf-8", errors="replace")
        except OSError:
            return
        if _DEPENDENCIES.search(text):
            yield Problem(
                message, package, fix="write 'python_env: pyproject.toml' into the MLproject file, or run `uv lock`"
            )


def _default_environment(directory: Path) -> ProjectEnvironment:
    found = (kind(directory / name) for name, kind in _FILE_ENVIRONMENTS.values() if (directory / name).is_file())
    return next(found, NoEnvironment())


def _default_entry_points(project: Project) -> dict[str, EntryPoint]:
    """Returns ``main.py`` as the entry point ``main``, which a call names if it names none."""
    script = project.directory / "main.py"
    if not script.is_file() or not project.allows(script):
        return {}
    return {"main": EntryPoint("main", "python main.py", {}, script=script.name)}


class _Parser(ParameterParser):
    """Parses one MLproject file and collects its problems and warnings."""

    def __init__(self, empty: Project, document: YamlDocument) -> None:
        super().__init__(document)
        self._empty = empty
        self._directory = empty.directory
        self._content: Mapping[str, Any] = document.content

    def parse(self) -> Project:
        self.warn_of_unknown(self._content, _TOP_LEVEL_KEYS, "")
        name = self._content.get("name")
        if isinstance(name, dict | list):
            self.fail(f"'name' must be text, not {kind_of(name)}", "name")
        experiment = self._content.get("experiment")
        if isinstance(experiment, dict | list | bool):
            self.fail(f"'experiment' must be an experiment's name, not {kind_of(experiment)}", "experiment")
            experiment = None
        entry_points = self._entry_points()
        environment = self._environment()
        spark_job = self._spark_job(entry_points)
        if spark_job is None:
            entry_points = entry_points if "main" in entry_points else entry_points | _default_entry_points(self._empty)
        return dataclasses.replace(
            self._empty,
            name=None if name is None or name == "" else str(name),
            entry_points=entry_points,
            # MLflow gives Spark jobs no environment, not even that of a default file.
            environment=environment if spark_job is None else NoEnvironment(),
            databricks_spark_job=spark_job,
            experiment=None if experiment in (None, "") else str(experiment),
            warnings=tuple(self.warnings),
        )

    def _entry_points(self) -> dict[str, EntryPoint]:
        section = self._content.get("entry_points")
        if section is None:
            return {}
        if not isinstance(section, dict):
            message = f"'entry_points' must be a mapping of names to entry points, not {kind_of(section)}"
            self.fail(message, "entry_points", fix="write 'main:' and below it 'command: …'")
            return {}
        return {name: self._entry_point(name, content) for name, content in section.items()}

    def _entry_point(self, name: str, content: Any) -> EntryPoint:
        path = ("entry_points", name)
        line = self.document.line(*path)
        if not isinstance(content, dict):
            message = f"entry point {name!r} must be a mapping with a 'command', not {kind_of(content)}"
            self.fail(message, *path, fix="write 'command: …' below it")
            return EntryPoint(name, "", {}, line)
        self.warn_of_unknown(content, ("parameters", "command"), f" in entry point {name!r}", *path)
        command = content.get("command")
        if not isinstance(command, str) or not command.strip():
            found = "it has none" if "command" not in content else f"not {kind_of(command)}"
            quote = isinstance(command, dict | list)
            fix = "put the command in quotes" if quote else "write 'command: python train.py'"
            self.fail(f"entry point {name!r} needs a 'command' that is text; {found}", *path, "command", fix=fix)
            command = ""
        elif "\0" in command:
            message = f"the command of entry point {name!r} contains a NUL character"
            self.fail(message, *path, "command", fix="remove it")
        return EntryPoint(
            name=name,
            command=command,
            parameters=self._parameters(path, content.get("parameters")),
            line=line,
            command_line=self.document.line(*path, "command"),
        )

    def _parameters(self, path: tuple[str, ...], section: Any) -> dict[str, ProjectParameter]:
        if section is None:
            return {}
        path = (*path, "parameters")
        if not isinstance(section, dict):
            message = (
                f"'parameters' of entry point {path[1]!r} must be a mapping of names to types, not {kind_of(section)}"
            )
            self.fail(message, *path, fix="write 'alpha: float' or 'alpha: {type: float, default: 0.1}'")
            return {}
        return {name: self.parse_parameter((*path, name), content) for name, content in section.items()}

    def _environment(self) -> ProjectEnvironment:
        given = [key for key in _ENVIRONMENT_KEYS if key in self._content]
        if len(given) > 1:
            message = f"a project has at most one environment, but this one has {' and '.join(given)}"
            last = max(given, key=lambda key: self.document.line(key) or 0)
            self.fail(message, last, fix="remove all but one")
        environment: ProjectEnvironment | None = None
        for key in given:
            value = self._content[key]
            if not value:
                self.warn(f"{key!r} is empty; it is ignored", key, fix="remove it, or say what it is")
            elif key == "docker_env":
                environment = self._docker(value)
            elif (file := self._environment_file(key, value)) is not None:
                environment = _FILE_ENVIRONMENTS[key][1](file)
        if environment is None:
            environment = _default_environment(self._directory)
            self.problems += _outside_problems(self._empty, environment)
        if not given and isinstance(environment, NoEnvironment) and "databricks_spark_job" not in self._content:
            self.warnings += _unused_files(self._empty)
        return environment

    def _environment_file(self, key: str, value: Any) -> Path | None:
        if not isinstance(value, str):
            fix = f"write '{key}: {_FILE_ENVIRONMENTS[key][0]}'"
            self.fail(f"{key!r} must name a file, not {kind_of(value)}", key, fix=fix)
            return None
        file = self._directory / value
        if not self._empty.allows(file):
            message = f"{key!r} names the file {value!r}, which is outside of the project's files"
            self.fail(message, key, fix="put it into the project")
            return None
        if not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises for names that are too long
            message = f"{key!r} names the file {value!r}, which does not exist in {self._directory}"
            self.fail(message, key, fix=f"create it, or remove {key!r}")
            return None
        if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(self._directory)):
            message = f"{key!r} names the file {value!r} outside the project's folder; copies of the folder lack it"
            self.warn(message, key, fix="move it into the project")
        return file

    def _docker(self, section: Any) -> DockerEnvironment | None:
        key = "docker_env"
        if not isinstance(section, dict):
            message = f"'docker_env' must be a mapping with an 'image', not {kind_of(section)}"
            self.fail(message, key, fix="write 'docker_env: {image: name:tag}'")
            return None
        self.warn_of_unknown(section, ("image", "volumes", "environment"), " in 'docker_env'", key)
        image = section.get("image")
        if not isinstance(image, str) or not image:
            self.fail("'docker_env' needs an 'image' that is text", key, "image", fix="write 'image: name:tag'")
            image = ""
        volumes = section.get("volumes") or []
        if not isinstance(volumes, list) or not all(isinstance(each, str) for each in volumes):
            fix = 'write ["/host/path:/container/path"]'
            self.fail("'volumes' of 'docker_env' must be a list of texts", key, "volumes", fix=fix)
            volumes = []
        for volume in volumes:
            try:
                expand_volume(volume, self._directory)
            except ValueError as error:
                fix = "only $(pwd), $PWD (the project's folder) and $HOME are expanded; write an absolute path"
                self.fail(f"volume {volume!r} of 'docker_env' can't be used: {error}", key, "volumes", fix=fix)
        return DockerEnvironment(image, tuple(volumes), tuple(self._docker_variables(section.get("environment") or [])))

    def _docker_variables(self, entries: Any) -> Iterator[tuple[str, str | None]]:
        path, fix = ("docker_env", "environment"), 'write [["NEW_VARIABLE", "value"], "COPIED_FROM_HOST"]'
        if not isinstance(entries, list):
            self.fail(f"'environment' of 'docker_env' must be a list, not {kind_of(entries)}", *path, fix=fix)
            return
        for index, entry in enumerate(entries):
            is_pair = isinstance(entry, list) and len(entry) == 2
            if isinstance(entry, str) and entry:
                yield entry, None
            elif is_pair and not any(isinstance(each, dict | list) for each in entry):
                yield str(entry[0]), str(entry[1])
            else:
                message = "each entry of 'environment' must be a name or a pair of name and value"
                self.fail(message, *path, str(index), fix=fix)

    def _spark_job(self, entry_points: Mapping[str, EntryPoint]) -> Mapping[str, Any] | None:
        key = "databricks_spark_job"
        job = self._content.get(key)
        if job is None:
            return None
        if not isinstance(job, dict):
            self.fail(f"{key!r} must be a mapping, not {kind_of(job)}", key)
            return None
        self.warn_of_unknown(job, ("python_file", "parameters", "python_libraries"), f" in {key!r}", key)
        if job.get("python_file") is None and not entry_points:
            self.fail(f"{key!r} needs a 'python_file', or the project needs 'entry_points'", key)
        if job.get("python_file") is not None and entry_points:
            self.fail(f"{key!r} with a 'python_file' can't be combined with 'entry_points'", key, fix="remove one")
        for environment in _ENVIRONMENT_KEYS:
            if environment in self._content:
                self.fail(f"{key!r} can't be combined with {environment!r}", environment, fix="remove one")
        for entry_point in entry_points.values():
            for name in (name for name, each in entry_point.parameters.items() if each.type == "path"):
                message = f"a {key!r} has no parameters of type path, but {name!r} is one"
                path = ("entry_points", entry_point.name, "parameters", name)
                self.fail(message, *path, fix="declare it as uri", parameter=name)
        return dict(job)
