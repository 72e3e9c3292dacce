"""Parses the declaration of a parameter in an MLproject file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, get_args

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.parameters import type_expectation
from prefect_mlprojects.spec.project import ParameterType, ProjectParameter
from prefect_mlprojects.spec.values import constraint, list_text
from prefect_mlprojects.spec.yaml_lines import YamlDocument, kind_of

_TYPES: Mapping[Any, ParameterType] = {
    **{each: each for each in get_args(ParameterType)},
    # Types of other formats, which public projects use; MLflow takes them for strings.
    **dict.fromkeys(("str", "text"), "string"),
    "boolean": "bool",
    **dict.fromkeys(("number", "double"), "float"),
    "integer": "int",
}
_MAX_DEFAULT_VALUES = 1000
_PARAMETER_KEYS = (
    "type",
    "default",
    "description",
    "secret",
    "choices",
    "min",
    "max",
    "optional",
    "option",
    "words",
    "separator",
)
# Without characters that the shell knows: it is written into the command as it is.
_OPTION = re.compile(r"--?[A-Za-z0-9][A-Za-z0-9_.-]*")


class ParameterParser:
    """Parses the parameters of an MLproject file; collects problems and warnings of the file."""

    def __init__(self, document: YamlDocument) -> None:
        self.document = document
        self.warnings: list[Problem] = []
        self.problems: list[Problem] = []
        self._unknown_types: set[str] = set()

    def fail(self, message: str, *path: str, fix: str | None = None, parameter: str | None = None) -> None:
        """Adds a problem at the place of a key."""
        self.problems.append(self.document.problem(message, *path, fix=fix, parameter=parameter))

    def warn(self, message: str, *path: str, fix: str | None = None, parameter: str | None = None) -> None:
        """Adds a warning at the place of a key."""
        self.warnings.append(self.document.problem(message, *path, fix=fix, parameter=parameter))

    def warn_of_unknown(self, section: Mapping[str, Any], known: tuple[str, ...], where: str, *path: str) -> None:
        """Warns of the keys of a section that are not known."""
        for key in section:
            if key in known:
                continue
            near = nearest(key, known)
            fix = f"did you mean {near!r}?" if near else f"the keys are {', '.join(known)}"
            name, colon, rest = key.partition(":")
            if colon and name in known:
                fix = f"write '{name}: {rest}', with a blank after the colon"
            self.warn(f"unknown key {key!r}{where}; it is ignored", *path, key, fix=fix)

    def parse_parameter(self, path: tuple[str, ...], content: Any) -> ProjectParameter:
        """Returns a parameter as declared: a type, or a mapping of keys."""
        name, line = path[-1], self.document.line(*path)
        if not isinstance(content, dict | str):
            self.fail(
                f"parameter {name!r} must have a type or a mapping of 'type' and 'default', not {kind_of(content)}",
                *path,
                fix=f"write '{name}: float' or '{name}: {{type: float, default: 0.1}}'",
                parameter=name,
            )
            return ProjectParameter(name, "string", "string", None, line)
        declared: Any = content
        default: Any = None
        if isinstance(content, dict):
            self.warn_of_unknown(content, _PARAMETER_KEYS, f" in parameter {name!r}", *path)
            declared, default = content.get("type", "string"), content.get("default")
        keys = content if isinstance(content, dict) else {}
        kind = self._parameter_type(path, declared)
        choices = self._choices(path, keys, kind)
        if choices and kind == "string":
            kind = "choice"
        minimum, maximum = self._limits(path, keys, kind)
        parameter = ProjectParameter(
            name,
            str(declared),
            "string" if kind == "choice" and not choices else kind,
            self._default_text(path, default),
            line,
            self._is_secret(path, content),
            " ".join(str(keys.get("description") or "").split()),
            choices,
            minimum,
            maximum,
            self._switch(path, keys, "optional"),
            self._option(path, keys, name),
            self._switch(path, keys, "words"),
            self._separator(path, keys, kind),
        )
        text = parameter.default
        if isinstance(default, list) and kind == "list" and text is not None:
            text = list_text(default)
            if not parameter.is_plain_list:
                parameter = dataclasses.replace(parameter, default=text)
        if text is not None and (text or not parameter.optional):
            expected = type_expectation(parameter.type, text) or constraint(parameter, text)
        else:
            expected = None
        if expected is not None:
            message = f"the default {text!r} of parameter {name!r} ({kind}) is not {expected.rstrip(',')}"
            self.warn(message, *path, "default", parameter=name)
        return parameter

    def _choices(self, path: tuple[str, ...], keys: Mapping[str, Any], kind: ParameterType) -> tuple[str, ...]:
        choices = keys.get("choices")
        if choices is None:
            if kind == "choice":
                message = f"parameter {path[-1]!r} is a choice without 'choices'; it is treated as string"
                self.warn(message, *path, fix="write 'choices: [a, b]'", parameter=path[-1])
            return ()
        if not isinstance(choices, list) or not choices or any(isinstance(each, dict | list) for each in choices):
            message = f"'choices' of parameter {path[-1]!r} must be a list of values, not {kind_of(choices)}"
            self.fail(message, *path, "choices", fix="write 'choices: [a, b]'", parameter=path[-1])
            return ()
        for index, each in enumerate(choices):
            if isinstance(each, bool) and kind in ("choice", "string", "list"):
                message = f"a choice of parameter {path[-1]!r} is the boolean {each}"
                self.warn(message, *path, "choices", str(index), fix="put it in quotes: 'yes'", parameter=path[-1])
        texts = tuple(map(str, choices))
        wrong = next((each for each in texts if kind != "list" and type_expectation(kind, each)), None)
        if wrong is not None:
            expected = str(type_expectation(kind, wrong)).rstrip(",")
            message = f"the choice {wrong!r} of parameter {path[-1]!r} ({kind}) is not {expected}"
            self.fail(message, *path, "choices", parameter=path[-1])
            return ()
        return texts

    def _limits(
        self, path: tuple[str, ...], keys: Mapping[str, Any], kind: ParameterType
    ) -> tuple[float | None, float | None]:
        limits: dict[str, float | None] = {}
        for key in ("min", "max"):
            value = keys.get(key)
            usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            limits[key] = value if usable and kind in ("int", "float") else None
            if value is not None and limits[key] is None:
                why = "it must be a number" if not usable else f"a {kind} has none"
                message = f"{key!r} of parameter {path[-1]!r} is ignored: {why}"
                self.warn(message, *path, key, fix="declare the parameter as int or float", parameter=path[-1])
        low, high = limits["min"], limits["max"]
        if low is not None and high is not None and low > high:
            message = f"'min' of parameter {path[-1]!r} is greater than its 'max'"
            self.fail(message, *path, "min", fix="correct one of them", parameter=path[-1])
        return low, high

    def _switch(self, path: tuple[str, ...], keys: Mapping[str, Any], key: str) -> bool:
        value = keys.get(key, False)
        if not isinstance(value, bool):
            message = f"{key!r} of parameter {path[-1]!r} must be true or false, not {kind_of(value)}"
            self.fail(message, *path, key, fix=f"write '{key}: true'", parameter=path[-1])
        return value is True

    def _separator(self, path: tuple[str, ...], keys: Mapping[str, Any], kind: ParameterType) -> str | None:
        for key in ("words", "separator"):
            if keys.get(key) and kind != "list":
                message = f"{key!r} of parameter {path[-1]!r} is ignored: it is for lists"
                self.warn(message, *path, key, fix="declare the parameter as list", parameter=path[-1])
        separator = keys.get("separator")
        if separator is None:
            return None
        if keys.get("words"):
            message = f"parameter {path[-1]!r} has 'words' and 'separator'; its items can't be both words and one word"
            self.fail(message, *path, "separator", fix="keep one of them", parameter=path[-1])
        elif isinstance(separator, dict | list | bool):
            message = f"'separator' of parameter {path[-1]!r} must be a text, not {kind_of(separator)}"
            self.fail(message, *path, "separator", fix="write separator: ','", parameter=path[-1])
        return str(separator) if kind == "list" else None

    def _option(self, path: tuple[str, ...], keys: Mapping[str, Any], name: str) -> str | None:
        value = keys.get("option")
        if value is None or value is False:
            return None
        option = f"--{name}" if value is True else value
        if not isinstance(option, str) or not _OPTION.fullmatch(option):
            message = f"'option' of parameter {name!r} must be an option such as --{name}, or true, not {value!r}"
            self.fail(message, *path, "option", parameter=name)
            return None
        return option

    def _is_secret(self, path: tuple[str, ...], content: Any) -> bool:
        given = content.get("secret", False) if isinstance(content, dict) else False
        if not isinstance(given, bool):
            # Rather hidden than shown by mistake.
            self.warn(
                f"'secret' of parameter {path[-1]!r} is {given!r}; it is taken as true",
                *path,
                "secret",
                fix="write 'secret: true'",
                parameter=path[-1],
            )
        return given is not False

    def _parameter_type(self, path: tuple[str, ...], declared: Any) -> ParameterType:
        if isinstance(declared, str) and declared in _TYPES:
            return _TYPES[declared]
        if str(declared) in self._unknown_types:
            # One warning per file: large files have the same word on each parameter.
            return "string"
        self._unknown_types.add(str(declared))
        near = nearest(str(declared), get_args(ParameterType))
        self.warn(
            f"parameter {path[-1]!r} has the unknown type {str(declared)!r}; it is treated as string",
            *path,
            "type",
            fix=f"did you mean {near!r}?" if near else f"the types are {', '.join(get_args(ParameterType))}",
            parameter=path[-1],
        )
        return "string"

    def _default_text(self, path: tuple[str, ...], default: Any) -> str | None:
        """Returns ``str`` of a default's YAML value, as MLflow substitutes it (0.10 is 0.1, true is True)."""
        if isinstance(default, dict | list) and not _is_small(default):
            message = f"the default of parameter {path[-1]!r} is too long a {kind_of(default)[2:]}"
            self.fail(message, *path, "default", fix="put it into a file")
            return None
        return None if default is None else str(default)


def _is_small(value: Any) -> bool:
    """Whether a nested value stays short when it is written out; aliases can make a few lines endless."""
    left, pending = _MAX_DEFAULT_VALUES, [value]
    while pending and left:
        left -= 1
        each = pending.pop()
        pending += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return not pending
