"""Reads the options of a script that uses argparse (https://docs.python.org/3/library/argparse.html)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from prefect_mlprojects.scaffold.options import (
    UNKNOWN,
    Kind,
    ScriptCommand,
    ScriptOption,
    constants,
    dotted,
    keywords,
    literal,
)

_PARSERS = ("ArgumentParser",)
_GROUPS = ("add_argument_group", "add_mutually_exclusive_group")
_KINDS: dict[str, Kind] = {"int": "int", "float": "float"}
_MAX_NUMBERS = 30
_NO_OPTIONS = ("help", "version", "count")


@dataclass
class _Parser:
    command: str | None = None  # the name of its sub-command
    parents: tuple[str, ...] = ()
    options: list[ScriptOption] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)


class _Reader:
    """Follows the variables that hold parsers, groups and sub-parsers through a script, in the order of its text."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.names = constants(tree)
        self.parsers: dict[str, _Parser] = {}
        self.owners: dict[str, str] = {}  # a group's variable: its parser's
        self.notes: list[str] = []

    def read(self) -> None:
        for node in _statements(self.tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self._call(node.value, next(filter(None, map(dotted, targets)), ""))
            elif isinstance(node, ast.Expr | ast.Return) and isinstance(node.value, ast.Call):
                self._call(node.value, "")

    def _call(self, call: ast.Call, target: str) -> str:
        """Notes what a call makes, and returns the variable, or an invented one, of the parser that it returns."""
        name = dotted(call.func).rpartition(".")[2] or (call.func.attr if isinstance(call.func, ast.Attribute) else "")
        variable = target or f"call at {call.lineno}:{call.col_offset}"
        given = keywords(call)
        if name in _PARSERS or name == "add_parser":
            parents = given.get("parents")
            listed = [dotted(each) for each in parents.elts] if isinstance(parents, ast.List | ast.Tuple) else []
            command = literal(call.args[0], self.names) if name == "add_parser" and call.args else None
            self.parsers[variable] = _Parser(None if name in _PARSERS else str(command), tuple(listed))
            return variable
        if not isinstance(call.func, ast.Attribute):
            return ""
        owner = self._owner(call.func.value)
        if name in _GROUPS:
            self.owners[variable] = owner
            return owner
        if owner not in self.parsers:
            return ""
        if name == "add_argument":
            self.parsers[owner].options += self._argument(call, given)
        elif name == "set_defaults":
            values = {key: literal(value, self.names) for key, value in given.items()}
            self.parsers[owner].defaults |= {key: value for key, value in values.items() if value is not UNKNOWN}
        return owner

    def _owner(self, node: ast.expr) -> str:
        if isinstance(node, ast.Call):
            return self._call(node, "")
        name = dotted(node)
        return self.owners.get(name, name)

    def _argument(self, call: ast.Call, given: dict[str, ast.expr]) -> Iterator[ScriptOption]:
        flags = [value for each in call.args if isinstance(value := literal(each, self.names), str)]
        if len(flags) != len(call.args) or not flags:
            self.notes.append(
                f"line {call.lineno}: an option whose name is known only when the script runs is left out"
            )
            return
        values = {key: literal(value, self.names) for key, value in given.items()}
        action = values.get("action", "store")
        if action is UNKNOWN:
            action = dotted(given["action"]).rpartition(".")[2]
        flag = next((each for each in flags if each.startswith("--")), flags[0] if flags[0].startswith("-") else "")
        name = (
            str(values["dest"])
            if isinstance(values.get("dest"), str)
            else flag.lstrip("-").replace("-", "_") or flags[0]
        )
        if action in _NO_OPTIONS:
            if action == "count":
                self.notes.append(f"{flag} counts how often it is given; it is left out")
            return
        default = values.get("default")
        common = ScriptOption(name, flag, help=help_ if isinstance(help_ := values.get("help"), str) else "")
        if common.help == "==SUPPRESS==" or dotted(given.get("help")).endswith("SUPPRESS"):
            return
        if action in ("store_true", "store_false", "store_const"):
            yield replace(common, name=flag.lstrip("-").replace("-", "_"), is_switch=True, kind="bool")
        elif action == "BooleanOptionalAction":
            off = default is True
            spelled = f"--no-{flag.lstrip('-')}" if off else flag
            yield replace(common, name=f"no_{name}" if off else name, flag=spelled, is_switch=True, kind="bool")
        else:
            yield self._with_value(common, given, values, str(action))

    def _with_value(
        self, common: ScriptOption, given: dict[str, ast.expr], values: dict[str, Any], action: str
    ) -> ScriptOption:
        default, nargs, choices = values.get("default"), values.get("nargs"), values.get("choices")
        type_name = dotted(given.get("type")).rpartition(".")[2]
        reads_file = isinstance(given.get("type"), ast.Call) and dotted(given["type"].func).endswith("FileType")  # type: ignore[attr-defined]
        kind = "path" if reads_file else _KINDS.get(type_name, "string")
        if type_name == "bool":
            self.notes.append(f"{common.flag or common.name}: with type=bool, argparse takes every text but '' as True")
        is_list = nargs in ("*", "+") or isinstance(nargs, int)
        computed = default is UNKNOWN and not dotted(given["default"]).endswith("SUPPRESS")
        if choices is UNKNOWN:
            choices = _numbers(given["choices"])
        return replace(
            common,
            kind=kind,
            several="words" if is_list else "repeated" if action in ("append", "extend") else "",
            required=values.get("required") is True if common.flag else nargs not in ("?", "*"),
            default=None if default is UNKNOWN else default,
            computed=computed,
            choices=tuple(choices or ()),
        )


def _numbers(node: ast.expr) -> range:
    """Returns the numbers of ``range(…)``; none for another expression, or for many."""
    bounds = (
        [literal(each) for each in node.args] if isinstance(node, ast.Call) and dotted(node.func) == "range" else []
    )
    found = range(*bounds) if bounds and all(isinstance(each, int) for each in bounds) else range(0)
    return found if len(found) <= _MAX_NUMBERS else range(0)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes in the order of the text; `ast.walk` goes by depth."""
    for child in ast.iter_child_nodes(tree):
        yield child
        yield from _statements(child)


def read_argparse(tree: ast.Module) -> tuple[list[ScriptCommand], list[str]]:
    """Returns the commands of a script and notes on what they lack; none if it makes no parser."""
    reader = _Reader(tree)
    reader.read()
    used = {parent for each in reader.parsers.values() for parent in each.parents}

    def options(parser: _Parser) -> list[ScriptOption]:
        inherited = [
            each for name in parser.parents if name in reader.parsers for each in options(reader.parsers[name])
        ]
        own = [replace(each, default=parser.defaults.get(each.name, each.default)) for each in parser.options]
        return [*inherited, *own]

    shared: list[ScriptOption] = []
    commands: list[ScriptCommand] = []
    for variable, parser in reader.parsers.items():
        if parser.command is not None:
            commands.append(ScriptCommand(parser.command, options(parser)))
        elif variable not in used:
            shared += options(parser)
    if not reader.parsers:
        return [], []
    if not commands:
        return [ScriptCommand(options=shared)], reader.notes
    return [replace(each, shared=shared) for each in commands], reader.notes
