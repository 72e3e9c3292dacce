"""Reads the options of a script that uses click (https://click.palletsprojects.com) or typer (https://typer.tiangolo.com)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prefect_mlprojects.scaffold.options import (
    UNKNOWN,
    Kind,
    ScriptCommand,
    ScriptOption,
    constants,
    dotted,
    keywords,
    kind_of_default,
    literal,
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("int", "INT", "IntRange"), "int"),
    **dict.fromkeys(("float", "FLOAT", "FloatRange"), "float"),
    **dict.fromkeys(("bool", "BOOL"), "bool"),
    "File": "path",
}


def read_click(tree: ast.Module) -> tuple[list[ScriptCommand], list[str]]:
    """Returns the commands of a script that uses click, and notes on what they lack."""
    names, notes = constants(tree), list[str]()
    groups: dict[str, _Function] = {}
    commands: list[tuple[str, str, _Function]] = []
    for function in _functions(tree):
        for decorator in function.decorator_list:
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            owner, _, what = dotted(call).rpartition(".")
            if what == "group" and (not owner or owner == "click"):
                groups[function.name] = function
            elif what == "command" and (owner in ("", "click") or owner in groups):
                given = (
                    literal(decorator.args[0], names) if isinstance(decorator, ast.Call) and decorator.args else None
                )
                commands.append((owner, given if isinstance(given, str) else _command_name(function.name), function))
    added = _added_commands(tree)
    found = []
    for owner, name, function in commands:
        group = groups.get(owner) or groups.get(added.get(function.name, ""))
        options = list(_click_options(function, names, notes))
        shared = list(_click_options(group, names, notes)) if group else []
        found.append(ScriptCommand(name if group else "", options, shared))
    return found, notes


def _command_name(function: str) -> str:
    return function.removesuffix("_command").removesuffix("_cmd").replace("_", "-").lower()


def _added_commands(tree: ast.Module) -> dict[str, str]:
    """Returns the groups of the functions that ``group.add_command(function)`` adds."""
    calls = (each for each in ast.walk(tree) if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute))
    return {
        dotted(call.args[0]): dotted(call.func.value)  # type: ignore[attr-defined]
        for call in calls
        if call.func.attr == "add_command" and call.args  # type: ignore[attr-defined]
    }


def _functions(tree: ast.AST) -> Iterator[_Function]:
    return (each for each in ast.walk(tree) if isinstance(each, _Function))


def _click_options(function: _Function, names: dict[str, Any], notes: list[str]) -> Iterator[ScriptOption]:
    for decorator in function.decorator_list:
        if not isinstance(decorator, ast.Call):
            continue
        what = dotted(decorator.func).rpartition(".")[2]
        if what in ("option", "argument"):
            words = [each for each in (literal(node, names) for node in decorator.args) if isinstance(each, str)]
            if words:
                yield from _click_option(words, what == "option", keywords(decorator), names, notes)


def _click_option(
    words: list[str], is_option: bool, given: dict[str, ast.expr], names: dict[str, Any], notes: list[str]
) -> Iterator[ScriptOption]:
    values = {key: literal(value, names) for key, value in given.items()}
    if values.get("hidden") is True or values.get("is_eager") is True:
        return
    if values.get("count") is True:
        notes.append(f"{words[0]} counts how often it is given; it is left out")
        return
    default = values.get("default")
    named = [each for each in words if not each.startswith("-")]
    flags = [each for each in words if each.startswith("-")]
    flag = max(flags, key=lambda each: each.startswith("--"), default="")
    flag, _, off = flag.partition("/")
    name = (named or [flag.lstrip("-")])[0].replace("-", "_").lower()
    text = values.get("help")
    option = ScriptOption(name, flag, help=text if isinstance(text, str) else "", computed=default is UNKNOWN)
    if is_option and (off or values.get("is_flag") is True or "flag_value" in values or isinstance(default, bool)):
        yield _switch(option, off, default)
        return
    yield replace(
        _typed(option, given.get("type"), None if default is UNKNOWN else default, names),
        several=_several(values, is_option),
        required=_is_required(values, is_option),
    )


def _is_required(values: dict[str, Any], is_option: bool) -> bool:
    given = values.get("required")
    asked = not is_option and given is None and values.get("default") is None and values.get("nargs") != -1
    return given is True or asked


def _several(values: dict[str, Any], is_option: bool) -> Any:
    if values.get("multiple") is True:
        return "repeated"
    return (
        "words" if isinstance(nargs := values.get("nargs"), int) and nargs != 1 and (nargs == -1 or is_option) else ""
    )


def _switch(option: ScriptOption, off: str, default: Any) -> ScriptOption:
    """Returns a flag; of ``--shout/--no-shout``, the half that changes the default."""
    if off and default is True:
        option = replace(option, name=off.strip().lstrip("-").replace("-", "_"), flag=off.strip())
    return replace(option, is_switch=True, kind="bool", computed=False)


def _typed(option: ScriptOption, node: ast.expr | None, default: Any, names: dict[str, Any]) -> ScriptOption:
    """Returns an option with the kind, choices and limits of a click type."""
    call = node if isinstance(node, ast.Call) else None
    what = dotted(call.func if call else node).rpartition(".")[2]
    given = keywords(call) if call else {}
    values = {key: literal(value, names) for key, value in given.items()}
    kind = _KINDS.get(what, kind_of_default(default) if node is None else "string")
    if what == "Path" and values.get("exists") is True:
        kind = "path"
    choices: Any = ()
    if what == "Choice" and call:
        choices = literal(call.args[0] if call.args else given.get("choices"), names)
    limits: list[Any] = [None, None]
    if what.endswith("Range") and call:
        positional = [literal(each, names) for each in call.args[:2]]
        limits = [values.get("min", positional[0] if positional else None)]
        limits.append(values.get("max", positional[1] if len(positional) > 1 else None))
    low, high = (each if isinstance(each, int | float) else None for each in limits)
    listed = tuple(choices) if isinstance(choices, list | tuple) else ()
    return replace(option, kind=kind, default=default, choices=listed, minimum=low, maximum=high)


def read_typer(tree: ast.Module) -> tuple[list[ScriptCommand], list[str]]:
    """Returns the commands of a script that uses typer, and notes on what they lack."""
    names, notes = constants(tree), list[str]()
    functions = {each.name: each for each in _functions(tree)}
    classes = {each.name: each for each in ast.walk(tree) if isinstance(each, ast.ClassDef)}
    found: list[tuple[str, _Function]] = []
    has_callback = False
    for function in functions.values():
        for decorator in function.decorator_list:
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            what = dotted(call).rpartition(".")[2]
            has_callback |= what == "callback"
            if what == "command":
                given = (
                    literal(decorator.args[0], names) if isinstance(decorator, ast.Call) and decorator.args else None
                )
                found.append((given if isinstance(given, str) else function.name.replace("_", "-"), function))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in ("typer.run", "run") and node.args:
            found += [("", functions[name]) for name in [dotted(node.args[0])] if name in functions]
    # An application with one command has no sub-commands.
    is_group = len(found) > 1 or has_callback
    return [
        ScriptCommand(name if is_group else "", list(_typer_options(function, names, classes, notes)))
        for name, function in found
    ], notes


def _typer_options(
    function: _Function, names: dict[str, Any], classes: dict[str, ast.ClassDef], notes: list[str]
) -> Iterator[ScriptOption]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for argument, default in pairs:
        annotation, marker = _unwrapped(argument.annotation, default)
        if dotted(annotation).endswith("Context"):
            continue
        yield from _typer_option(argument.arg, annotation, marker, default, names, classes, notes)


def _unwrapped(annotation: ast.expr | None, default: ast.expr | None) -> tuple[ast.expr | None, ast.Call | None]:
    """Returns the annotation without ``Annotated`` and ``Optional``, and the ``typer.Option(…)`` of the parameter."""
    marker = default if isinstance(default, ast.Call) and _is_marker(default) else None
    if isinstance(annotation, ast.Subscript) and dotted(annotation.value).endswith("Annotated"):
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        marker = next((each for each in parts[1:] if isinstance(each, ast.Call) and _is_marker(each)), marker)
        annotation = parts[0]
    if isinstance(annotation, ast.Subscript) and dotted(annotation.value).endswith("Optional"):
        annotation = annotation.slice
    if isinstance(annotation, ast.BinOp):
        annotation = annotation.left if literal(annotation.right) is None else annotation.right
    return annotation, marker


def _is_marker(call: ast.Call) -> bool:
    return dotted(call.func).rpartition(".")[2] in ("Option", "Argument")


def _typer_option(
    name: str,
    annotation: ast.expr | None,
    marker: ast.Call | None,
    written: ast.expr | None,
    names: dict[str, Any],
    classes: dict[str, ast.ClassDef],
    notes: list[str],
) -> Iterator[ScriptOption]:
    given = keywords(marker) if marker else {}
    words = [literal(each, names) for each in marker.args] if marker else []
    node = written
    if marker is written and marker is not None:
        node = marker.args[0] if marker.args else given.get("default")
        words = words[1:]
    required = node is None or literal(node) is ... or (isinstance(node, ast.Constant) and node.value is ...)
    default = None if required else _enum_value(node, classes, names)
    is_argument = dotted(marker.func).endswith("Argument") if marker else written is None
    values = {key: literal(value, names) for key, value in given.items()}
    if values.get("hidden") is True or values.get("is_eager") is True:
        return
    if values.get("count") is True:
        notes.append(f"{name} counts how often it is given; it is left out")
        return
    flags = [each for each in words if isinstance(each, str) and each.startswith("-")]
    flag = (
        "" if is_argument else max(flags, key=lambda each: each.startswith("--"), default=f"--{name.replace('_', '-')}")
    )
    flag, _, off = flag.partition("/")
    text = values.get("help")
    option = ScriptOption(name, flag, help=text if isinstance(text, str) else "", computed=default is UNKNOWN)
    outer = dotted(annotation.value).rpartition(".")[2] if isinstance(annotation, ast.Subscript) else ""
    is_list = outer.lower() in ("list", "tuple", "sequence")
    if is_list and isinstance(annotation, ast.Subscript):
        annotation = annotation.slice.elts[0] if isinstance(annotation.slice, ast.Tuple) else annotation.slice
    kind = dotted(annotation).rpartition(".")[2]
    if kind == "bool" and not is_argument and not is_list:
        both = not flags and default is True
        yield _switch(option, off or (f"--no-{name.replace('_', '-')}" if both else ""), default)
        return
    typed = replace(option, kind=_KINDS.get(kind, "string"), default=None if default is UNKNOWN else default)
    if values.get("exists") is True or kind.startswith("File"):
        typed = replace(typed, kind="path")
    limits = (values.get(each) if isinstance(values.get(each), int | float) else None for each in ("min", "max"))
    low, high = limits
    yield replace(
        typed,
        several=("words" if is_argument else "repeated") if is_list else "",
        required=required,
        choices=_choices(annotation, outer, classes),
        minimum=low,
        maximum=high,
    )


def _choices(annotation: ast.expr | None, outer: str, classes: dict[str, ast.ClassDef]) -> tuple[Any, ...]:
    """Returns the values of an ``Enum`` of the script, or of a ``Literal``."""
    if outer == "Literal" and isinstance(annotation, ast.Subscript):
        value = literal(annotation.slice)
        return value if isinstance(value, tuple) else () if value is UNKNOWN else (value,)
    found = classes.get(dotted(annotation))
    return (
        tuple(_members(found).values()) if found and any(dotted(each).endswith("Enum") for each in found.bases) else ()
    )


def _members(enum: ast.ClassDef) -> dict[str, Any]:
    assigned = (each for each in enum.body if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name))
    return {each.targets[0].id: value for each in assigned if (value := literal(each.value)) is not UNKNOWN}  # type: ignore[attr-defined]


def _enum_value(node: ast.expr | None, classes: dict[str, ast.ClassDef], names: dict[str, Any]) -> Any:
    """Returns a default; of a member of an ``Enum`` of the script, its value."""
    owner, _, member = dotted(node).removesuffix(".value").rpartition(".")
    if owner in classes:
        return _members(classes[owner]).get(member, UNKNOWN)
    return literal(node, names)
