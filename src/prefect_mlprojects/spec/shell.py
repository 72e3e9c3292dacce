"""Scans a shell command, as far as needed to know how a value can be written at each of its places."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Place: TypeAlias = Literal["word", "double-quotes", "single-quotes", "unquotable", "number"]

_CASE = re.compile(r"(?:^|[\s;&|(])case\s$")
_NAME_AT_END = re.compile(r"\w+$")
# "${name:-": what follows is text, while in "${name", "${name:" and "${name[" it would be evaluated, as it is after "@".
_TEXT_OPERATOR = re.compile(r"[!#]?(?:\w+|[@*#?$!-])(?:\[[^\]]*\])?(?::?[-=+?]|[#%/^,])")
_OPERATOR_WITHIN = 200
_ENDS_WORD = frozenset(" \t\n;&|()<>")
_BRACKETS = {")": "(", "]": "[", "}": "{"}


@dataclass
class _Construct:
    """An open construct: what opened it, and where in the text its content starts."""

    kind: str
    start: int
    brackets: list[tuple[str, bool]] = field(default_factory=list)

    def track(self, character: str, before: str) -> None:
        """Records the brackets in a construct that is not scanned, and whether the shell calculates in them."""
        if character in "([{":
            array = bool(self.brackets) and self.brackets[-1] == ("(", True)
            calculates = {"(": before in {"(", "="}, "[": before.isalnum() or before in {"_", "$"} or array}
            self.brackets.append((character, calculates.get(character, before == "$")))
        elif character in _BRACKETS and self.brackets and self.brackets[-1][0] == _BRACKETS[character]:
            self.brackets.pop()


class ShellScanner:
    """Scans a shell script character by character.

    The stack contains the open constructs: ``"``, ``'``, ``(`` for a subshell or ``$(``, ``=(`` for an array's values, ``((`` for
    each parenthesis of arithmetic and ``$[`` for each of its brackets, a backquote, ``$'``, ``"${`` for ``${`` within double quotes
    and ``${`` outside of them, ``[`` for the subscript of a variable, ``[*`` for brackets in other words, ``>&`` for a word after
    ``>&`` or ``<&``, ``#`` for a comment, and ``?`` for constructs that are not scanned any further: here-documents, and those in
    which a closing sign could be mistaken. The shell may evaluate the content of ``${`` and ``[``, and runs ``$(`` in it whatever
    its quotes. It expands the word after ``>&`` twice. Arithmetic takes a name for a variable, whose content it evaluates, so that
    only numbers are safe there.
    """

    def __init__(self) -> None:
        self._stack: list[_Construct] = []
        self._text: list[str] = []
        self._recent = ""
        self.escaped = False

    @property
    def place(self) -> Place:
        """How a value can be written here."""
        nested = max((i for i, each in enumerate(self._stack) if each.kind in {"(", "=("}), default=-1)
        innermost = self._stack[nested + 1 :]
        if any(self._calculates(each) for each in innermost):
            return "number"
        # "$" makes what follows an expansion, or $'...', whose escapes end elsewhere.
        dollar = self._recent.endswith("$") and (self._in_words or self._top == '"')
        expanded = any(each.kind in {"${", "[*"} for each in innermost) or any(
            each.kind == ">&" for each in self._stack
        )
        if self._heredoc_begins() or self.escaped or dollar or expanded:
            return "unquotable"
        if self._in_words:
            return "word"
        quotes: dict[str, Place] = {'"': "double-quotes", "'": "single-quotes"}
        return quotes.get(self._top, "unquotable")

    def _calculates(self, construct: _Construct) -> bool:
        if construct.kind in {"${", '"${'}:
            beginning = "".join(self._text[construct.start : construct.start + _OPERATOR_WITHIN])
            return _TEXT_OPERATOR.match(beginning) is None
        if construct.kind == "?" and any(each.kind == "=(" for each in self._stack):
            return True  # The next value of the array may be near.
        return construct.kind in {"((", "$[", "["} or any(calculates for _, calculates in construct.brackets)

    @property
    def _top(self) -> str:
        return self._stack[-1].kind if self._stack else ""

    @property
    def _in_words(self) -> bool:
        return self._top in {"", "(", "=(", ">&"}

    def _push(self, kind: str) -> None:
        self._stack.append(_Construct(kind, len(self._text) + 1))

    def feed(self, text: str) -> None:
        """Scans literal text."""
        for character in text:
            self._step(character)

    def feed_value(self) -> None:
        """Scans a value, which has no special meaning."""
        if self._heredoc_begins():
            self._push("?")
        self.escaped = False
        self._recent = "x"
        self._text.append("x")

    def _heredoc_begins(self) -> bool:
        return self._in_words and self._recent.endswith("<<") and not self._recent.endswith("<<<")

    def _step(self, character: str) -> None:
        top = self._top
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
                self._text.pop()
                return
            character = "x"  # It has no special meaning any more.
        elif top == "?":
            self._stack[-1].track(character, self._recent[-1:])
        elif character == "\\":
            self.escaped = True
        elif self._in_words:
            self._step_word(character)
        elif top in {"${", "[", "[*"}:
            self._step_calculated(top, character)
        else:
            self._step_quoted(top, character)
        self._recent = (self._recent + character)[-6:]
        self._text.append(character)

    def _opens_quotes(self, character: str, before: str) -> bool:
        if character not in {"'", '"', "`"}:
            return False
        self._push("$'" if character == "'" and before == "$" else character)
        return True

    def _step_word(self, character: str) -> None:
        before = self._recent[-1:]
        # A process substitution after it, or a second redirection, counts as part of the word.
        if self._top == ">&" and character in " \t\n;&|)" and (character not in " \t" or before not in "& \t"):
            self._stack.pop()
        if (character != "<" and self._heredoc_begins()) or self._in_case():
            self._push("?")
        elif self._opens_quotes(character, before):
            pass
        elif character == "[":
            self._open_bracket(before)
        elif character == "{" and before == "$":
            self._push("${")
        elif character == "(" and before == "(" and self._top == "(":
            self._stack.pop()
            self._push("((")
            self._push("((")
        elif character == "(":
            self._push("=(" if before == "=" else "(")
        elif character == ")" and self._top in {"(", "=("}:
            self._stack.pop()
        elif character == "&" and before and before in "<>":
            self._push(">&")
        elif character == "#" and (not before or before in _ENDS_WORD):
            self._push("#")

    def _in_case(self) -> bool:
        return any(each.kind == "(" for each in self._stack) and _CASE.search(self._recent) is not None

    def _open_bracket(self, before: str) -> None:
        if before == "$":
            self._push("$[")
        elif self._top == "=(" and before in {"(", " ", "\t", "\n"}:
            self._push("[")
        elif before.isalnum() or before == "_":
            # After a name, the brackets are a subscript if the shell takes the word for a variable.
            name = _NAME_AT_END.search("".join(self._text[-_OPERATOR_WITHIN:]))
            first = len(self._text) - len(name[0]) - 1 if name else 0
            self._push("[" if first < 0 or self._text[first] in _ENDS_WORD else "[*")

    def _step_calculated(self, top: str, character: str) -> None:
        before = self._recent[-1:]
        if character == ("}" if top == "${" else "]"):
            self._stack.pop()
        elif self._opens_quotes(character, before):
            pass
        elif before == "$" and character in "({":
            self._push("(" if character == "(" else "${")
        elif before == "$" and character == "[":
            self._open_bracket(before)
        elif top == "${" and character == "[" and self._calculates(self._stack[-1]):
            self._push("[")
        elif top != "${" and (character.isspace() or character in "#;&|()<>["):
            self._push("?")  # These end the "[" of a file name pattern.
            self._stack[-1].track(character, before)

    def _step_quoted(self, top: str, character: str) -> None:
        before = self._recent[-1:]
        closing = {'"': '"', "`": "`", "$'": "'", '"${': "}", "((": ")", "$[": "]"}[top]
        if character == closing:
            self._stack.pop()
        elif top == "`":
            self._stack[-1].track(character, before)
        elif top == '"':
            self._step_double_quotes(character, before)
        elif top == '"${' and character in "'\"`$":
            self._push("?")
        elif top in {"((", "$["}:
            self._step_arithmetic(top, character, before)

    def _step_double_quotes(self, character: str, before: str) -> None:
        if character == "`":
            self._push("`")
        elif before == "$" and character in "({":
            self._push("(" if character == "(" else '"${')
        elif before == "$" and character == "[":
            self._push("$[")

    def _step_arithmetic(self, top: str, character: str, before: str) -> None:
        if before == "$" and character == "(":
            self._push("(")
        elif character == top[-1]:
            self._push(top)
        elif character in "'\"`" or (before == "$" and character in "{["):
            self._push("?")
