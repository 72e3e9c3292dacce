"""Reads `conda.yaml` and conda's settings into the specification of an environment, with its cache key."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefect_mlprojects.environments.conda.configuration import (
    CondaConfiguration,
    channel_urls,
    check_allowed,
    environment_channels,
    expand_variables,
    public_url,
    read_configuration,
    split_channel,
)
from prefect_mlprojects.environments.python.files import (
    FileReader,
    RequirementEntry,
    conda_pip_entries,
    open_environment_file,
)
from prefect_mlprojects.environments.python.installers import deciding_settings
from prefect_mlprojects.environments.python.requirements import RequirementSet, digest_text, expand_requirements
from prefect_mlprojects.exceptions import EnvironmentBuildError, Problem
from prefect_mlprojects.spec.project import CondaEnvironment, Project

_KEYS = ("name", "channels", "dependencies", "variables", "prefix")


@dataclass(frozen=True)
class CondaFile:
    """What a ``conda.yaml`` asks for.

    Attributes:
        file: The file.
        name: The environment's name; None when it gives none.
        channels: Its channels, most wanted first.
        dependencies: Its conda packages.
        pip: Its pip section, in the format of a requirements file.
        variables: Environment variables to set in it.
        warnings: What is odd but allowed.
    """

    file: Path
    name: str | None = None
    channels: tuple[str, ...] = ()
    dependencies: tuple[RequirementEntry, ...] = ()
    pip: tuple[RequirementEntry, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_conda_file(path: Path) -> CondaFile | tuple[Problem, ...]:
    """Reads a ``conda.yaml``.

    Args:
        path: The file, absolute.

    Returns:
        What it asks for, or everything that is wrong with it.
    """
    reader = open_environment_file(path)
    if isinstance(reader, tuple):
        return reader
    content = reader.document.content
    warnings = tuple(
        f"{path.name}: the key {str(key)!r} is not conda's and is passed over" for key in content if key not in _KEYS
    )
    name = content.get("name")
    channels = tuple(_texts(reader, "channels", "'conda-forge' or a URL"))
    dependencies: list[RequirementEntry] = []
    pip: list[RequirementEntry] = []
    for position, item in reader.entries("dependencies").items():
        if isinstance(item, dict):
            pip.extend(conda_pip_entries(reader, position, item))
        elif isinstance(item, str) and item.strip():
            dependencies.append(RequirementEntry(item.strip(), reader.document.line("dependencies", position)))
        else:
            reader.problem(
                "a conda dependency must be a text such as 'numpy=1.26' or a pip section", "dependencies", position
            )
    variables = _variables(reader)
    if reader.problems:
        return tuple(reader.problems)
    return CondaFile(
        path,
        None if name is None else str(name),
        channels,
        tuple(dependencies),
        tuple(pip),
        variables,
        warnings,
    )


def _texts(reader: FileReader, key: str, example: str) -> list[str]:
    found = []
    for position, item in reader.entries(key).items():
        if isinstance(item, str) and item.strip():
            found.append(item.strip())
        else:
            reader.problem(f"an entry of {key} must be a text, such as {example}", key, position)
    return found


def _variables(reader: FileReader) -> dict[str, str]:
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


KEY_VERSION = "conda 1"
"""Part of every key; raised when environments are built otherwise than before."""

_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*")
_AROUND_OPERATORS = re.compile(r"\s*(==|>=|<=|!=|~=|[=<>,|])\s*")
_EXACT_PYTHON = re.compile(r"^python\s*={1,2}\s*(\d+\.\d+\.\d+)$")


@dataclass(frozen=True)
class CondaSpec:
    """One conda package that is asked for.

    Attributes:
        text: What the file says.
        match: The same in the solver's words: with the URL of the channel it names.
        line: Its line in the file, counted from 1.
    """

    text: str
    match: str
    line: int | None = None


@dataclass(frozen=True)
class CondaRecipe:
    """Everything that decides what a conda environment holds.

    Attributes:
        project: The project it is for.
        file: What its file says.
        specs: The conda packages.
        channels: URLs of channels, most wanted first; they may hold passwords.
        pip: The pip section.
        configuration: Conda's settings.
        key: The content hash that names it.
    """

    project: Project
    file: CondaFile
    specs: tuple[CondaSpec, ...]
    channels: tuple[str, ...]
    pip: RequirementSet
    configuration: CondaConfiguration
    key: str

    @property
    def description(self) -> str:
        """The environment in a few words."""
        packages = f"{len(self.specs)} conda package{'' if len(self.specs) == 1 else 's'}"
        pip = f", {self.pip.count} of pip" if self.pip.count else ""
        python = f"Python {self.python_version}, " if self.python_version else ""
        return f"conda, {python}{packages}{pip} ({self.file.file.name})"

    @property
    def python_version(self) -> str | None:
        """The Python version, when the file asks for an exact one."""
        for spec in self.specs:
            match = _EXACT_PYTHON.match(split_channel(spec.text)[1])
            if match is not None:
                return match[1]
        return None


def make_conda_recipe(project: Project, environ: Mapping[str, str]) -> CondaRecipe:
    """Finds out everything that decides what a project's conda environment holds; asks no network.

    Returns:
        The recipe.

    Raises:
        EnvironmentBuildError: The file, one that it names, or conda's settings are missing or malformed.
    """
    file = read_contents(project)
    if isinstance(file, tuple):
        raise EnvironmentBuildError(describe_problems(project, file), manager="conda")
    pip = expand_requirements(file.pip, file.file, project.directory)
    if isinstance(pip, tuple):
        raise EnvironmentBuildError(describe_problems(project, pip), manager="conda")
    configuration = read_configuration(environ)
    base = file.file.parent
    named = [expand_variables(channel, environ) for channel in file.channels]
    channels = list(environment_channels(named, configuration, base))
    specs = []
    for entry in _with_pip_part(file):
        name, rest = split_channel(entry.text)
        match = rest
        if name is not None:
            # Of several channels of one name, such as defaults, the first counts.
            url = next(iter(channel_urls(expand_variables(name, environ), configuration, base)))
            check_allowed(url, configuration, base)
            if url not in channels:
                channels.append(url)
            match = f"{url}::{rest}"
        specs.append(CondaSpec(entry.text, match, entry.line))
    key = _key(file, specs, channels, pip, configuration, environ, project)
    return CondaRecipe(project, file, tuple(specs), tuple(channels), pip, configuration, key)


def read_contents(project: Project) -> CondaFile | tuple[Problem, ...]:
    """Reads what a project's conda environment is to hold.

    Returns:
        What its file says, or everything that is wrong with it.
    """
    assert isinstance(project.environment, CondaEnvironment)
    file = read_conda_file(project.environment.file)
    if isinstance(file, tuple):
        return file
    problems = tuple(
        Problem(f"{entry.text!r} is not a conda dependency", file=file.file, line=entry.line, fix="write numpy=1.26")
        for entry in file.dependencies
        if not _looks_right(entry.text)
    )
    return problems or file


def check_conda_environment(project: Project) -> tuple[Problem, ...]:
    """Checks the files that describe a project's conda environment, without any network.

    Returns:
        Everything that is wrong with the files.
    """
    file = read_contents(project)
    if isinstance(file, tuple):
        return file
    pip = expand_requirements(file.pip, file.file, project.directory)
    specs = tuple(CondaSpec(entry.text, split_channel(entry.text)[1], entry.line) for entry in file.dependencies)
    return (*spec_problems(specs, file), *(pip if isinstance(pip, tuple) else ()))


def spec_problems(specs: tuple[CondaSpec, ...], file: CondaFile) -> tuple[Problem, ...]:
    """What the solver does not understand of the packages that are asked for."""
    from rattler import MatchSpec

    problems = []
    for spec in specs:
        try:
            MatchSpec(spec.match)
        except Exception as error:  # noqa: BLE001 - the library's errors have no common type
            reason = " ".join(str(error).split())
            problems.append(
                Problem(f"{spec.text!r} is not a conda dependency: {reason}", file=file.file, line=spec.line)
            )
    return tuple(problems)


def describe_problems(project: Project, problems: tuple[Problem, ...]) -> str:
    """The message of files that are wrong."""
    headline = f"The environment of project '{project.display_name}' can't be made"
    if len(problems) == 1:
        return f"{headline}: {problems[0]}"
    return "\n".join([f"{headline}:", *(f"  - {problem}" for problem in problems)])


def _looks_right(text: str) -> bool:
    rest = split_channel(text)[1]
    return _NAME.match(rest) is not None or "://" in rest or rest.startswith(("/", "."))


def _with_pip_part(file: CondaFile) -> tuple[RequirementEntry, ...]:
    """The dependencies, with Python for the pip section when the file forgets it; conda adds pip then."""
    names = {_package(entry.text) for entry in file.dependencies}
    if file.pip and not names & {"python", "pip"}:
        return (*file.dependencies, RequirementEntry("python"))
    return file.dependencies


def _package(spec: str) -> str:
    match = _NAME.match(split_channel(spec)[1])
    return match[0].lower() if match is not None else ""


def _normalised(spec: CondaSpec) -> str:
    channel, rest = split_channel(spec.match)
    text = _AROUND_OPERATORS.sub(r"\1", " ".join(rest.split()))
    return f"{public_url(channel)}::{text}" if channel else text


def _key(
    file: CondaFile,
    specs: list[CondaSpec],
    channels: list[str],
    pip: RequirementSet,
    configuration: CondaConfiguration,
    environ: Mapping[str, str],
    project: Project,
) -> str:
    facts = [
        *(KEY_VERSION, configuration.subdir, _libc(), "channels", *(public_url(url) for url in channels)),
        *("packages", *(_normalised(spec) for spec in specs)),
        *("variables", *(f"{name}={value}" for name, value in sorted(file.variables.items()))),
        *("pip", *pip.facts),
        *("settings", configuration.channel_priority, str(configuration.add_pip_as_python_dependency)),
        *(f"{name}={environ[name]}" for name in sorted(environ) if name.startswith("CONDA_OVERRIDE_")),
    ]
    if pip.facts:
        facts.extend(deciding_settings(environ, "uv", project.directory))
    return digest_text(facts)


def _libc() -> str:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").split(" ")[0] if sys.platform == "linux" else ""
    except (ValueError, OSError):
        return "other"
