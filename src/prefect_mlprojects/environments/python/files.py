"""Parses the files that specify a Python environment: python_env.yaml, a conda.yaml's pip section, uv.lock.

The formats are MLflow's (``mlflow.utils.environment._PythonEnv``). All problems of a file are reported at once, with
their lines, and without the passwords that its URLs may hold.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefect_mlprojects._support.documents import read_limited
from prefect_mlprojects._support.files import list_directory
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.project import CondaEnvironment, NoEnvironment, Project, PythonEnvironment
from prefect_mlprojects.spec.yaml_lines import YamlDocument, read_yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHON_ENV_KEYS = ("python", "build_dependencies", "dependencies")

# What MLflow takes from a conda file besides its pip section; pip, setuptools and wheel are installed first.
_CONDA_BUILD_PACKAGE = re.compile(
    r"^(?P<package>pip|setuptools|wheel)\s*(?P<operator><=|>=|==|!=|=|<|>)?\s*(?P<version>[\d.]+)?$"
)
_CONDA_PYTHON = re.compile(r"^(?:[\w.-]+::)?python(?![\w.-])\s*(?P<rest>.*)$")
_SINGLE_VERSION = re.compile(r"^(?P<operator><=|>=|==|!=|=|<|>|~=)?\s*(?P<version>\d+(?:\.\d+)*)(?:\.?\*)?(?:=.*)?$")
_LOCAL_SOURCES = ("editable", "directory", "virtual", "path")


@dataclass(frozen=True)
class RequirementEntry:
    """One line in the format of a pip requirements file, and its line number in the file, counted from 1."""

    text: str
    line: int | None = None


@dataclass(frozen=True)
class PythonSpec:
    """The content of an environment file: the Python and the requirements, `build_dependencies` first."""

    source: Path | None = None
    python: str | None = None  # a version or a prefix of one ("3.10"), or a PEP 440 range; None is the running one
    python_range: str | None = None  # acceptable versions where `python` can't be had
    python_line: int | None = None
    build_dependencies: tuple[RequirementEntry, ...] = ()
    dependencies: tuple[RequirementEntry, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LockedPackage:
    """A package of a ``uv.lock`` whose source is a folder or file of the project; `path` is absolute."""

    name: str
    path: Path
    installed: bool  # False for a "virtual" project: its code does not get into the environment


@dataclass
class FileReader:
    """Collects the problems of an environment file while it is read."""

    document: YamlDocument
    problems: list[Problem] = field(default_factory=list)

    def problem(self, message: str, *path: str, fix: str | None = None) -> None:
        """Adds a problem about a key."""
        self.problems.append(_redacted(self.document.problem(message, *path, fix=fix)))

    def entries(self, *path: str) -> dict[str, Any]:
        """Returns the items of the list at `path` by their positions; empty without a list."""
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
        """Yields the requirements listed at `path`."""
        for position, item in self.entries(*path).items():
            if not isinstance(item, str):
                message = f"an entry of {path[-1]} must be a text, such as 'scikit-learn==1.5.2'"
                self.problem(message, *path, position)
                continue
            start = self.document.line(*path, position)
            # An entry may hold several lines, which MLflow writes to a requirements file as they are.
            for offset, line in enumerate(item.splitlines()):
                yield RequirementEntry(line, None if start is None else start + offset)

    def conda_dependencies(self) -> tuple[dict[str, RequirementEntry], tuple[RequirementEntry, ...]]:
        """Returns the conda packages of a conda.yaml by their positions, and its pip section."""
        packages: dict[str, RequirementEntry] = {}
        pip: list[RequirementEntry] = []
        for position, item in self.entries("dependencies").items():
            path = ("dependencies", position)
            if isinstance(item, str):
                packages[position] = RequirementEntry(item.strip(), self.document.line(*path))
            elif isinstance(item, dict):
                for key in item:
                    if key == "pip":
                        pip.extend(self.requirements(*path, "pip"))
                    else:
                        fix = "only 'pip:' may hold a list here"
                        self.problem(f"{str(key)!r} is not a pip section", *path, str(key), fix=fix)
            else:
                self.problem("a conda dependency must be a text such as 'numpy=1.26' or a pip section", *path)
        return packages, tuple(pip)


def _redacted(problem: Problem) -> Problem:
    return replace(problem, message=redact(problem.message), fix=problem.fix and redact(problem.fix))


# A uv.lock of some hundred packages has 1 MB, and takes 0.2 s to parse.
_MAX_TEXT = 4 << 20


def read_text(path: Path) -> str | Problem:
    """Reads a small text file without its byte order mark."""
    try:
        return read_limited(path, _MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem(f"it is not UTF-8 text (byte {error.start})", file=path, fix="save it as UTF-8")
    except OSError as error:
        known = {errno.ENOENT: "there is no such file", errno.EISDIR: "it is a folder, not a file"}
        return Problem(known.get(error.errno or 0, f"it can't be read: {error.strerror}"), file=path)


def read_toml(path: Path) -> dict[str, Any] | Problem:
    """Reads a TOML file; the result is shared with later calls and must not be changed."""
    text = read_text(path)
    if isinstance(text, Problem):
        return text
    try:
        return _parse_toml(text.replace("\r\n", "\n"))
    except RecursionError:
        return Problem("it is not valid TOML: it is nested too deeply", file=path)
    except ValueError as error:  # also for a number of thousands of digits
        return Problem(f"it is not valid TOML: {error}", file=path)


# A uv.lock of 1 MB takes 0.2 s to parse, and a build reads it four times.
@lru_cache(maxsize=16)
def _parse_toml(text: str) -> dict[str, Any]:
    return tomllib.loads(text)


def outside_problem(project: Project) -> Problem | None:
    """Returns the problem of an environment file that the project must not name."""
    environment = project.environment
    if not isinstance(environment, PythonEnvironment | CondaEnvironment) or project.allows(environment.file):
        return None
    return Problem("it is outside of the project's files", environment.file, fix="put it into the project")


def read_python_env(path: Path) -> PythonSpec | tuple[Problem, ...]:
    """Reads a ``python_env.yaml``."""
    reader = open_environment_file(path)
    if isinstance(reader, tuple):
        return reader
    for name in reader.document.content:
        if name not in PYTHON_ENV_KEYS:
            near = nearest(str(name), PYTHON_ENV_KEYS)
            fix = f"did you mean {near!r}?" if near else f"the keys are {', '.join(PYTHON_ENV_KEYS)}"
            reader.problem(f"unknown key {str(name)!r}", str(name), fix=fix)
    python, line = _python_version(reader), reader.document.line("python")
    build, run = (tuple(reader.requirements(key)) for key in ("build_dependencies", "dependencies"))
    return tuple(reader.problems) or PythonSpec(path, python, None, line, build, run)


def read_conda_env(path: Path, manager: str) -> PythonSpec | tuple[Problem, ...]:
    """Reads Python and the pip section of a ``conda.yaml``, as MLflow does; `manager` is named in a warning."""
    reader = open_environment_file(path)
    if isinstance(reader, tuple):
        return reader
    packages, pip = reader.conda_dependencies()
    python = python_range = python_line = None
    build: list[RequirementEntry] = []
    skipped: list[str] = []
    for position, entry in packages.items():
        if (match := _CONDA_PYTHON.match(entry.text)) is not None:
            if python is None:
                python, python_range = _conda_python(reader, position, match["rest"].strip())
                python_line = entry.line
        elif (match := _CONDA_BUILD_PACKAGE.match(entry.text)) is not None:
            operator = "==" if match["operator"] == "=" else match["operator"] or ""
            build.append(RequirementEntry(f"{match['package']}{operator}{match['version'] or ''}", entry.line))
        else:
            skipped.append(redact(entry.text))
    if reader.problems:
        return tuple(reader.problems)
    warnings = []
    if skipped:
        reason = f"these conda packages are left out, since {manager} installs only the pip section"
        warnings.append(f"{path.name}: {reason}: {', '.join(skipped)}")
    if python is None:
        warnings.append(f"{path.name} names no Python version; the one that runs mlprojects is used")
    return PythonSpec(path, python, python_range, python_line, tuple(build), pip, tuple(warnings))


def read_lock(path: Path, project: Project) -> tuple[str | None, tuple[LockedPackage, ...]] | Problem:
    """Reads a ``uv.lock`` (format version 1): its range of Python versions, and its packages with a local source."""
    for file in (path, path.with_name("pyproject.toml")):
        if not project.allows(file):
            return Problem("it is a link that leads out of the project's files", file=file)
    lock = read_toml(path)
    if isinstance(lock, Problem):
        return lock
    requires, listed = lock.get("requires-python"), lock.get("package", [])
    if not isinstance(lock.get("version"), int) or not isinstance(listed, list):
        return Problem("it is not a uv lock file: it has no version", file=path, fix="create it with 'uv lock'")
    packages = []
    for package in listed:
        if not isinstance(package, dict):
            return Problem("it is not a uv lock file: a package is no table", file=path, fix="create it with 'uv lock'")
        source = package.get("source")
        places = source if isinstance(source, dict) else {}
        kind = next((kind for kind in _LOCAL_SOURCES if kind in places), None)
        if kind is not None:
            folder = (path.parent / str(places[kind])).resolve()
            if not project.allows(folder):
                message = f"its package {package.get('name')!r} is in {folder}, outside of the project's files"
                return Problem(message, file=path, fix="put it into the project")
            packages.append(LockedPackage(str(package.get("name")), folder, installed=kind != "virtual"))
    return requires.replace(" ", "") if isinstance(requires, str) else None, tuple(packages)


def open_environment_file(path: Path) -> FileReader | tuple[Problem, ...]:
    """Opens an environment file, which must be a YAML mapping."""
    document = read_yaml(path)
    if problems := (*document.problems, *document.duplicates):
        return tuple(map(_redacted, problems))
    if document.content is None:
        return (Problem("the file is empty", file=path, fix="write at least 'dependencies: []'"),)
    if not isinstance(document.content, dict):
        return (Problem("it must be a mapping with keys such as 'dependencies:'", file=path, line=1),)
    return FileReader(document)


def _python_version(reader: FileReader) -> str | None:
    value = reader.document.content.get("python")
    if value is None or (isinstance(value, str) and is_python_request(value.strip())):
        return value and value.strip()
    if isinstance(value, (int, float, str)):
        # Without quotes 3.10 is the number 3.1.
        unquoted = "python is a number, since it has no quotes"
        message = f"python: {value!r} is not a version" if isinstance(value, str) else unquoted
        reader.problem(message, "python", fix='write python: "3.11", for example')
    else:
        reader.problem('python must be a version such as "3.11"', "python")
    return None


def is_python_request(text: str) -> bool:
    """Returns whether a text requests a Python: a version, a prefix of one, or a PEP 440 range."""
    if re.fullmatch(r"\d+(\.\d+){0,2}", text):
        return True
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return len(SpecifierSet(text)) > 0
    except InvalidSpecifier:
        return False


def _conda_python(reader: FileReader, position: str, rest: str) -> tuple[str | None, str | None]:
    """Returns the Python of a conda dependency and, for a one-sided range, that range: MLflow takes its limit."""
    match, text = _SINGLE_VERSION.match(rest), rest.replace(" ", "")
    if match is not None and match["operator"] not in ("!=", "<", ">"):
        return match["version"], text if match["operator"] in ("<=", ">=", "~=") else None
    if is_python_request(text):
        return text, None
    message = f"python: {rest!r} is not a version" if rest else "python must be pinned"
    reader.problem(message, "dependencies", position, fix="write python=3.11, for example")
    return None, None


def uv_lock_of(project: Project) -> Path | None:
    """Returns the ``uv.lock`` beside a ``pyproject.toml`` that ``python_env`` names, or of a project without an environment."""
    lock, package, environment = (
        project.directory / "uv.lock",
        project.directory / "pyproject.toml",
        project.environment,
    )
    named = isinstance(environment, PythonEnvironment) and environment.file == package
    has_lock = (named or isinstance(environment, NoEnvironment)) and lock.is_file() and package.is_file()
    return lock if has_lock else None


_LARGE_FILE = 16 * 1024 * 1024  # bytes from which on size and modification time stand for a file's content

_SOURCE_FILE = re.compile(r".*\.(pyi?|pyx|pxd|pxi|c|cc|cpp|cxx|h|hh|hpp|cuh?|rs|f|f90|f95|toml|cfg|cmake|in|build)")
_METADATA_FILE = re.compile(
    r"pyproject\.toml|setup\.(py|cfg)|MANIFEST\.in|VERSION|version\.txt|README\.(md|rst)|CMakeLists\.txt"
    r"|requirements.*\.txt"
)
# Folders without source: made by tools, or by the runs themselves. A run that writes into its project must not cause
# another build in the next run.
_SKIPPED = re.compile(r"__pycache__|node_modules|mlruns|mlartifacts|\..*|.*\.egg-info")


def digest_text(texts: Iterable[str]) -> str:
    """Returns one digest, 32 hexadecimal digits, of several texts; their boundaries count."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:32]


def digest_credentials(texts: Iterable[str]) -> tuple[str, ...]:
    """Returns a digest of URLs and other texts that hold credentials as a text for a cache key; none without any.

    Whoever has other credentials, or none, must not get what was built with these. The digest takes long to compute, since keys
    are shown and a password may be short.
    """
    data = "\0".join(texts).encode("utf-8", "surrogateescape")
    return (f"credentials {hashlib.scrypt(data, salt=b'mlprojects', n=2**14, r=8, p=1).hex()}",) if data else ()


def digest_file(path: Path) -> str:
    """Returns a digest of a file; "unreadable" if it can't be read, which the installer will explain."""
    try:
        found = path.stat()
        size, modified = found.st_size, found.st_mtime_ns
        if not stat.S_ISREG(found.st_mode):
            return "unreadable"  # A device has no end.
        return f"{size}@{modified}" if size > _LARGE_FILE else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def digest_listing(directory: Path) -> str:
    """Returns a digest of the names and contents of the files in a ``--find-links`` folder, which may be one file."""
    return digest_file(directory) if directory.is_file() else _digest_files(directory, _files_in(directory))


def digest_metadata(directory: Path) -> str:
    """Returns a digest of the files at the top of a package's folder that declare its name and requirements."""
    return _digest_files(directory, (file for file in _files_in(directory) if _METADATA_FILE.fullmatch(file.name)))


def digest_package(directory: Path) -> str:
    """Returns a digest of the files that declare a package, its sources, and all files below an ``__init__.py``."""
    # Others are excluded: a run may write its results beside the code.
    return _digest_files(directory, sorted(_package_files(directory)), digest_metadata(directory))


def _digest_files(directory: Path, files: Iterable[Path], *texts: str) -> str:
    names = (text for file in files for text in (file.relative_to(directory).as_posix(), digest_file(file)))
    return digest_text([*texts, *names])


def _files_in(directory: Path) -> list[Path]:
    return [Path(entry.path) for entry in list_directory(directory) if entry.is_file()]


def _package_files(directory: Path) -> Iterator[Path]:
    packages: set[Path] = set()
    for folder, names, files in os.walk(directory):
        if "pyvenv.cfg" in files:
            names.clear()
            continue
        skipped = ("build", "dist") if folder == str(directory) else ()
        names[:] = sorted(name for name in names if not _SKIPPED.fullmatch(name) and name not in skipped)
        in_package = "__init__.py" in files or Path(folder).parent in packages
        if in_package:
            packages.add(Path(folder))
        for name in files:
            if (in_package or _SOURCE_FILE.fullmatch(name)) and not name.endswith((".pyc", ".pyo")):
                yield Path(folder, name)
