"""The options of a script as values, and the MLproject parameters that give a script just these options."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import yaml

Kind: TypeAlias = Literal["string", "int", "float", "path", "bool"]
Several: TypeAlias = Literal["", "words", "repeated"]

_SECRET = re.compile(r"(^|[-_])(password|passwd|passphrase|secret|token|api[-_]?key)$", re.IGNORECASE)
# What an MLproject file may have as a parameter's name, and as its option.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FLAG = re.compile(r"(--?[A-Za-z0-9][A-Za-z0-9_.-]*)?")
_FORMATS = re.compile(r"\s*[([]?\s*(default\s*[:=]?\s*)?%\(\w+\)\w\s*[)\]]?", re.IGNORECASE)


@dataclass(frozen=True)
class ScriptOption:
    """An option or argument that a script reads.

    Attributes:
        name: The name that it has in the script.
        flag: How it is written on the command line; empty for a positional argument.
        kind: The kind of its value.
        is_switch: Whether it has no value: it is given or not.
        several: ``words`` for several values after it, ``repeated`` for one that may be given several times.
        required: Whether the script asks for it.
        default: Its default, if the script's text tells it.
        computed: Whether its default is known only when the script runs.
        choices: The values that are allowed; empty for any.
        minimum: The least number allowed, if any.
        maximum: The greatest number allowed, if any.
        help: Its help text.
    """

    name: str
    flag: str = ""
    kind: Kind = "string"
    is_switch: bool = False
    several: Several = ""
    required: bool = False
    default: Any = None
    computed: bool = False
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    help: str = ""

    @property
    def is_secret(self) -> bool:
        """Whether its name says that its value is one."""
        return not self.is_switch and _SECRET.search(self.name) is not None

    @property
    def follows(self) -> bool:
        """Whether it follows the command, since it may be left out or stands for several words."""
        return bool(self.flag) and (self.is_switch or bool(self.several) or not (self.required or self.has_default))

    @property
    def has_default(self) -> bool:
        """Whether its default can be written into a file."""
        return self.default is not None and not (self.is_secret or self.computed)

    def declaration(self) -> dict[str, Any]:
        """Returns its keys in an MLproject file."""
        keys: dict[str, Any] = {"type": "list" if self.several else "choice" if self._is_choice else self.kind}
        if self.is_switch:
            keys["default"] = False
        elif self.has_default:
            keys["default"] = list(self.default) if self.several else self.default
        elif not self.required:
            # MLflow would ask for a value without a default.
            keys |= {"default": "", "optional": True}
        if self.choices:
            keys["choices"] = [each if isinstance(each, int | float) else str(each) for each in self.choices]
        keys |= {name: value for name, value in (("min", self.minimum), ("max", self.maximum)) if value is not None}
        if self.follows:
            keys["option"] = self.flag
        if self.several == "words":
            keys["words"] = True
        if self.is_secret:
            keys["secret"] = True
        if text := " ".join(_FORMATS.sub("", self.help).replace("%%", "%").split()):
            keys["description"] = text
        return keys

    @property
    def _is_choice(self) -> bool:
        return bool(self.choices) and self.kind == "string"


@dataclass
class ScriptCommand:
    """A command that a script has: its only one, or one of its sub-commands."""

    name: str = ""  # of the sub-command
    options: list[ScriptOption] = field(default_factory=list)
    shared: list[ScriptOption] = field(default_factory=list)  # written before the sub-command

    def entry_point(self, script: str, notes: list[str]) -> dict[str, Any]:
        """Returns the parameters and the command of an entry point; what it can't have is added to `notes`."""
        words, parameters = ["python", shlex.quote(script)], {}
        before = [each for each in self.shared if not each.follows]
        notes += (
            f"{each.flag} stands before the sub-command and may be left out" for each in self.shared if each.follows
        )
        for option in (*before, None, *sorted(self.options, key=lambda each: not each.flag)):
            if option is None:
                words += [shlex.quote(self.name)] if self.name else []
                continue
            if option.name in parameters:
                continue
            if not (_NAME.fullmatch(option.name) and _FLAG.fullmatch(option.flag)):
                notes.append(f"{(option.flag or option.name)!r} is no name for a parameter; it is left out")
                continue
            parameters[option.name] = option.declaration()
            if option.computed:
                notes.append(f"the default of {option.flag or option.name} is known only when the script runs")
            if not option.follows:
                words += [option.flag] if option.flag else []
                words.append(f"{{{option.name}}}")
        return {"parameters": parameters, "command": " ".join(words)}


def write_yaml(value: Any) -> str:
    """Returns a value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


class _Unknown:
    """What is known only when the script runs."""


UNKNOWN = _Unknown()


def literal(node: ast.expr | None, names: dict[str, Any] | None = None) -> Any:
    """Returns the value of a literal, or of a name in `names`; `UNKNOWN` for another expression; runs nothing."""
    if node is None:
        return None
    if isinstance(node, ast.Name) and names and node.id in names:
        return names[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return UNKNOWN
    return UNKNOWN if isinstance(value, bytes | complex) or value is ... else value


def constants(tree: ast.Module) -> dict[str, Any]:
    """Returns the module's names that are assigned a literal once, and never again."""
    found: dict[str, Any] = {}
    assigned: list[str] = []
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        assigned += (each.id for each in targets if isinstance(each, ast.Name))
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if assigned.count(name) == 1 and (value := literal(node.value)) is not UNKNOWN:
                found[name] = value
    return found


def dotted(node: ast.expr | None) -> str:
    """Returns a name such as ``click.Path`` as it is written; "" for another expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    """Returns a call's keyword arguments by name."""
    return {each.arg: each.value for each in call.keywords if each.arg is not None}


def kind_of_default(default: Any) -> Kind:
    """Returns the kind that a library takes from a default."""
    if isinstance(default, list | tuple) and default:
        default = default[0]
    if isinstance(default, bool):
        return "bool"
    return "int" if isinstance(default, int) else "float" if isinstance(default, float) else "string"
