"""Conda environments without conda: the specification of one, and the manager that builds it with py-rattler."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.environments import Build, CachingManager, Specification, problems_error
from prefect_mlprojects.environments.activation import conda_variables, own_environment, write_state
from prefect_mlprojects.environments.cache import Report, cache_errors
from prefect_mlprojects.environments.conda import configuration as settings
from prefect_mlprojects.environments.conda.configuration import (
    channel_credentials,
    expand_variables,
    public_url,
    split_channel,
)
from prefect_mlprojects.environments.python import files, libc_family
from prefect_mlprojects.environments.python.files import RequirementEntry
from prefect_mlprojects.environments.python.installers import index_credentials, install_with_uv, key_settings
from prefect_mlprojects.environments.python.requirements import RequirementSet, expand_requirements
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.project import CondaEnvironment, Project
from prefect_mlprojects.types import StopSignal

_KEYS = ("name", "channels", "dependencies", "variables", "prefix")


@dataclass(frozen=True)
class CondaFile:
    """The content of a ``conda.yaml``; `channels` are in the order of preference."""

    file: Path
    name: str | None = None
    channels: tuple[str, ...] = field(default=(), repr=False)
    dependencies: tuple[RequirementEntry, ...] = field(default=(), repr=False)
    pip: tuple[RequirementEntry, ...] = field(default=(), repr=False)
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()


def read_conda_file(path: Path) -> CondaFile | tuple[Problem, ...]:
    """Reads a ``conda.yaml``."""
    reader = files.open_environment_file(path)
    if isinstance(reader, tuple):
        return reader
    content = reader.document.content
    warnings = tuple(
        f"{path.name}: the key {str(key)!r} is not conda's and is passed over" for key in content if key not in _KEYS
    )
    channels = reader.entries("channels")
    for position, item in channels.items():
        if not isinstance(item, str) or not item.strip():
            reader.problem("an entry of channels must be a text, such as 'conda-forge' or a URL", "channels", position)
    packages, pip = reader.conda_dependencies()
    for position, entry in packages.items():
        rest = split_channel(entry.text)[1]
        if _NAME.match(rest) is None and "://" not in rest and not rest.startswith(("/", ".")):
            fix = "write numpy=1.26"
            reader.problem(f"{entry.text!r} is not a conda dependency", "dependencies", position, fix=fix)
    variables = _variables(reader)
    if reader.problems:
        return tuple(reader.problems)
    name = None if content.get("name") is None else str(content["name"])
    urls = tuple(channel.strip() for channel in channels.values())
    return CondaFile(path, name, urls, tuple(packages.values()), pip, variables, warnings)


def _variables(reader: files.FileReader) -> dict[str, str]:
    value = reader.document.content.get("variables")
    if value is None:
        return {}
    if not isinstance(value, dict):
        reader.problem("variables must be a mapping of names to values", "variables", fix="write NAME: value")
        return {}
    found: dict[str, str] = {}
    for name, text in value.items():
        if isinstance(text, (dict, list)) or not str(name) or "=" in str(name) or "\0" in f"{name}{text}":
            reader.problem(f"the variable {str(name)!r} can't be set", "variables", str(name), fix="write NAME: value")
        elif text is not None:
            found[str(name)] = ("true" if text else "false") if isinstance(text, bool) else str(text)
    return found


KEY_VERSION = "conda 1"  # part of every cache key; raised when the same specification is built differently than before

_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*")
_AROUND_OPERATORS = re.compile(r"\s*(==|>=|<=|!=|~=|[=<>,|])\s*")
_EXACT_PYTHON = re.compile(r"^python\s*={1,2}\s*(\d+\.\d+\.\d+)$")


@dataclass(frozen=True)
class CondaSpec:
    """One requested conda package: the `text` of the file, and for the solver `match`, with the channel's URL."""

    text: str = field(repr=False)
    match: str = field(repr=False)
    line: int | None = None


@dataclass(frozen=True)
class CondaSpecification(Specification):
    """The environment specification of a conda environment; `channels` are URLs, which may hold passwords, by preference."""

    file: CondaFile
    specs: tuple[CondaSpec, ...]
    channels: tuple[str, ...] = field(repr=False)
    pip: RequirementSet
    configuration: settings.CondaConfiguration

    def describe(self, python_version: str | None) -> str:
        """Describes the environment in a few words."""
        version = self.python_version or python_version
        packages = f"{len(self.specs)} conda package{'' if len(self.specs) == 1 else 's'}"
        pip = f", {self.pip.count} of pip" if self.pip.count else ""
        return f"conda, {f'Python {version}, ' if version else ''}{packages}{pip} ({self.file.file.name})"


def _project_file(project: Project) -> CondaFile | tuple[Problem, ...]:
    """Reads a project's ``conda.yaml``; what it names outside of the project's files is a problem."""
    assert isinstance(project.environment, CondaEnvironment)
    if problem := files.outside_problem(project):
        return (problem,)
    file = read_conda_file(project.environment.file)
    if isinstance(file, tuple):
        return file
    named = [*file.channels, *(part for each in file.dependencies for part in split_channel(each.text) if part)]
    folders = [(text, settings.local_folder(text, file.file.parent)) for text in named]
    return (
        tuple(
            Problem(f"{text!r} is outside of the project's files", file.file, fix="put it into the project")
            for text, folder in folders
            if folder is not None and not project.allows(folder)
        )
        or file
    )


def read_specification(project: Project, environ: Mapping[str, str]) -> CondaSpecification:
    """Reads a project's conda.yaml and conda's settings; needs no network. Raises an ``EnvironmentBuildError``."""
    file = _project_file(project)
    if isinstance(file, tuple):
        raise problems_error(project, file, "conda")
    pip = expand_requirements(file.pip, file.file, project, "uv")
    if isinstance(pip, tuple):
        raise problems_error(project, pip, "conda")
    configuration = settings.read_configuration(environ)
    base = file.file.parent
    named = [expand_variables(channel, environ) for channel in file.channels]
    channels = list(settings.environment_channels(named, configuration, base))
    specs = []
    for entry in _with_python(file):
        name, match = split_channel(entry.text)
        if name is not None:
            # Of several channels with one name, such as defaults, the first counts.
            url = settings.channel_urls(expand_variables(name, environ), configuration, base)[0]
            settings.check_allowed(url, configuration, base)
            if url not in channels:
                channels.append(url)
            match = f"{url}::{match}"
        specs.append(CondaSpec(entry.text, match, entry.line))
    texts = [
        *(KEY_VERSION, configuration.subdir, libc_family(), "channels", *(public_url(url) for url in channels)),
        *("packages", *(_normalised(spec) for spec in specs)),
        *("variables", *(f"{name}={value}" for name, value in sorted(file.variables.items()))),
        *("pip", *pip.key_inputs),
        *("settings", configuration.channel_priority, str(configuration.add_pip_as_python_dependency)),
        *(f"{name}={environ[name]}" for name in sorted(environ) if name.startswith("CONDA_OVERRIDE_")),
        *(key_settings(environ, "uv", project.directory) if pip.key_inputs else ()),
    ]
    credentials = channel_credentials(channels, environ)
    texts += files.digest_credentials((*credentials, *pip.credentials))
    matches = (_EXACT_PYTHON.match(split_channel(spec.text)[1]) for spec in specs)
    python = next((match[1] for match in matches if match is not None), None)
    key, sources = files.digest_text(texts), (specs, channels, pip.text_inputs)
    private = pip.private or bool(credentials) or bool(index_credentials(environ))
    common = (project, key, sources, private, python, file.warnings)
    return CondaSpecification(*common, file, tuple(specs), tuple(channels), pip, configuration)


def _with_python(file: CondaFile) -> tuple[RequirementEntry, ...]:
    """Returns the dependencies, with Python if a pip section lacks one; conda then adds pip."""
    matches = (_NAME.match(split_channel(entry.text)[1]) for entry in file.dependencies)
    names = {match[0].lower() for match in matches if match is not None}
    if file.pip and not names & {"python", "pip"}:
        return (*file.dependencies, RequirementEntry("python"))
    return file.dependencies


def _normalised(spec: CondaSpec) -> str:
    channel, rest = split_channel(spec.match)
    text = _AROUND_OPERATORS.sub(r"\1", " ".join(rest.split()))
    return f"{public_url(channel)}::{text}" if channel else text


def check_conda_environment(project: Project) -> tuple[Problem, ...]:
    """Returns the problems of a project's conda.yaml and of the files that it names; needs no network."""
    file = _project_file(project)
    if isinstance(file, tuple):
        return file
    pip = expand_requirements(file.pip, file.file, project, "uv")
    specs = tuple(CondaSpec(entry.text, split_channel(entry.text)[1], entry.line) for entry in file.dependencies)
    return (*_spec_problems(specs, file.file), *(pip if isinstance(pip, tuple) else ()))


def _spec_problems(specs: tuple[CondaSpec, ...], file: Path) -> tuple[Problem, ...]:
    """Returns the problems that the solver has with the syntax of requested packages."""
    from rattler import MatchSpec

    problems = []
    for spec in specs:
        try:
            MatchSpec(spec.match)
        except Exception as error:  # noqa: BLE001 - the library's errors have no common type
            message = f"{spec.text!r} is not a conda dependency: {' '.join(str(error).split())}"
            problems.append(Problem(redact(message), file=file, line=spec.line))
    return tuple(problems)


@dataclass(frozen=True)
class CondaManager(CachingManager[CondaSpecification]):
    """Builds conda environments, in this process and without conda."""

    name = "conda"

    def specify(self, project: Project, cache: Path) -> CondaSpecification:  # noqa: ARG002 - the base's signature
        """Implements ``CachingManager.specify``."""
        return read_specification(project, os.environ)

    def check(self, specification: CondaSpecification) -> None:
        """Implements ``CachingManager.check``; loads the solver."""
        if problems := _spec_problems(specification.specs, specification.file.file):
            raise problems_error(specification.project, problems, "conda")

    def activate(self, location: Path, report: Report, stop: StopSignal) -> Mapping[str, str]:
        """Implements ``CachingManager.activate``; runs the packages' activation scripts."""
        return conda_variables(os.environ, location, own_environment(), report, stop)

    def build(self, build: Build, specification: CondaSpecification) -> str:
        """Implements ``CachingManager.build``."""
        from prefect_mlprojects.environments.conda import solving  # only a build needs the solver

        self.check(specification)
        records = solving.install_conda_packages(build, specification)
        lock = build.location.with_name(f"{build.location.name}.lock.yml")
        with cache_errors(build.cache, "conda"):
            write_state(build.location, specification.file.variables)
            solving.write_lock(lock, specification, records)
        if specification.pip.key_inputs:
            before = solving.installed_by_pip(build.location)
            activated = self.activate(build.location, build.report, build.stop)
            install_with_uv(build, "pip_section", specification.pip, activated)
            with cache_errors(build.cache, "conda"):
                solving.write_pip_lock(build.location, solving.installed_by_pip(build.location) - before)
        build.report(f"The solution is in {lock}")
        return next((str(record.version) for record in records if record.name.normalized == "python"), "")
