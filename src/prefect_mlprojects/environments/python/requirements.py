"""Digests of the files that decide what an environment holds."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prefect_mlprojects.environments.python.files import RequirementEntry, read_text
from prefect_mlprojects.exceptions import Problem

_LARGE_FILE = 16 * 1024 * 1024
"""Bytes from which on a file counts by its size and time of change instead of its content."""

_SOURCE_SUFFIXES = frozenset(
    (
        *(".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".cc", ".cpp", ".cxx", ".h", ".hh", ".hpp", ".cu", ".cuh"),
        *(".rs", ".f", ".f90", ".f95", ".toml", ".cfg", ".cmake", ".in", ".build"),
    )
)
_METADATA_FILES = frozenset(
    (
        *("pyproject.toml", "setup.py", "setup.cfg", "MANIFEST.in", "VERSION", "version.txt"),
        *("README.md", "README.rst", "CMakeLists.txt"),
    )
)
# Folders that hold no source: made by tools, or by the runs themselves. A run that writes into its project must not
# make the next run build the environment anew.
_SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules", "mlruns", "mlartifacts"))
_SKIPPED_AT_TOP = frozenset({"build", "dist"})


def digest_text(parts: Iterable[str]) -> str:
    """One digest of several texts; where one ends and the next begins counts.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:32]


def digest_file(path: Path) -> str:
    """A digest of a file's content, or of its size and time of change when it is large.

    Returns:
        The digest as text; "unreadable" when the file can't be read, which the installer will explain.
    """
    try:
        status = path.stat()
        if status.st_size > _LARGE_FILE:
            return f"{status.st_size}@{status.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def digest_listing(directory: Path) -> str:
    """A digest of the files in a folder of packages (``--find-links``): their names and contents.

    Args:
        directory: The folder; a file is taken for itself, and a missing one for an empty folder.

    Returns:
        The digest as text.
    """
    if directory.is_file():
        return digest_file(directory)
    try:
        files = sorted(entry.path for entry in os.scandir(directory) if entry.is_file())
    except OSError:
        files = []
    return digest_text(part for file in files for part in (Path(file).name, digest_file(Path(file))))


def digest_metadata(directory: Path) -> str:
    """A digest of what a package's folder declares: the files at its top that name it and its requirements.

    Returns:
        The digest as text.
    """
    return digest_text(
        part
        for file in sorted(_scan_files(directory))
        if file.name in _METADATA_FILES or (file.name.startswith("requirements") and file.suffix == ".txt")
        for part in (file.name, digest_file(file))
    )


def digest_package(directory: Path) -> str:
    """A digest of what is built from a package's folder.

    It takes in the files that declare the package, source files anywhere below the folder, and every file of a Python
    package (below an ``__init__.py``). Other files are left out: a run may write its results beside the code, and they
    must not count.

    Returns:
        The digest as text.
    """
    files = sorted(_package_files(directory))
    return digest_text(
        [
            digest_metadata(directory),
            *(part for file in files for part in (file.relative_to(directory).as_posix(), digest_file(file))),
        ]
    )


def _scan_files(directory: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(directory) if entry.is_file()]
    except OSError:
        return []


def _package_files(directory: Path) -> Iterator[Path]:
    packages: set[str] = set()
    for folder, names, files in os.walk(directory):
        if "pyvenv.cfg" in files:
            names.clear()
            continue
        names[:] = sorted(name for name in names if not _is_skipped(name, at_top=folder == str(directory)))
        in_package = "__init__.py" in files or Path(folder).parent.as_posix() in packages
        if in_package:
            packages.add(Path(folder).as_posix())
        for name in files:
            if (in_package or Path(name).suffix in _SOURCE_SUFFIXES) and not name.endswith((".pyc", ".pyo")):
                yield Path(folder, name)


def _is_skipped(name: str, *, at_top: bool) -> bool:
    if at_top and name in _SKIPPED_AT_TOP:
        return True
    return name in _SKIPPED_FOLDERS or name.startswith(".") or name.endswith(".egg-info")


_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_OPTION = re.compile(r"^(?P<name>-[a-zA-Z]|--[a-z][a-z-]*)(?:\s*=\s*|\s+|(?<=^-[rcef]))(?P<value>.+)$")
_FILE_OPTIONS = {"-r": "-r", "--requirement": "-r", "-c": "-c", "--constraint": "-c"}
_COMMENT = re.compile(r"(^|\s)#.*$")
_PER_REQUIREMENT_OPTIONS = re.compile(r"\s--(hash|config-settings?|global-option|no-binary|only-binary)\b.*$")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_PROJECT_TABLE = re.compile(r"^\[project\]\s*$(?P<body>.*?)(?=^\[|\Z)", re.MULTILINE | re.DOTALL)
_PROJECT_NAME = re.compile(r"""^name\s*=\s*["'](?P<name>[A-Za-z0-9._-]+)["']""", re.MULTILINE)
_EXTRAS = re.compile(r"\[[^\]]*\]$")


@dataclass(frozen=True)
class LocalPackage:
    """A package that is built from a folder.

    Attributes:
        directory: Its folder, absolute.
        editable: Whether the environment refers to the folder instead of holding a copy.
    """

    directory: Path
    editable: bool

    @property
    def name(self) -> str | None:
        """The name that its ``pyproject.toml`` declares; None when that can't be told without building it."""
        text = read_text(self.directory / "pyproject.toml")
        table = _PROJECT_TABLE.search(text) if isinstance(text, str) else None
        match = _PROJECT_NAME.search(table["body"]) if table is not None else None
        return match["name"] if match is not None else None


@dataclass(frozen=True)
class RequirementSet:
    """Requirement lines with all that they refer to.

    Attributes:
        lines: The lines to give to the installer in a requirements file of their own, in the project's folder.
        arguments: The files and folders of links that they name, as options of the installer with absolute paths.
        facts: What decides the result, for hashing: normalised lines, nested files in place, and digests of local
            packages.
        text_facts: The part of ``facts`` that comes from the text of files only.
        count: How many requirements there are, constraints not counted.
        local_packages: The packages among them that are built from folders.
        files: The requirements and constraints files that are named, nested ones included.
    """

    lines: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    text_facts: tuple[str, ...] = ()
    count: int = 0
    local_packages: tuple[LocalPackage, ...] = ()
    files: tuple[Path, ...] = ()


@dataclass
class _Expansion:
    project: Path
    facts: list[str] = field(default_factory=list)
    text_facts: list[str] = field(default_factory=list)
    count: int = 0
    local_packages: list[LocalPackage] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def text(self, fact: str) -> None:
        self.facts.append(fact)
        self.text_facts.append(fact)


def expand_requirements(
    entries: Iterable[RequirementEntry], source: Path | None, project: Path
) -> RequirementSet | tuple[Problem, ...]:
    """Reads the files that requirement lines name, and the state of the local packages among them.

    Files named by the entries themselves are looked for in the project's folder, where MLflow looks, and then beside
    ``source``; files named in a requirements file, beside that file; local packages, in the project's folder, as pip
    and uv do.

    Args:
        entries: The lines.
        source: The file that has them, for messages; None for no file.
        project: The project's folder, absolute.

    Returns:
        The requirements with all they refer to, or everything that is wrong with them.
    """
    expansion = _Expansion(project)
    lines: list[str] = []
    arguments: list[str] = []
    bases = [project] if source is None else [project, source.parent]
    for number, line in _logical_lines([(entry.line, entry.text) for entry in entries]):
        named = _follow(expansion, line, source, number, bases, stack=(), constraint=False)
        if named:
            arguments.extend(named)
        else:
            lines.append(line)
    if expansion.problems:
        return tuple(expansion.problems)
    return RequirementSet(
        tuple(lines),
        tuple(arguments),
        tuple(expansion.facts),
        tuple(expansion.text_facts),
        expansion.count,
        tuple(expansion.local_packages),
        tuple(expansion.files),
    )


def _logical_lines(lines: Iterable[tuple[int | None, str]]) -> Iterator[tuple[int | None, str]]:
    """Joins continued lines, and drops comments and empty lines, in pip's order."""
    start: int | None = None
    parts: list[str] = []
    for number, text in lines:
        if not parts:
            start = number
        if text.endswith("\\") and not _COMMENT.match(text):
            parts.append(text[:-1])
            continue
        parts.append(text)
        line = _COMMENT.sub("", "".join(parts)).strip()
        parts = []
        if line:
            yield start, line
    line = _COMMENT.sub("", "".join(parts)).strip()
    if line:
        yield start, line


def _follow(
    expansion: _Expansion,
    line: str,
    origin: Path | None,
    number: int | None,
    bases: list[Path],
    stack: tuple[Path, ...],
    *,
    constraint: bool,
) -> tuple[str, str] | None:
    """Takes in one line, and returns the option with the absolute path when it names a file or a folder of links."""
    option = _OPTION.match(line)
    if option is None:
        if not line.startswith("-"):
            expansion.count += not constraint
            _take_requirement(expansion, line, origin, number, editable=False)
        else:
            expansion.text(line)
        return None
    name, value = option["name"], _expand_variables(option["value"].strip().strip("\"'"))
    if name in _FILE_OPTIONS:
        flag = _FILE_OPTIONS[name]
        if "://" in value and not value.startswith("file:"):
            expansion.text(f"{flag} {value}")
            return None
        path = _first_existing(_file_path(value), bases)
        _take_file(expansion, path, origin, number, stack, constraint=constraint or flag == "-c")
        return flag, str(path)
    if name in ("-e", "--editable"):
        expansion.count += 1
        _take_requirement(expansion, value, origin, number, editable=True)
        return None
    if name in ("-f", "--find-links") and "://" not in value:
        path = _first_existing(Path(value), bases)
        expansion.text(f"-f {value}")
        expansion.facts.append(digest_listing(path))
        return "-f", str(path)
    expansion.text(line)
    return None


def _take_file(
    expansion: _Expansion,
    path: Path,
    origin: Path | None,
    number: int | None,
    stack: tuple[Path, ...],
    *,
    constraint: bool,
) -> None:
    kind = "constraints" if constraint else "requirements"
    if path in stack:
        expansion.problems.append(Problem(f"the {kind} file {path} includes itself", file=origin, line=number))
        return
    text = read_text(path)
    if isinstance(text, Problem):
        message = f"it names the {kind} file {path}, but {text.message}"
        expansion.problems.append(Problem(message, file=origin, line=number, fix=text.fix))
        return
    expansion.files.append(path)
    expansion.text(f"begin {kind}")
    for line_number, line in _logical_lines(enumerate(text.splitlines(), start=1)):
        _follow(expansion, line, path, line_number, [path.parent], (*stack, path), constraint=constraint)
    expansion.text(f"end {kind}")


def _take_requirement(
    expansion: _Expansion, text: str, origin: Path | None, number: int | None, *, editable: bool
) -> None:
    path = _local_path(_expand_variables(text), expansion.project)
    if path is None:
        fact = text if editable else _normalised(text)
        if isinstance(fact, Problem):
            expansion.problems.append(Problem(fact.message, file=origin, line=number, fix=fact.fix))
            return
        expansion.text(f"-e {fact}" if editable else fact)
        return
    if not path.exists():
        message = f"it requires the local package {text!r}, but there is no {path}"
        expansion.problems.append(
            Problem(message, file=origin, line=number, fix="local packages are relative to the project's folder")
        )
        return
    if path.is_file():
        expansion.text(text)
        expansion.facts.append(digest_file(path))
        return
    expansion.local_packages.append(LocalPackage(path, editable))
    if editable:
        # The environment points to this very folder; its code is read live, and only what it declares decides.
        expansion.text(f"-e {path}")
        expansion.facts.append(digest_metadata(path))
    else:
        expansion.text(text)
        expansion.facts.append(digest_package(path))


def _normalised(text: str) -> str | Problem:
    """A requirement in one spelling, so that white space and case don't make another environment."""
    if "@" in text or "://" in text or "${" in text:
        return text
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    options = _PER_REQUIREMENT_OPTIONS.search(text)
    bare = text[: options.start()] if options else text
    try:
        requirement = Requirement(bare.strip())
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        single = re.search(r"[\w\]]\s*=\s*[\w]", bare)
        return Problem(
            f"{bare.strip()!r} is not a requirement: {reason}", fix="write == for an exact version" if single else None
        )
    requirement.name = canonicalize_name(requirement.name)
    return str(requirement) + (" " + options.group().strip() if options else "")


def _local_path(text: str, project: Path) -> Path | None:
    """The file or folder that a requirement means, or None when it is a name or a remote address."""
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


def _first_existing(path: Path, bases: list[Path]) -> Path:
    candidates = [Path(os.path.normpath(base / path)) for base in bases]
    return next((candidate for candidate in candidates if candidate.exists()), candidates[0])


def _expand_variables(text: str) -> str:
    """Replaces ``${NAME}`` by the environment's value, as pip does; an unknown one stays."""
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), text)
