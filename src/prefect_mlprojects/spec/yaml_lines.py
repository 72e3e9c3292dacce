"""YAML with line numbers and duplicate keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from prefect_mlprojects._support.documents import decode, load_yaml, read_limited
from prefect_mlprojects.exceptions import Problem

KeyPath: TypeAlias = tuple[str, ...]

_TEXT_TAG = "tag:yaml.org,2002:str"
_MERGE_TAG = "tag:yaml.org,2002:merge"
# Project files have five levels of keys. Without a limit, aliases could make them endless.
_MAX_DEPTH = 6


@dataclass(frozen=True)
class YamlDocument:
    """A parsed YAML file, whose keys are text as written, so that ``1.10:`` and ``no:`` keep their names.

    Attributes:
        content: Its value; None for an empty file or one that could not be parsed.
        lines: The line of each key and list entry, counted from 1, by its path of keys.
        problems: Why it could not be parsed.
        duplicates: Keys that are given twice; the last one counts.
    """

    file: Path
    content: Any
    lines: Mapping[KeyPath, int]
    problems: tuple[Problem, ...] = ()
    duplicates: tuple[Problem, ...] = ()

    def line(self, *path: str) -> int | None:
        """Returns the line of the key at ``path``, or of the nearest key above it."""
        above = (self.lines.get(path[:length]) for length in range(len(path), 0, -1))
        return next((line for line in above if line is not None), None)

    def problem(self, message: str, *path: str, fix: str | None = None, parameter: str | None = None) -> Problem:
        """Returns a problem about the key at ``path``."""
        return Problem(message, file=self.file, line=self.line(*path), fix=fix, parameter=parameter)


def read_yaml(file: Path) -> YamlDocument:
    """Reads a YAML file of plain values; all errors are in the document's ``problems``."""
    try:
        text = decode(read_limited(file))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return _unreadable(Problem("the file is not UTF-8 text", file, line, "save it as UTF-8"))
    except OSError as error:
        return _unreadable(Problem(f"the file can't be read: {error.strerror or error}", file=file))
    walk = _Walk(file)
    try:
        documents = load_yaml(text, walk.visit)
        if len(documents) > 1:
            return _unreadable(Problem("not valid YAML: the file has more than one document", file))
    except yaml.MarkedYAMLError as error:
        return _unreadable(_syntax_problem(file, text, error))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _unreadable(
            Problem(f"not valid YAML: the character {chr(error.character)!r} is not allowed", file, line)
        )
    content = documents[0] if documents else None
    return YamlDocument(file, content, walk.lines, duplicates=tuple(walk.duplicates))


def kind_of(value: Any) -> str:
    """Returns the kind of a YAML value with its article, for messages."""
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "nothing" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _unreadable(problem: Problem) -> YamlDocument:
    return YamlDocument(problem.file or Path(), None, {}, (problem,))


def _syntax_problem(file: Path, text: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else None
    row = text.splitlines()[line - 1 : line] if line is not None else []
    has_tab = bool(row) and "\t" in row[0][: len(row[0]) - len(row[0].lstrip())]
    fix = "indent with spaces: YAML allows no tabs there" if has_tab else None
    return Problem(f"not valid YAML: {error.problem or error.context or error}", file, line, fix)


class _Walk:
    """Walks over a document's nodes."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen: set[int] = set()
        self.lines: dict[KeyPath, int] = {}
        self.duplicates: list[Problem] = []

    def visit(self, node: yaml.Node) -> None:
        """Walks over a document, before its construction merges "<<" into the nodes."""
        self.keys(node)
        self.positions(node, ())

    def keys(self, node: yaml.Node) -> None:
        """Turns all keys into text and finds duplicates; visits each node once, however many aliases it has."""
        if id(node) in self._seen or not isinstance(node, yaml.CollectionNode):
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.keys(item)
            return
        first: dict[str, int] = {}
        for index, (key, value) in enumerate(node.value):
            self.keys(value)
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            name, line = key.value, key.start_mark.line + 1
            # A copy, since the key may be an alias of another type's value.
            node.value[index] = (yaml.ScalarNode(_TEXT_TAG, name, key.start_mark, key.end_mark, key.style), value)
            if name in first:
                message = f"the key {name!r} is given twice, first in line {first[name]}"
                self.duplicates.append(Problem(message, self._file, line, "remove one of them"))
            first.setdefault(name, line)

    def positions(self, node: yaml.Node, path: KeyPath, merges: int = 3) -> None:
        """Records the line of each key and entry."""
        if len(path) == _MAX_DEPTH:
            return
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines.setdefault((*path, str(index)), item.start_mark.line + 1)
                self.positions(item, (*path, str(index)))
        elif isinstance(node, yaml.MappingNode):
            merged: list[yaml.Node] = []
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.tag == _MERGE_TAG:
                    merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                    continue
                self.lines.setdefault((*path, key.value), key.start_mark.line + 1)
                self.positions(value, (*path, key.value))
            # The mapping's own keys take precedence; merges of merges could be endless.
            for value in merged if merges else ():
                self.positions(value, path, merges - 1)
