"""Command templates: the shell context of their placeholders, and how a value is quoted there.

Templates are those of ``str.format``, as in MLflow: ``{name}`` is a placeholder, ``{{`` and ``}}`` are braces. A value is quoted
by ``shlex.quote``, which is enough between words. Where the project's author put a placeholder inside quotes, the value is
escaped for these quotes, so that the program gets the value itself. Where no quoting is safe (backquotes, here-documents,
comments, ``${...}``, after a backslash, a ``$`` or ``>&``), only values that need none are allowed, and only numbers where the
shell calculates (arithmetic, subscripts), since it evaluates what a name there stands for. Commands that evaluate their arguments
(``docs/compatibility.md`` lists them) are not recognised.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from types import MappingProxyType

from typing_extensions import assert_never

from prefect_mlprojects.spec.shell import Place, ShellScanner

_DOUBLE_QUOTE_SPECIALS = re.compile(r'([\\$`"])')
# What arithmetic takes for a number, or refuses; it never takes these for a name.
_NUMBER = re.compile(r"[+-]?[0-9][0-9A-Za-z_.]*")


@dataclass(frozen=True)
class Placeholder:
    """A placeholder of a template: the parameter's name and the shell context."""

    name: str
    place: Place


@dataclass(frozen=True)
class CommandTemplate:
    """A parsed template.

    Attributes:
        parts: Its text and placeholders, in order.
        faults: Errors of ``str.format``, and formats that would break the quoting of a value: message and fix.
        end: The shell context of appended text.
        line_ends: Whether it ends with a removable line break, as after YAML's ``|`` and ``>``.
    """

    parts: tuple[str | Placeholder, ...]
    faults: tuple[tuple[str, str], ...] = ()
    end: Place = "word"
    line_ends: bool = False

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        """Its placeholders, in order."""
        return tuple(part for part in self.parts if isinstance(part, Placeholder))

    def render(self, values: Mapping[str, str], variables: Mapping[str, str] = MappingProxyType({})) -> str:
        """Returns the text with the values, each of which must be quotable at its place; `variables` stand for others."""
        return "".join(part if isinstance(part, str) else self._value(part, values, variables) for part in self.parts)

    def _value(self, part: Placeholder, values: Mapping[str, str], variables: Mapping[str, str]) -> str:
        if part.name in variables:
            return expanded(variables[part.name], part.place)
        return _quoted(values[part.name], part.place)


@lru_cache(maxsize=256)
def parse_template(command: str) -> CommandTemplate:
    """Parses a template; its errors are in the result's ``faults``."""
    parts: list[str | Placeholder] = []
    faults: list[tuple[str, str]] = []
    scanner = ShellScanner()
    try:
        fields = list(Formatter().parse(command))
    except ValueError as error:
        return CommandTemplate((), ((f"has a stray brace: {error}", "write {{ or }} for a brace"),))
    for literal, name, spec, conversion in fields:
        if literal:
            scanner.feed(literal)
            parts.append(literal)
        if name is None:
            continue
        if spec or conversion:
            written = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            faults.append((f"formats the value of {written}, which would break its quoting", f"write {{{name}}}"))
        parts.append(Placeholder(name, scanner.place))
        scanner.feed_value()
    return CommandTemplate(tuple(parts), tuple(faults), scanner.place, _line_ends(command))


def _line_ends(command: str) -> bool:
    stripped = command.rstrip()
    if "\n" not in command[len(stripped) :]:
        return False
    scanner = ShellScanner()
    scanner.feed(stripped)
    return scanner.place == "word" and not scanner.escaped


def is_plain(value: str) -> bool:
    """Whether a value needs no quoting as a word."""
    return shlex.quote(value) == value


def fits(value: str, place: Place) -> bool:
    """Whether a value can be written at a place so that the shell takes it for text, or for a number."""
    match place:
        case "word" | "double-quotes" | "single-quotes":
            return True
        case "unquotable":
            return is_plain(value)
        case "number":
            return _NUMBER.fullmatch(value) is not None
        case _:
            assert_never(place)


def _quoted(value: str, place: Place) -> str:
    if not fits(value, place):
        raise ValueError("no quoting is safe in this place of the command")
    quoted = shlex.quote(value)
    if quoted == value:
        return value
    match place:
        case "word":
            return quoted
        case "double-quotes":
            return _DOUBLE_QUOTE_SPECIALS.sub(r"\\\1", value)
        case "single-quotes":
            return value.replace("'", "'\"'\"'")
        case "unquotable" | "number":
            return value
        case _:
            assert_never(place)


def expanded(variable: str, place: Place) -> str:
    """Returns the expansion of an environment variable, as the value itself, at a place of a command."""
    match place:
        case "word":
            return f'"${{{variable}}}"'
        case "double-quotes":
            return f"${{{variable}}}"
        case "single-quotes":
            return f"'\"${{{variable}}}\"'"
        case "unquotable" | "number":
            raise ValueError("no quoting is safe in this place of the command")
        case _:
            assert_never(place)
