"""Reads small files and documents whose authors may be hostile, in bounded time and memory."""

from __future__ import annotations

import errno
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
_MAX_DEPTH = 50
_MAX_VALUES = 50_000
# With each alias written out.
_MAX_EXPANDED_VALUES = 100_000
_MAX_EXPANDED_CHARACTERS = 4 << 20
# Python converts no longer ones to and from text, and takes quadratic time for them.
_MAX_NUMBER = 4300
# Up to this size PyYAML's own parser is fast enough. It accepts a little more than libyaml's.
_MAX_SLOW = 64 << 10
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER_TAGS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})

Visit = Callable[[yaml.Node], None]


def read_limited(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Reads a regular file; raises an ``OSError`` for any other, and for one of more than `limit` bytes."""
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 10} KiB", str(path))
    return data


def load_json(text: str) -> Any:
    """Parses JSON; its only error is ``json.JSONDecodeError``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", text, 0) from None
    except ValueError as error:  # a number of thousands of digits
        raise json.JSONDecodeError(str(error).partition(";")[0], text, 0) from None


def load_yaml(text: str, visit: Visit | None = None) -> list[Any]:
    """Parses YAML of plain values, and returns its documents; `visit` gets each one's nodes before its values are made.

    Raises:
        yaml.MarkedYAMLError: It is malformed, nested too deeply, or too large, with its aliases written out.
        yaml.reader.ReaderError: It has a control character.
    """
    if (match := yaml.reader.Reader.NON_PRINTABLE.search(text)) is not None:
        problem = "special characters are not allowed"
        raise yaml.reader.ReaderError("<text>", match.start(), ord(match[0]), "unicode", problem)
    try:
        return _load(text, _FastLoader, visit)
    except (yaml.scanner.ScannerError, yaml.parser.ParserError, yaml.composer.ComposerError):
        if len(text) > _MAX_SLOW:
            raise
        return _load(text, _SlowLoader, visit)


class TooLargeError(yaml.MarkedYAMLError):
    """A document is nested too deeply or too large."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(None, None, problem, mark)


class _Values:
    """Errors about values (``2020-13-45`` as a date, ``!!int x``) with a line; mixed into a loader."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if node.tag in _NUMBER_TAGS and len(str(node.value)) > _MAX_NUMBER:
                raise ValueError("too long")
            value = super().construct_object(node, deep=deep)  # type: ignore[misc]
            if isinstance(value, int):
                str(value)  # Raises for hexadecimal numbers of thousands of digits.
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            said = str(node.value)[:50] if isinstance(node, yaml.ScalarNode) else "this"
            raise yaml.constructor.ConstructorError(
                None, None, f"{said!r} can't be read as {node.tag.rpartition(':')[2]}", node.start_mark
            ) from error
        return value


class _SlowLoader(_Values, yaml.SafeLoader):
    pass


class _FastLoader(_Values, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


def _load(text: str, kind: type[Any], visit: Visit | None) -> list[Any]:
    _check_events(text, kind)
    loader, documents = kind(text), []
    try:
        while loader.check_node():
            node = loader.get_node()
            _Measure().add(node)
            if visit is not None:
                visit(node)
            documents.append(loader.construct_document(node))
    finally:
        loader.dispose()
    return documents


def _check_events(text: str, kind: type[Any]) -> None:
    """Checks depth and size before nodes are made, which takes a stack as deep as the document."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=kind), start=1):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise TooLargeError("it is nested too deeply", event.start_mark)
        if count > _MAX_VALUES:
            raise TooLargeError(f"it has more than {_MAX_VALUES} values", event.start_mark)


class _Measure:
    """Measures a document with each alias written out."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int, int] | None] = {}

    def add(self, node: yaml.Node) -> tuple[int, int, int]:
        """Returns a node's values, characters and depth."""
        if id(node) in self._known:
            found = self._known[id(node)]
            if found is None:
                raise TooLargeError("an alias contains itself", node.start_mark)
            return found
        if not isinstance(node, yaml.CollectionNode):
            size = (1, len(node.value), 1)
            if _SURROGATE.search(node.value):
                raise yaml.MarkedYAMLError(None, None, "a lone surrogate is no character", node.start_mark)
        else:
            self._known[id(node)] = None
            children = (
                [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
            )
            sizes = [self.add(each) for each in children]
            size = (
                1 + sum(each[0] for each in sizes),
                sum(each[1] for each in sizes),
                1 + max((each[2] for each in sizes), default=0),
            )
        if size[0] > _MAX_EXPANDED_VALUES or size[1] > _MAX_EXPANDED_CHARACTERS or size[2] > _MAX_DEPTH + 1:
            raise TooLargeError("it is too large with its aliases written out", node.start_mark)
        self._known[id(node)] = size
        return size


def decode(data: bytes) -> str:
    """Decodes UTF-8 without its byte order mark, and with one kind of line breaks."""
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
