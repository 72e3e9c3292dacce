"""Reads the files that say what a Python environment holds: python_env.yaml, conda.yaml's pip part, uv.lock.

The formats are MLflow's (``mlflow.utils.environment._PythonEnv``); every problem of a file is found at once, with its
line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.project import NoEnvironment, Project
from prefect_mlprojects.spec.yaml_lines import YamlDocument, read_yaml

PYTHON_ENV_KEYS = ("python", "build_dependencies", "dependencies")

# What MLflow takes from a conda file besides its pip section; pip, setuptools and wheel are installed first.
_CONDA_BUILD_PACKAGE = re.compile(
    r"^(?P<package>pip|setuptools|wheel)\s*(?P<operator><=|>=|==|!=|=|<|>)?\s*(?P<version>[\d.]+)?$"
)
_CONDA_PYTHON = re.compile(r"^(?:[\w.-]+::)?python(?![\w.-])\s*(?P<rest>.*)$")
_SINGLE_VERSION = re.compile(r"^(?P<operator><=|>=|==|!=|=|<|>|~=)?\s*(?P<version>\d+(?:\.\d+)*)(?:\.?\*)?(?:=.*)?$")
_LOCK_REQUIRES_PYTHON = re.compile(r'^requires-python = "(?P<versions>[^"]+)"$', re.MULTILINE)
_LOCK_PACKAGE = re.compile(
    r'^name = "(?P<name>[^"]+)"\n(?:version = "[^"]*"\n)?'
    r'source = \{ (?P<kind>editable|directory|virtual|path) = "(?P<path>[^"]+)" \}',
    re.MULTILINE,
)


@dataclass(frozen=True)
class RequirementEntry:
    """One requirement as a file has it.

    Attributes:
        text: The line, in the format of a pip requirements file.
        line: Its line in the file, counted from 1.
    """

    text: str
    line: int | None = None


@dataclass(frozen=True)
class PythonSpec:
    """What a Python environment is to hold.

    Attributes:
        source: The file that says so; None for a project without one.
        python: The wanted Python: a version or a prefix of one ("3.10"), or a PEP 440 range; None for the running one.
        python_line: The line of ``source`` that says so, counted from 1.
        build_dependencies: What is installed first.
        dependencies: What is installed then.
        warnings: What people should know, such as conda packages that are left out.
    """

    source: Path | None = None
    python: str | None = None
    python_line: int | None = None
    build_dependencies: tuple[RequirementEntry, ...] = ()
    dependencies: tuple[RequirementEntry, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LockedPackage:
    """A package of a ``uv.lock`` whose source is a folder or file of the project.

    Attributes:
        name: The package's name.
        path: Its folder or file, absolute.
        installed: Whether its code gets into the environment (a "virtual" project's does not).
    """

    name: str
    path: Path
    installed: bool


@dataclass
class FileReader:
    """Collects an environment file's problems while it is read.

    Attributes:
        document: The file.
        problems: What is wrong with it.
    """

    document: YamlDocument
    problems: list[Problem] = field(default_factory=list)

    def problem(self, message: str, *path: str, fix: str | None = None) -> None:
        """Notes what is wrong at a key."""
        self.problems.append(self.document.problem(message, *path, fix=fix))

    def entries(self, *path: str) -> dict[str, Any]:
        """The items of the list at ``path`` by their positions; empty where there is none."""
        value = self.document.content
        for key in path:
            value = value[int(key)] if isinstance(value, list) else value.get(key)
        if value is None:
            return {}
        if isinstance(value, list):
            return {str(index): item for index, item in enumerate(value)}
        fix = f"put it behind a dash: '- {value}'" if isinstance(value, str) else None
        self.problem(f"{path[-1]} must be a list", *path, fix=fix)
        return {}

    def requirements(self, *path: str) -> Iterator[RequirementEntry]:
        """The list of requirements at ``path``."""
        for position, item in self.entries(*path).items():
            if not isinstance(item, str):
                message = f"an entry of {path[-1]} must be a text, such as 'scikit-learn==1.5.2'"
                self.problem(message, *path, position)
                continue
            start = self.document.line(*path, position)
            # An entry may hold several lines, which MLflow writes to a requirements file as they are.
            for offset, line in enumerate(item.splitlines()):
                yield RequirementEntry(line, None if start is None else start + offset)


def read_text(path: Path) -> str | Problem:
    """Reads a small text file.

    Returns:
        Its text without a byte order mark, or what is wrong with it.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem(f"it is not UTF-8 text (byte {error.start})", file=path, fix="save it as UTF-8")
    except FileNotFoundError:
        return Problem("there is no such file", file=path)
    except IsADirectoryError:
        return Problem("it is a folder, not a file", file=path)
    except OSError as error:
        return Problem(f"it can't be read: {error.strerror}", file=path)


def read_python_env(path: Path) -> PythonSpec | tuple[Problem, ...]:
    """Reads a ``python_env.yaml``.

    Args:
        path: The file, absolute.

    Returns:
        What it asks for, or everything that is wrong with it.
    """
    reader = open_environment_file(path)
    if isinstance(reader, tuple):
        return reader
    for name in reader.document.content:
        if name not in PYTHON_ENV_KEYS:
            near = nearest(str(name), PYTHON_ENV_KEYS)
            fix = f"did you mean {near!r}?" if near else f"the keys are {', '.join(PYTHON_ENV_KEYS)}"
            reader.problem(f"unknown key {str(name)!r}", str(name), fix=fix)
    python = _python_version(reader)
    build = tuple(reader.requirements("build_dependencies"))
    run = tuple(reader.requirements("dependencies"))
    if reader.problems:
        return tuple(reader.problems)
    return PythonSpec(path, python, reader.document.line("python"), build, run)


def read_conda_env(path: Path, manager: str) -> PythonSpec | tuple[Problem, ...]:
    """Reads what a ``conda.yaml`` says of Python and pip, as MLflow does for ``virtualenv`` and ``uv``.

    Args:
        path: The file, absolute.
        manager: The environment manager's name, for the warnings.

    Returns:
        What it asks for with a warning that names the conda packages left out, or everything that is wrong with it.
    """
    reader = open_environment_file(path)
    if isinstance(reader, tuple):
        return reader
    python: str | None = None
    python_line: int | None = None
    build: list[RequirementEntry] = []
    pip: list[RequirementEntry] = []
    left_out: list[str] = []
    for position, item in reader.entries("dependencies").items():
        line = reader.document.line("dependencies", position)
        if isinstance(item, dict):
            pip.extend(conda_pip_entries(reader, position, item))
        elif not isinstance(item, str):
            reader.problem("a conda dependency must be a text or a pip section", "dependencies", position)
        elif (match := _CONDA_PYTHON.match(item.strip())) is not None:
            if python is None:
                python, python_line = _conda_python(reader, position, match["rest"].strip()), line
        elif (match := _CONDA_BUILD_PACKAGE.match(item.strip())) is not None:
            operator = "==" if match["operator"] == "=" else match["operator"] or ""
            build.append(RequirementEntry(f"{match['package']}{operator}{match['version'] or ''}", line))
        else:
            left_out.append(item.strip())
    if reader.problems:
        return tuple(reader.problems)
    warnings = []
    if left_out:
        warnings.append(
            f"{path.name}: these conda packages are left out, since {manager} installs only the pip section: "
            + ", ".join(left_out)
        )
    if python is None:
        warnings.append(f"{path.name} names no Python version; the one that runs mlprojects is used")
    return PythonSpec(path, python, python_line, tuple(build), tuple(pip), tuple(warnings))


def read_lock(path: Path) -> tuple[str | None, tuple[LockedPackage, ...]] | Problem:
    """Reads from a ``uv.lock`` (uv's format, version 1) what decides its environment besides its text.

    Args:
        path: The lock file, absolute.

    Returns:
        The range of Python versions it was made for, and the packages whose code lies in the project; or what is wrong.
    """
    text = read_text(path)
    if isinstance(text, Problem):
        return text
    if re.search(r"^version = \d+$", text, re.MULTILINE) is None:
        return Problem("it is not a uv lock file: it has no version", file=path, fix="make it anew with 'uv lock'")
    requires = _LOCK_REQUIRES_PYTHON.search(text)
    packages = tuple(
        LockedPackage(match["name"], (path.parent / match["path"]).resolve(), installed=match["kind"] != "virtual")
        for match in _LOCK_PACKAGE.finditer(text)
    )
    return (requires["versions"].replace(" ", "") if requires else None), packages


def open_environment_file(path: Path) -> FileReader | tuple[Problem, ...]:
    """Opens an environment file, which must be a YAML mapping.

    Args:
        path: The file, absolute.

    Returns:
        Its reader, or what is wrong with it.
    """
    document = read_yaml(path)
    if document.problems:
        return document.problems
    if document.content is None:
        return (Problem("the file is empty", file=path, fix="write at least 'dependencies: []'"),)
    if not isinstance(document.content, dict):
        return (Problem("it must be a mapping with keys such as 'dependencies:'", file=path, line=1),)
    return FileReader(document)


def _python_version(reader: FileReader) -> str | None:
    value = reader.document.content.get("python")
    if value is None:
        return None
    if isinstance(value, (int, float)):
        # Without quotes 3.10 is the number 3.1.
        reader.problem("python is a number, since it has no quotes", "python", fix='write python: "3.11", for example')
    elif not isinstance(value, str):
        reader.problem('python must be a version such as "3.11"', "python")
    elif not is_python_request(value.strip()):
        reader.problem(
            f"python: {value!r} is not a version", "python", fix='write a version such as "3.11" or "3.11.7"'
        )
    else:
        return value.strip()
    return None


def is_python_request(text: str) -> bool:
    """Whether a text asks for a Python: a version, a prefix of one, or a PEP 440 range."""
    if re.fullmatch(r"\d+(\.\d+){0,2}", text):
        return True
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return len(SpecifierSet(text)) > 0
    except InvalidSpecifier:
        return False


def conda_pip_entries(reader: FileReader, position: str, section: dict[Any, Any]) -> Iterator[RequirementEntry]:
    """The requirements of a conda file's pip section."""
    for key in section:
        if key == "pip":
            yield from reader.requirements("dependencies", position, "pip")
        else:
            fix = "only 'pip:' may hold a list here"
            reader.problem(f"{str(key)!r} is not a pip section", "dependencies", position, str(key), fix=fix)


def _conda_python(reader: FileReader, position: str, rest: str) -> str | None:
    where, fix = ("dependencies", position), "write python=3.11, for example"
    if not rest:
        reader.problem("python must be pinned", *where, fix=fix)
        return None
    match = _SINGLE_VERSION.match(rest)
    if match is not None:
        # MLflow takes the version itself, whichever of these operators stands before it.
        if match["operator"] in (None, "=", "==", "<=", ">=", "~="):
            return match["version"]
        message = f"python: the comparison {match['operator']!r} does not say which version to use"
        reader.problem(message, *where, fix="use = or ==")
        return None
    if is_python_request(rest.replace(" ", "")):
        return rest.replace(" ", "")
    reader.problem(f"python: {rest!r} is not a version", *where, fix=fix)
    return None


def uv_lock_of(project: Project) -> Path | None:
    """The ``uv.lock`` that decides the project's environment.

    It does when the project has it beside a ``pyproject.toml``, and no environment file.

    Returns:
        The lock file's path, or None.
    """
    if not isinstance(project.environment, NoEnvironment):
        return None
    lock = project.directory / "uv.lock"
    return lock if lock.is_file() and (project.directory / "pyproject.toml").is_file() else None
