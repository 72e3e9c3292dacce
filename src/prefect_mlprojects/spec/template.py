"""Command templates: the shell context of their placeholders, and how a value is quoted there.

Templates are those of ``str.format``, as in MLflow: ``{name}`` is a placeholder, ``{{`` and ``}}`` are braces. A value is quoted
by ``shlex.quote``, which is enough between words. Where the project's author put a placeholder inside quotes, the value is
escaped for these quotes, so that the program gets the value itself. Where no quoting is safe (backquotes, here-documents,
comments, arithmetic, subscripts, ``${...}``, after a backslash or a ``$``), only values that need none are allowed. Commands that
evaluate their arguments (``eval``, ``let``, ``bash -c``, ``[[ x -eq y ]]``) are not recognised.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from types import MappingProxyType
from typing import Literal, TypeAlias

from typing_extensions import assert_never

Place: TypeAlias = Literal["word", "double-quotes", "single-quotes", "unquotable"]

_DOUBLE_QUOTE_SPECIALS = re.compile(r'([\\$`"])')
_CASE = re.compile(r"(?:^|[\s;&|(])case\s$")


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
    scanner = _ShellScanner()
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
    scanner = _ShellScanner()
    scanner.feed(stripped)
    return scanner.place == "word" and not scanner.escaped


def is_plain(value: str) -> bool:
    """Whether a value needs no quoting anywhere."""
    return shlex.quote(value) == value


def _quoted(value: str, place: Place) -> str:
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
        case "unquotable":
            raise ValueError("no quoting is safe in this place of the command")
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
        case "unquotable":
            raise ValueError("no quoting is safe in this place of the command")
        case _:
            assert_never(place)


class _ShellScanner:
    """Scans a shell script character by character, as far as needed to know the quotes around each place.

    The stack contains the open constructs: ``"``, ``'``, ``(`` for a subshell or ``$(``, ``((`` for each parenthesis of
    arithmetic, a backquote, ``$'``, ``"${`` for ``${`` within double quotes and ``${`` outside of them, ``[`` for the subscript of
    a variable, ``#`` for a comment, and ``?`` for constructs that are not scanned any further: here-documents, and those in which
    a closing sign could be mistaken. The shell may evaluate the content of ``${`` and ``[``, and runs ``$(`` in it whatever its
    quotes.
    """

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._recent = ""
        self.escaped = False

    @property
    def place(self) -> Place:
        # "$" makes what follows an expansion, or $'...', whose escapes end elsewhere.
        dollar = self._recent.endswith("$") and self._top in {"", "(", '"'}
        if self._heredoc_begins() or self._is_calculated() or self.escaped or dollar:
            return "unquotable"
        match self._top:
            case "" | "(":
                return "word"
            case '"':
                return "double-quotes"
            case "'":
                return "single-quotes"
            case _:
                return "unquotable"

    @property
    def _top(self) -> str:
        return self._stack[-1] if self._stack else ""

    def feed(self, text: str) -> None:
        for character in text:
            self._step(character)

    def feed_value(self) -> None:
        if self._heredoc_begins():
            self._stack.append("?")
        self.escaped = False
        self._recent = "x"

    def _heredoc_begins(self) -> bool:
        return self._top in {"", "("} and self._recent.endswith("<<") and not self._recent.endswith("<<<")

    def _is_calculated(self) -> bool:
        """Whether this place is in a subscript or an expansion, and not in a nested command."""
        innermost = next((each for each in reversed(self._stack) if each in {"(", "${", "["}), "(")
        return innermost != "("

    def _step(self, character: str) -> None:
        top = self._top
        if top == "?":
            return
        if top == "'":
            if character == "'":
                self._stack.pop()
        elif top == "#":
            if character == "\n":
                self._stack.pop()
        elif self.escaped:
            self.escaped = False
            if character == "\n":
                self._recent = self._recent[:-1]  # The shell removes both.
                return
            character = "x"  # It has no special meaning any more.
        elif character == "\\":
            self.escaped = True
        elif top in {"", "("}:
            self._step_word(character)
        elif top in {"${", "["}:
            self._step_calculated(top, character)
        else:
            self._step_quoted(top, character)
        self._recent = (self._recent + character)[-6:]

    def _opens_quotes(self, character: str, before: str) -> bool:
        if character not in {"'", '"', "`"}:
            return False
        self._stack.append("$'" if character == "'" and before == "$" else character)
        return True

    def _step_word(self, character: str) -> None:
        before = self._recent[-1:]
        if (character != "<" and self._heredoc_begins()) or ("(" in self._stack and _CASE.search(self._recent)):
            self._stack.append("?")
        elif self._opens_quotes(character, before):
            pass
        elif character == "[" and (before.isalnum() or before in {"_", "$"}):
            self._stack.append("?" if before == "$" else "[")
        elif character == "{" and before == "$":
            self._stack.append("${")
        elif character == "(" and before == "(" and self._top == "(":
            self._stack[-1:] = ["((", "(("]
        elif character == "(":
            self._stack.append("(")
        elif character == ")" and self._top == "(":
            self._stack.pop()
        elif character == "#" and (not before or before in " \t\n;&|()"):
            self._stack.append("#")

    def _step_calculated(self, top: str, character: str) -> None:
        before = self._recent[-1:]
        if character == ("}" if top == "${" else "]"):
            self._stack.pop()
        elif self._opens_quotes(character, before):
            pass
        elif before == "$" and character in "({":
            self._stack.append("(" if character == "(" else "${")
        elif (before == "$" and character == "[") or (top == "[" and (character.isspace() or character in "#;&|()<>[")):
            self._stack.append("?")  # These end the "[" of a file name pattern.

    def _step_quoted(self, top: str, character: str) -> None:
        before = self._recent[-1:]
        closing = {'"': '"', "`": "`", "$'": "'", '"${': "}", "((": ")"}[top]
        if character == closing:
            self._stack.pop()
        elif top == '"' and character == "`":
            self._stack.append("`")
        elif top == '"' and before == "$" and character in "({":
            self._stack.append("(" if character == "(" else '"${')
        elif top == '"' and before == "$" and character == "[":
            self._stack.append("?")
        elif top == "((" and character == "(":
            self._stack.append("((")
        elif top in {"((", '"${'} and character in "'\"`$":
            self._stack.append("?")
