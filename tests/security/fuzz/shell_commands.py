"""Shell commands with placeholders, generated from the constructs that the scanner of ``spec/shell.py`` has to know."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# Stands for the placeholder until the braces of the shell are doubled.
MARK = "\x01"
PLACEHOLDER = "{x}"

# Each makes the file "ran" if the shell takes it for anything but text.
HOSTILE_VALUES = [
    "\\'\";>ran;#",
    "$(>ran)",
    "`>ran`",
    "';>ran;'",
    '";>ran;"',
    "\n>ran\n",
    "'\n>ran\n'",
    ")>ran;(",
    "v[$(>ran)]",
    "}$(>ran)",
    "]=1 $(>ran)",
    "))$(>ran)",
    "END\n>ran\n",
    "&>ran",
    "1;>ran",
    # Names of a variable whose content is hostile: see HOSTILE_VARIABLES.
    "evil",
    "evil@P",
    "1:evil",
    "+evil",
]
HOSTILE_VARIABLES = {"evil": "v[$(>ran)]"}


def _joined(*parts: str | SearchStrategy[str]) -> SearchStrategy[str]:
    return st.tuples(*(st.just(part) if isinstance(part, str) else part for part in parts)).map("".join)


_LITERALS = st.sampled_from(
    ["a", "b=c", "--k=", "\\'", '\\"', "\\\\", "$", "a#b", "x[", "]", "~", "*", "1", "-", "\\\n", "$1", "%", "é", "$#"]
)
_IN_QUOTES = st.sampled_from(
    ["a", " ", "it", "(", ")", "[", "]", "#", "$HOME", ";", "&", "<<", "case ", "\n", "{", "}"]
)
_SPACE = st.sampled_from([" ", "  ", "\t", " \\\n"])
_VALUE = st.just(MARK)


def _words(command: SearchStrategy[str]) -> SearchStrategy[str]:
    inner = st.lists(_IN_QUOTES | _VALUE, min_size=1, max_size=4).map("".join)
    text = st.lists(_LITERALS | _VALUE, min_size=1, max_size=2).map("".join)
    # What a nested command prints would be calculated with, or expanded twice: that is what the command does with its output.
    silent = _joined("(", command, "\n) >/dev/null")
    number = st.sampled_from(["1", "v", "2 + ", "(1) + "]) | _VALUE | _joined("$( ", silent, ")1")
    calculation = st.lists(number, min_size=1, max_size=3).map(" ".join)
    pieces = st.one_of(
        _LITERALS,
        _VALUE,
        _joined("'", inner, "'"),
        _joined('"', inner, '"'),
        _joined('"a', _joined("$(", command, ")"), inner, '"'),
        _joined("$(", command, ")"),
        _joined("`", command.filter(lambda text: "`" not in text and "\\" not in text), "`"),
        _joined("${v:-", text, "}"),
        _joined('"${v:-', text, '}"'),
        _joined("${v:", _VALUE, "}"),
        _joined("${w[", calculation, "]}"),
        _joined("${", _VALUE, "}"),
        _joined("${v/", text, "/b}"),
        _joined("$((", calculation, "))"),
        _joined('"$((', calculation, '))"'),
        _joined("$[", calculation, "]"),
        _joined("$'", inner, "'"),
        _joined("<(", command, ")"),
    )
    return st.lists(pieces, min_size=1, max_size=3).map("".join)


def _commands(command: SearchStrategy[str]) -> SearchStrategy[str]:
    word = _words(command)
    words = st.lists(word, min_size=1, max_size=3).flatmap(lambda each: _SPACE.map(lambda space: space.join(each)))
    subscript = st.lists(st.sampled_from(["1", " ", "v", "'", '"']) | _VALUE, min_size=1, max_size=3).map("".join)
    element = _joined("[", subscript, "]=", word) | word
    array = _joined(
        st.sampled_from(["w=( ", "w=(", "w+=(", "declare -a w=(", "declare w=( a "]), element, _SPACE, element, ")"
    )
    return st.one_of(
        _joined("printf '%s ' ", words),
        _joined("v=", word, " printf %s ", word),
        array,
        _joined("w[", subscript, "]=", word),
        _joined("echo a ", st.sampled_from([">&", ">& ", "2>&", ">&\\\n", "<&", ">", ">>", "&>", "<", "<<<"]), word),
        _joined("cat ", st.sampled_from(["<<END", "<<-END", "<<'END'"]), "\n", words, "\nEND\n"),
        _joined("true # ", words, "\nprintf %s ", word),
        _joined("(", command, ")"),
        _joined("{ ", command, "\n}"),
        _joined("if ", command, "\nthen ", command, "\nfi"),
        _joined("for i in ", words, "\ndo printf %s ", word, "\ndone"),
        _joined("case ", word, " in a|", word, ") ", command, "\n;; *) true;; esac"),
        _joined(command, st.sampled_from([" | ", " && ", "; ", "\n", " & "]), command),
        _joined("(( ", st.sampled_from(["v = ", "1 < ", ""]), _VALUE, " ))"),
        _joined("[[ a == ", word, " ]]"),
    )


_COMMANDS = st.recursive(_joined("printf %s ", _VALUE) | st.just("true"), _commands, max_leaves=6)


@st.composite
def commands(draw: st.DrawFn) -> str:
    """Draws a command, with ``MARK`` for its placeholders."""
    return draw(_COMMANDS)


def template_of(command: str) -> str:
    """Returns a generated command as the template that an MLproject file would have."""
    return command.replace("{", "{{").replace("}", "}}").replace(MARK, PLACEHOLDER)
