"""Expands requirement lines: the files, options and local packages that they name, in one list for pip or for uv."""

from __future__ import annotations

import functools
import optparse
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias
from urllib.parse import unquote

from prefect_mlprojects._support.files import is_within
from prefect_mlprojects._support.redaction import holds_secret, redact
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.environments.python import files
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.project import Project

Installer: TypeAlias = Literal["pip", "uv"]


class _Option(NamedTuple):
    """How uv gets an option: from a line of the file, with one value a line, by a variable, or not; or it needs no option."""

    uv: Literal["line", "lines", "missing", "needless"] | tuple[str, str]
    spellings: tuple[str, ...] = ()
    flag: bool = False


# pip's options in a requirements file: https://pip.pypa.io/en/stable/reference/requirements-file-format/. uv reads few of
# them there, ignores some and refuses others.
_OPTIONS = {
    "-r": _Option("line", ("--requirement",)),
    "-c": _Option("line", ("--constraint",)),
    "-e": _Option("line", ("--editable",)),
    "-f": _Option("line", ("--find-links",)),
    "-i": _Option("line", ("--index-url", "--pypi-url")),
    "--extra-index-url": _Option("line"),
    "--no-index": _Option("line", flag=True),
    "--no-binary": _Option("lines"),
    "--only-binary": _Option("lines"),
    "--require-hashes": _Option(("UV_REQUIRE_HASHES", "1"), flag=True),
    "--pre": _Option(("UV_PRERELEASE", "allow"), flag=True),
    "--trusted-host": _Option(("UV_INSECURE_HOST", "")),
    "--use-feature": _Option("needless"),  # selects code of pip's own
    "--prefer-binary": _Option("missing", flag=True),
    "--all-releases": _Option("missing"),
    "--only-final": _Option("missing"),
}
_NOT_WITH_UV = "remove it, or use --env-manager virtualenv, which installs with pip"

_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_COMMENT = re.compile(r"(^|\s)#.*$")
_PER_REQUIREMENT_OPTIONS = re.compile(r"\s--?[a-zA-Z].*$")
_VERSION_CONTROL = re.compile(r"^(git|hg|svn|bzr)\+")
_FILE_URL = re.compile(r"file:", re.IGNORECASE)
_MAX_NESTING = 20  # of files in files
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
        document = files.read_toml(self.directory / "pyproject.toml")
        project = document.get("project") if isinstance(document, dict) else None
        name = project.get("name") if isinstance(project, dict) else None
        return name if isinstance(name, str) else None


@dataclass
class RequirementSet:
    """Requirement lines, which may hold passwords, with all that they refer to; named files are included in place."""

    lines: list[str] = field(default_factory=list, repr=False)  # for the installer, which runs in the project's folder
    constraints: list[str] = field(default_factory=list, repr=False)
    links: list[Path] = field(default_factory=list)  # the folders and files of ``--find-links``, absolute
    variables: dict[str, str] = field(default_factory=dict)  # the options that uv takes as variables only
    key_inputs: list[str] = field(default_factory=list, repr=False)  # normalised lines, digests of local packages
    text_inputs: list[str] = field(default_factory=list, repr=False)  # those of key_inputs that come from files' text
    count: int = 0  # of requirements, without constraints
    local_packages: list[LocalPackage] = field(default_factory=list)

    @property
    def credentials(self) -> tuple[str, ...]:
        """The lines, of the files as well, in which a URL holds a secret, with the values of environment variables."""
        return tuple(filter(holds_secret, map(expand_variables, self.text_inputs)))

    @property
    def private(self) -> bool:
        """Whether a URL in the lines or in the files holds a secret."""
        return bool(self.credentials)

    def file_text(self, links: Iterable[str], constraints: str) -> str:
        """Returns a requirements file with these `links`; `constraints` is the name of the file of the constraints."""
        lines = [*(f"-f {link}" for link in links), *self.lines, *([f"-c {constraints}"] if self.constraints else ())]
        return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True)
class _Line:
    """A line with its origin; its file names are relative to the first of `folders` where they exist."""

    text: str
    number: int | None
    file: Path | None
    folders: tuple[Path, ...]
    stack: tuple[Path, ...] = ()
    constraint: bool = False
    quotable: bool = True

    def problem(self, message: str, fix: str | None = None) -> Problem:
        """Returns a problem of this line, which is not quoted if its file is outside of the project."""
        if not self.quotable:
            message, fix = "this line can't be used; it is not shown, since its file is outside of the project", None
        return Problem(redact(message), file=self.file, line=self.number, fix=fix)

    def find(self, path: Path) -> Path:
        candidates = [Path(os.path.normpath(folder / path)) for folder in self.folders]
        return next((candidate for candidate in candidates if candidate.exists()), candidates[0])


@dataclass
class _Expansion:
    project: Project
    installer: Installer
    found: RequirementSet = field(default_factory=RequirementSet)
    problems: list[Problem] = field(default_factory=list)

    def add(self, line: _Line) -> None:
        """Adds a line with all that it names."""
        if not line.text.startswith("-"):
            self._add_requirement(line.text, line, editable=False)
            return
        try:
            options = _parse_options(line.text)
        except ValueError as error:
            if self.installer == "uv":
                self._refuse(line, str(error))
            self._add_text(line.text)
            self.found.lines.append(line.text)
            return
        for name, value in options:
            self._add_option(name, value, line)

    def _add_option(self, name: str, value: str, line: _Line) -> None:
        expanded = expand_variables(value)
        is_url = "://" in expanded and _FILE_URL.match(expanded) is None
        if name in ("-r", "-c") and not is_url:
            self._add_file(line.find(_file_path(expanded)), replace(line, constraint=line.constraint or name == "-c"))
        elif name == "-f" and not is_url:
            path = line.find(_file_path(expanded))
            if not self._allows(path, line):
                return
            self._add_text(f"-f {expanded}")
            self.found.key_inputs.append(files.digest_listing(path))
            # uv fails for a missing one, which pip ignores.
            self.found.links += [path] if self.installer == "pip" or path.exists() else []
        elif name == "-e":
            self._add_requirement(value, line, editable=True)
        else:
            self._add_text(f"{name} {value}".strip())
            self._emit_option(name, value, line)

    def _allows(self, path: Path, line: _Line) -> bool:
        """Whether the project may name a path; else adds a problem, before anything of it is read."""
        if self.project.allows(path):
            return True
        fix = "put it into the project: others are only for projects in a local folder that run on this machine"
        self.problems.append(line.problem(f"it names {path}, which is outside of the project's files", fix))
        return False

    def _emit_option(self, name: str, value: str, line: _Line) -> None:
        how, found = "line" if self.installer == "pip" else _OPTIONS[name].uv, self.found
        if isinstance(how, tuple):
            self._set(how[0], f"{found.variables.get(how[0], '')} {value}".strip() if value else how[1])
        elif how == "missing":
            self._refuse(line, f"uv has no option {name}")
        elif how != "needless":
            if self.installer == "uv" and name == "-i":
                # For pip, an index replaces those before it.
                found.lines[:] = [text for text in found.lines if not text.startswith(("-i ", "--extra-index-url "))]
            if self.installer == "uv" and name == "--extra-index-url":
                # pip takes the best version of all indexes, uv by default the first index that has the package.
                self._set("UV_INDEX_STRATEGY", "unsafe-best-match")
            found.lines += [f"{name} {each}".strip() for each in (value.split(",") if how == "lines" else [value])]

    def _set(self, variable: str, value: str) -> None:
        if self.found.variables.get(variable) != value:
            self.found.variables[variable] = value
            self.found.key_inputs.append(f"{variable}={value}")

    def _refuse(self, line: _Line, reason: str) -> None:
        self.problems.append(line.problem(f"{line.text!r} has no effect with uv: {reason}", _NOT_WITH_UV))

    def _add_text(self, text: str) -> None:
        self.found.key_inputs.append(text)
        self.found.text_inputs.append(text)

    def _add_file(self, path: Path, line: _Line) -> None:
        if not self._allows(path, line):
            return
        kind = "constraints" if line.constraint else "requirements"
        text = files.read_text(path)
        if path in line.stack:
            self.problems.append(line.problem(f"the {kind} file {path} includes itself"))
        elif len(line.stack) == _MAX_NESTING:
            self.problems.append(line.problem(f"the {kind} file {path} is nested too deeply"))
        elif isinstance(text, Problem):
            self.problems.append(line.problem(f"it names the {kind} file {path}, but {text.message}", text.fix))
        else:
            self._add_text(f"begin {kind}")
            for number, content in _logical_lines(enumerate(text.splitlines(), start=1)):
                stack = (*line.stack, path)
                quotable = is_within(path, self.project.root or self.project.directory)
                self.add(_Line(content, number, path, (path.parent,), stack, line.constraint, quotable))
            self._add_text(f"end {kind}")

    def _add_requirement(self, text: str, line: _Line, *, editable: bool) -> None:
        expanded, folder = expand_variables(text), self.project.directory
        found, path = self.found, _local_path(expanded, folder)
        named = path or _local_repository(expanded, folder)
        if named is not None and not self._allows(named, line):
            return
        found.count += editable or not line.constraint
        # A temporary working copy is gone after the run; uv makes only folders editable.
        live = editable and (self.installer == "pip" if _VERSION_CONTROL.match(text) else not self.project.temporary)
        (found.constraints if line.constraint else found.lines).append(f"-e {text}" if live else text)
        if self.installer == "uv":
            self._check_options(text, line)
        if path is None:
            normalised = text if editable else _normalised(text, line)
            if isinstance(normalised, Problem):
                self.problems.append(normalised)
            else:
                self._add_text(("-e " if editable else "") + normalised)
        elif path.is_file():
            self._add_text(text)
            found.key_inputs.append(files.digest_file(path))
        elif path.exists():
            found.local_packages.append(LocalPackage(path, live))
            # An editable package's code is read live from this very folder; only its declarations count.
            self._add_text(f"-e {path}" if live else text)
            found.key_inputs.append(files.digest_metadata(path) if live else files.digest_package(path))
        else:
            fix = "local packages are relative to the project's folder"
            self.problems.append(line.problem(f"it requires the local package {text!r}, but there is no {path}", fix))

    def _check_options(self, text: str, line: _Line) -> None:
        """Checks the options of one requirement: with any hash, pip requires hashes of all."""
        _, options = _split_options(text)
        for name in re.findall(r"\s(--?[\w-]+)", options):
            if name == "--hash":
                self._set("UV_REQUIRE_HASHES", "1")
            else:
                self._refuse(line, f"uv has no option {name} for a single requirement")


def expand_requirements(
    entries: Iterable[files.RequirementEntry], source: Path | None, project: Project, installer: Installer
) -> RequirementSet | tuple[Problem, ...]:
    """Reads the files and local packages that requirement lines name; an option without effect is a problem."""
    expansion = _Expansion(project, installer)
    # MLflow looks in the project's folder. Files named in a requirements file are relative to that file, and local
    # packages to the project's folder, as for pip and uv.
    folders = (project.directory,) if source is None else (project.directory, source.parent)
    for number, text in _logical_lines((entry.line, entry.text) for entry in entries):
        expansion.add(_Line(text, number, source, folders))
    return tuple(expansion.problems) or expansion.found


class _OptionParser(optparse.OptionParser):
    def error(self, msg: str) -> NoReturn:
        raise ValueError(msg)


@functools.cache
def _option_parser() -> optparse.OptionParser:
    parser = _OptionParser(add_help_option=False)
    for name, option in _OPTIONS.items():
        flag: dict[str, Any] = {"action": "append_const", "const": ""}
        parser.add_option(name, *option.spellings, dest=name, **(flag if option.flag else {"action": "append"}))
    return parser


def _parse_options(text: str) -> list[tuple[str, str]]:
    """Parses an option line as pip does; raises a ``ValueError``."""
    values = vars(_option_parser().parse_args(shlex.split(text))[0])
    return [(name, value) for name in _OPTIONS for value in values[name] or ()]


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

    bare, options = _split_options(text)
    try:
        requirement = Requirement(bare)
    except InvalidRequirement as error:
        fix = "write == for an exact version" if re.search(r"[\w\]]\s*=\s*[\w]", bare) else None
        return line.problem(f"{bare!r} is not a requirement: {str(error).splitlines()[0]}", fix)
    requirement.name = canonicalize_name(requirement.name)
    return f"{requirement} {options.strip()}".rstrip()


def _split_options(text: str) -> tuple[str, str]:
    """Splits off the options of one requirement, which start with white space."""
    start = match.start() if (match := _PER_REQUIREMENT_OPTIONS.search(text)) is not None else len(text)
    return text[:start].strip(), text[start:].rstrip()


def _local_path(text: str, project: Path) -> Path | None:
    """Returns the file or folder of a requirement; None for a name or a remote address."""
    bare = re.split(r"\s*;|\s+--", text, maxsplit=1)[0].strip()
    if " @ " in bare:
        bare = bare.split(" @ ", 1)[1].strip()
        if "://" not in bare and not _FILE_URL.match(bare):
            return (project / _EXTRAS.sub("", bare)).absolute()
    if _FILE_URL.match(bare):
        return (project / _file_path(bare.split("#", 1)[0])).absolute()
    if "://" in bare or _VERSION_CONTROL.match(bare):
        return None
    bare = _EXTRAS.sub("", bare)
    looks_local = os.sep in bare or bare.startswith(".") or bare.lower().endswith(_ARCHIVES)
    return Path(os.path.normpath(project / bare)) if looks_local else None


def _local_repository(text: str, project: Path) -> Path | None:
    """Returns the folder of a requirement such as ``git+file:///repository@v1``; None for others."""
    match = re.search(r"\b(?:git|hg|svn|bzr)\+(file:[^#;\s]*)", text, re.IGNORECASE)
    if match is None:
        return None
    path = _file_path(match[1])
    return (project / (path if path.exists() else str(path).rpartition("@")[0] or path)).absolute()


def _file_path(value: str) -> Path:
    return Path(unquote(split_url(value).path)) if _FILE_URL.match(value) else Path(value)


def expand_variables(text: str) -> str:
    """Replaces ``${NAME}`` by the environment variable's value, as pip does; unknown ones stay."""
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), text)
