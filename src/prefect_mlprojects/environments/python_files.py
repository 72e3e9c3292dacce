"""Reads the files that say what a Python environment holds: python_env.yaml, conda.yaml's pip part, uv.lock.

The formats are MLflow's (``mlflow.utils.environment._PythonEnv``); every problem of a file is found at once, with its
line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_mlprojects.exceptions import Problem

if TYPE_CHECKING:
    import yaml

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
class _Reader:
    """Collects a file's problems while it is read."""

    file: Path
    problems: list[Problem] = field(default_factory=list)

    def problem(self, message: str, node: yaml.Node | None = None, *, fix: str | None = None) -> None:
        line = node.start_mark.line + 1 if node is not None else None
        self.problems.append(Problem(message, file=self.file, line=line, fix=fix))


def read_text(path: Path) -> str | Problem:
    """Reads a small text file.

    Args:
        path: The file.

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
    reader = _Reader(path)
    keys = _top_mapping(reader)
    for name, (key, _) in keys.items():
        if name not in PYTHON_ENV_KEYS:
            near = get_close_matches(name, PYTHON_ENV_KEYS, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(PYTHON_ENV_KEYS)}"
            reader.problem(f"unknown key {name!r}", key, fix=fix)
    python, python_line = _python_version(reader, keys["python"][1]) if "python" in keys else (None, None)
    lists = {
        name: tuple(_requirement_list(reader, name, keys[name][1])) if name in keys else ()
        for name in ("build_dependencies", "dependencies")
    }
    if reader.problems:
        return tuple(reader.problems)
    return PythonSpec(path, python, python_line, lists["build_dependencies"], lists["dependencies"])


def read_conda_env(path: Path, manager: str) -> PythonSpec | tuple[Problem, ...]:
    """Reads what a ``conda.yaml`` says of Python and pip, as MLflow does for ``virtualenv`` and ``uv``.

    Args:
        path: The file, absolute.
        manager: The environment manager's name, for the warnings.

    Returns:
        What it asks for with a warning that names the conda packages left out, or everything that is wrong with it.
    """
    import yaml

    reader = _Reader(path)
    keys = _top_mapping(reader)
    python: str | None = None
    python_line: int | None = None
    build: list[RequirementEntry] = []
    pip: list[RequirementEntry] = []
    left_out: list[str] = []
    for node in _sequence(reader, "dependencies", keys["dependencies"][1]) if "dependencies" in keys else ():
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            pip.extend(_conda_pip(reader, node))
        elif not isinstance(node, yaml.ScalarNode):
            reader.problem("a conda dependency must be a text or a pip section", node)
        elif (match := _CONDA_PYTHON.match(node.value.strip())) is not None:
            if python is None:
                python, python_line = _conda_python(reader, node, match["rest"].strip()), line
        elif (match := _CONDA_BUILD_PACKAGE.match(node.value.strip())) is not None:
            operator = "==" if match["operator"] == "=" else match["operator"] or ""
            build.append(RequirementEntry(f"{match['package']}{operator}{match['version'] or ''}", line))
        else:
            left_out.append(node.value.strip())
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


def _top_mapping(reader: _Reader) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    import yaml

    text = read_text(reader.file)
    if isinstance(text, Problem):
        reader.problems.append(text)
        return {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else None
        reader.problems.append(
            Problem(f"it is not valid YAML: {error.problem or error.context}", file=reader.file, line=line)
        )
        return {}
    except yaml.YAMLError as error:
        reader.problem(f"it is not valid YAML: {error}")
        return {}
    if root is None:
        reader.problem("the file is empty", fix="write at least 'dependencies: []'")
        return {}
    if not isinstance(root, yaml.MappingNode):
        reader.problem("it must be a mapping with keys such as 'dependencies:'", root)
        return {}
    keys: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in root.value:
        name = str(key.value)
        if name in keys:
            reader.problem(f"the key {name!r} is there twice (first in line {keys[name][0].start_mark.line + 1})", key)
        else:
            keys[name] = (key, value)
    return keys


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _python_version(reader: _Reader, node: yaml.Node) -> tuple[str | None, int | None]:
    if _is_null(node):
        return None, None
    text = str(node.value).strip()
    if node.tag in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int"):
        reader.problem(
            f"python must be a text, and {text} without quotes is a number", node, fix=f'write python: "{text}"'
        )
    elif node.tag != "tag:yaml.org,2002:str":
        reader.problem('python must be a version such as "3.11"', node)
    elif not is_python_request(text):
        reader.problem(f"python: {text!r} is not a version", node, fix='write a version such as "3.11" or "3.11.7"')
    return text, node.start_mark.line + 1


def is_python_request(text: str) -> bool:
    """Whether a text asks for a Python: a version, a prefix of one, or a PEP 440 range.

    Args:
        text: The text.
    """
    if re.fullmatch(r"\d+(\.\d+){0,2}", text):
        return True
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return len(SpecifierSet(text)) > 0
    except InvalidSpecifier:
        return False


def _sequence(reader: _Reader, name: str, node: yaml.Node) -> tuple[yaml.Node, ...]:
    import yaml

    if _is_null(node):
        return ()
    if isinstance(node, yaml.SequenceNode):
        return tuple(node.value)
    fix = f"put it behind a dash: '- {node.value}'" if isinstance(node, yaml.ScalarNode) else None
    reader.problem(f"{name} must be a list", node, fix=fix)
    return ()


def _requirement_list(reader: _Reader, name: str, node: yaml.Node) -> Iterator[RequirementEntry]:
    for item in _sequence(reader, name, node):
        if item.tag != "tag:yaml.org,2002:str":
            reader.problem(f"an entry of {name} must be a text, such as 'scikit-learn==1.5.2'", item)
            continue
        # An entry may hold several lines, which MLflow writes to a requirements file as they are.
        for offset, line in enumerate(item.value.splitlines()):
            yield RequirementEntry(line, item.start_mark.line + 1 + offset)


def _conda_pip(reader: _Reader, node: yaml.MappingNode) -> Iterator[RequirementEntry]:
    for key, value in node.value:
        if key.value == "pip":
            yield from _requirement_list(reader, "pip", value)
        else:
            reader.problem(f"{key.value!r} is not a pip section", key, fix="only 'pip:' may hold a list here")


def _conda_python(reader: _Reader, node: yaml.Node, rest: str) -> str | None:
    if not rest:
        reader.problem("python must be pinned", node, fix="write python=3.11, for example")
        return None
    match = _SINGLE_VERSION.match(rest)
    if match is not None:
        # MLflow takes the version itself, whichever of these four operators stands before it.
        if match["operator"] in (None, "=", "==", "<=", ">=", "~="):
            return match["version"]
        reader.problem(
            f"python: the comparison {match['operator']!r} does not say which version to use", node, fix="use = or =="
        )
        return None
    if is_python_request(rest.replace(" ", "")):
        return rest.replace(" ", "")
    reader.problem(f"python: {rest!r} is not a version", node, fix="write python=3.11, for example")
    return None
