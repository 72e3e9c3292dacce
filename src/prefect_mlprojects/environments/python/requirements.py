"""Expands requirement lines: the files and local packages that they name, and the digests for a cache key."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prefect_mlprojects.environments.python.files import RequirementEntry, read_text, read_toml, redact_urls
from prefect_mlprojects.exceptions import Problem

_LARGE_FILE = 16 * 1024 * 1024
"""Bytes from which on size and modification time stand for a file's content."""

_SOURCE_SUFFIXES = frozenset(
    [
        ".py",
        ".pyi",
        ".pyx",
        ".pxd",
        ".pxi",
        ".c",
        ".cc",
        ".cpp",
        ".cxx",
        ".h",
        ".hh",
        ".hpp",
        ".cu",
        ".cuh",
        ".rs",
        ".f",
        ".f90",
        ".f95",
        ".toml",
        ".cfg",
        ".cmake",
        ".in",
        ".build",
    ]
)
_METADATA_FILES = frozenset(
    [
        "pyproject.toml",
        "setup.py",
        "setup.cfg",
        "MANIFEST.in",
        "VERSION",
        "version.txt",
        "README.md",
        "README.rst",
        "CMakeLists.txt",
    ]
)
# Folders without source: made by tools, or by the runs themselves. A run that writes into its project must not cause
# another build in the next run.
_SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules", "mlruns", "mlartifacts"))
_SKIPPED_AT_TOP = frozenset(("build", "dist"))


def digest_text(texts: Iterable[str]) -> str:
    """Returns one digest, 32 hexadecimal digits, of several texts; their boundaries count."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:32]


def digest_file(path: Path) -> str:
    """Returns a digest of a file; "unreadable" if it can't be read, which the installer will explain."""
    try:
        status = path.stat()
        if status.st_size > _LARGE_FILE:
            return f"{status.st_size}@{status.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def digest_listing(directory: Path) -> str:
    """Returns a digest of the names and contents of the files in a ``--find-links`` folder, which may be one file."""
    if directory.is_file():
        return digest_file(directory)
    return digest_text(text for file in _files_in(directory) for text in (file.name, digest_file(file)))


def digest_metadata(directory: Path) -> str:
    """Returns a digest of the files at the top of a package's folder that declare its name and requirements."""
    return digest_text(
        text
        for file in _files_in(directory)
        if file.name in _METADATA_FILES or (file.name.startswith("requirements") and file.suffix == ".txt")
        for text in (file.name, digest_file(file))
    )


def digest_package(directory: Path) -> str:
    """Returns a digest of what a package is built from.

    It includes the files that declare it, source files anywhere below the folder, and every file of a Python package
    (below an ``__init__.py``). Others are excluded: a run may write its results beside the code.
    """
    files = sorted(_package_files(directory))
    texts = (text for file in files for text in (file.relative_to(directory).as_posix(), digest_file(file)))
    return digest_text([digest_metadata(directory), *texts])


def _files_in(directory: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(directory) if entry.is_file())
    except OSError:
        return []


def _package_files(directory: Path) -> Iterator[Path]:
    packages: set[Path] = set()
    for folder, names, files in os.walk(directory):
        if "pyvenv.cfg" in files:
            names.clear()
            continue
        at_top = folder == str(directory)
        names[:] = sorted(name for name in names if not (_is_skipped(name) or (at_top and name in _SKIPPED_AT_TOP)))
        in_package = "__init__.py" in files or Path(folder).parent in packages
        if in_package:
            packages.add(Path(folder))
        for name in files:
            if (in_package or Path(name).suffix in _SOURCE_SUFFIXES) and not name.endswith((".pyc", ".pyo")):
                yield Path(folder, name)


def _is_skipped(name: str) -> bool:
    return name in _SKIPPED_FOLDERS or name.startswith(".") or name.endswith(".egg-info")


_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_OPTION = re.compile(r"^(?P<name>-[a-zA-Z]|--[a-z][a-z-]*)(?:\s*=\s*|\s+|(?<=^-[rcef]))(?P<value>.+)$")
_FILE_OPTIONS = {"-r": "-r", "--requirement": "-r", "-c": "-c", "--constraint": "-c"}
_COMMENT = re.compile(r"(^|\s)#.*$")
_PER_REQUIREMENT_OPTIONS = re.compile(r"\s--(hash|config-settings?|global-option|no-binary|only-binary)\b.*$")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_EXTRAS = re.compile(r"\[[^\]]*\]$")


@dataclass(frozen=True)
class LocalPackage:
    """A package that is built from a folder; an editable one is not copied into the environment."""

    directory: Path
    editable: bool

    @property
    def name(self) -> str | None:
        """The name in its ``pyproject.toml``; None if only a build can tell it."""
        document = read_toml(self.directory / "pyproject.toml")
        project = document.get("project") if isinstance(document, dict) else None
        name = project.get("name") if isinstance(project, dict) else None
        return name if isinstance(name, str) else None


@dataclass(frozen=True)
class RequirementSet:
    """Requirement lines with everything that they refer to.

    Attributes:
        lines: The lines for the installer, as a requirements file in the project's folder. They may hold passwords.
        arguments: The files and link folders that they name, as options of the installer with absolute paths.
        key_inputs: The texts of the cache key: normalised lines, nested files in place, digests of local packages.
        text_inputs: Those of ``key_inputs`` that come from the text of files.
        count: The number of requirements, without constraints.
        local_packages: The packages that are built from folders.
        files: The requirements and constraints files, nested ones included.
    """

    lines: tuple[str, ...] = field(default=(), repr=False)
    arguments: tuple[str, ...] = ()
    key_inputs: tuple[str, ...] = field(default=(), repr=False)
    text_inputs: tuple[str, ...] = field(default=(), repr=False)
    count: int = 0
    local_packages: tuple[LocalPackage, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def private(self) -> bool:
        """Whether a URL in the lines or in the files holds a secret."""
        return any(redact_urls(text) != text for text in map(_expand_variables, self.text_inputs))


@dataclass(frozen=True)
class _Line:
    """A line with its origin; its file names are relative to the first of `folders` where they exist."""

    text: str
    number: int | None
    file: Path | None
    folders: tuple[Path, ...]
    stack: tuple[Path, ...] = ()
    constraint: bool = False

    def problem(self, message: str, fix: str | None = None) -> Problem:
        return Problem(redact_urls(message), file=self.file, line=self.number, fix=fix)

    def find(self, path: Path) -> Path:
        candidates = [Path(os.path.normpath(folder / path)) for folder in self.folders]
        return next((candidate for candidate in candidates if candidate.exists()), candidates[0])


@dataclass
class _Expansion:
    project: Path
    key_inputs: list[str] = field(default_factory=list)
    text_inputs: list[str] = field(default_factory=list)
    count: int = 0
    local_packages: list[LocalPackage] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add_text(self, text: str) -> None:
        self.key_inputs.append(text)
        self.text_inputs.append(text)

    def add(self, line: _Line) -> tuple[str, str] | None:
        """Adds a line; returns the option with an absolute path if it names a file or a folder of links."""
        option = _OPTION.match(line.text)
        name = option["name"] if option is not None else ""
        value = _expand_variables(option["value"].strip().strip("\"'")) if option is not None else ""
        is_url = "://" in value
        if name in _FILE_OPTIONS:
            flag = _FILE_OPTIONS[name]
            if is_url and not value.startswith("file:"):
                self.add_text(f"{flag} {value}")
                return None
            path = line.find(_file_path(value))
            self._add_file(path, replace(line, constraint=line.constraint or flag == "-c"))
            return flag, str(path)
        if name in ("-f", "--find-links") and not is_url:
            path = line.find(Path(value))
            self.add_text(f"-f {value}")
            self.key_inputs.append(digest_listing(path))
            return "-f", str(path)
        if name in ("-e", "--editable"):
            self._add_requirement(value, line, editable=True)
        elif not line.text.startswith("-"):
            self._add_requirement(line.text, line, editable=False)
        else:
            self.add_text(line.text)
        return None

    def _add_file(self, path: Path, line: _Line) -> None:
        kind = "constraints" if line.constraint else "requirements"
        text = read_text(path)
        if path in line.stack:
            self.problems.append(line.problem(f"the {kind} file {path} includes itself"))
        elif isinstance(text, Problem):
            self.problems.append(line.problem(f"it names the {kind} file {path}, but {text.message}", text.fix))
        else:
            self.files.append(path)
            self.add_text(f"begin {kind}")
            for number, content in _logical_lines(enumerate(text.splitlines(), start=1)):
                self.add(_Line(content, number, path, (path.parent,), (*line.stack, path), line.constraint))
            self.add_text(f"end {kind}")

    def _add_requirement(self, text: str, line: _Line, *, editable: bool) -> None:
        self.count += editable or not line.constraint
        path = _local_path(_expand_variables(text), self.project)
        prefix = "-e " if editable else ""
        if path is None:
            normalised = text if editable else _normalised(text, line)
            if isinstance(normalised, Problem):
                self.problems.append(normalised)
            else:
                self.add_text(prefix + normalised)
        elif path.is_file():
            self.add_text(text)
            self.key_inputs.append(digest_file(path))
        elif path.exists():
            self.local_packages.append(LocalPackage(path, editable))
            # An editable package's code is read live from this very folder; only its declarations count.
            self.add_text(f"-e {path}" if editable else text)
            self.key_inputs.append(digest_metadata(path) if editable else digest_package(path))
        else:
            fix = "local packages are relative to the project's folder"
            self.problems.append(line.problem(f"it requires the local package {text!r}, but there is no {path}", fix))


def expand_requirements(
    entries: Iterable[RequirementEntry], source: Path | None, project: Path
) -> RequirementSet | tuple[Problem, ...]:
    """Reads the files that requirement lines of the file `source` name, and the state of their local packages.

    Files that the entries name are relative to the project's folder, where MLflow looks, or else to ``source``; files
    named in a requirements file, to that file; local packages, to the project's folder, as pip and uv do it.
    """
    expansion = _Expansion(project)
    lines: list[str] = []
    arguments: list[str] = []
    folders = (project,) if source is None else (project, source.parent)
    for number, text in _logical_lines((entry.line, entry.text) for entry in entries):
        named = expansion.add(_Line(text, number, source, folders))
        if named:
            arguments.extend(named)
        else:
            lines.append(text)
    if expansion.problems:
        return tuple(expansion.problems)
    return RequirementSet(
        tuple(lines),
        tuple(arguments),
        tuple(expansion.key_inputs),
        tuple(expansion.text_inputs),
        expansion.count,
        tuple(expansion.local_packages),
        tuple(expansion.files),
    )


def _logical_lines(lines: Iterable[tuple[int | None, str]]) -> Iterator[tuple[int | None, str]]:
    """Joins continued lines, and drops comments and empty lines, in pip's order."""
    start: int | None = None
    pieces: list[str] = []
    for number, text in (*lines, (None, "")):
        if not pieces:
            start = number
        if text.endswith("\\") and not _COMMENT.match(text):
            pieces.append(text[:-1])
            continue
        line = _COMMENT.sub("", "".join((*pieces, text))).strip()
        pieces = []
        if line:
            yield start, line


def _normalised(text: str, line: _Line) -> str | Problem:
    """Returns a requirement in one spelling, so that white space and case don't change the cache key."""
    if "@" in text or "://" in text or "${" in text:
        return text
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    options = _PER_REQUIREMENT_OPTIONS.search(text)
    bare = text[: options.start()] if options else text
    try:
        requirement = Requirement(bare.strip())
    except InvalidRequirement as error:
        fix = "write == for an exact version" if re.search(r"[\w\]]\s*=\s*[\w]", bare) else None
        return line.problem(f"{bare.strip()!r} is not a requirement: {str(error).splitlines()[0]}", fix)
    requirement.name = canonicalize_name(requirement.name)
    return str(requirement) + (" " + options.group().strip() if options else "")


def _local_path(text: str, project: Path) -> Path | None:
    """Returns the file or folder of a requirement; None for a name or a remote address."""
    bare = re.split(r"\s*;|\s+--", text, maxsplit=1)[0].strip()
    if " @ " in bare:
        bare = bare.split(" @ ", 1)[1].strip()
        if "://" not in bare and not bare.startswith("file:"):
            return (project / _EXTRAS.sub("", bare)).absolute()
    if bare.startswith("file:"):
        return (project / _file_path(bare.split("#", 1)[0])).absolute()
    if "://" in bare or re.match(r"^(git|hg|svn|bzr)\+", bare):
        return None
    bare = _EXTRAS.sub("", bare)
    looks_local = os.sep in bare or bare.startswith(".") or bare.lower().endswith(_ARCHIVES)
    return Path(os.path.normpath(project / bare)) if looks_local else None


def _file_path(value: str) -> Path:
    return Path(unquote(urlsplit(value).path)) if value.startswith("file:") else Path(value)


def _expand_variables(text: str) -> str:
    """Replaces ``${NAME}`` by the environment variable's value, as pip does; unknown ones stay."""
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), text)
