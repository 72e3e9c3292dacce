"""YAML with line numbers: what a file says, where it says it, and what it says twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from prefect_mlprojects.exceptions import Problem

KeyPath: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class YamlDocument:
    """A parsed YAML file.

    Attributes:
        file: The file.
        content: What it says; None for an empty file or one that could not be parsed.
        lines: The line of each key, counted from 1, by the path of keys that leads to it.
        problems: Why it could not be parsed, and keys that stand twice.
    """

    file: Path
    content: Any
    lines: Mapping[KeyPath, int]
    problems: tuple[Problem, ...] = ()

    def line(self, *path: str) -> int | None:
        """Returns the line of the key at ``path``, or of the nearest key above it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None

    def problem(self, message: str, *path: str, fix: str | None = None, parameter: str | None = None) -> Problem:
        """Makes a problem about the key at ``path``."""
        return Problem(message, file=self.file, line=self.line(*path), fix=fix, parameter=parameter)


def read_yaml(file: Path) -> YamlDocument:
    """Reads a YAML file of plain values.

    Args:
        file: The file; UTF-8.

    Returns:
        The document; its ``problems`` say what is wrong with it. This never raises for what the file holds.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return YamlDocument(file, None, {}, (Problem("the file is not text in UTF-8", file=file),))
    except OSError as error:
        return YamlDocument(file, None, {}, (Problem(f"the file can't be read: {error.strerror or error}", file=file),))
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        content = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        return YamlDocument(file, None, {}, (_syntax_problem(file, text, error),))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return YamlDocument(file, None, {}, (Problem(f"not valid YAML: {error}", file=file),))
    finally:
        loader.dispose()
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    _walk(node, (), file, lines, problems)
    return YamlDocument(file, content, lines, tuple(problems))


def _syntax_problem(file: Path, text: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else None
    message = f"not valid YAML: {error.problem or error.context or error}"
    fix = None
    rows = text.splitlines()
    if (
        line is not None
        and line <= len(rows)
        and "\t" in rows[line - 1][: len(rows[line - 1]) - len(rows[line - 1].lstrip())]
    ):
        fix = "indent with spaces: YAML allows no tabs there"
    return Problem(message, file=file, line=line, fix=fix)


def _walk(
    node: yaml.Node | None, path: KeyPath, file: Path, lines: dict[KeyPath, int], problems: list[Problem]
) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            here = (*path, str(index))
            lines[here] = item.start_mark.line + 1
            _walk(item, here, file, lines, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen and name != "<<":
            problems.append(
                Problem(f"the key {name!r} stands twice, first in line {seen[name]}", file, line, "remove one of them")
            )
        seen.setdefault(name, line)
        lines.setdefault((*path, name), line)
        _walk(value, (*path, name), file, lines, problems)
