"""Checks the values of a call against what an entry point declares."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from typing_extensions import assert_never

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.spec.arguments import adapt_template, command_values
from prefect_mlprojects.spec.project import EntryPoint, ParameterType, ProjectParameter
from prefect_mlprojects.spec.template import CommandTemplate, is_plain, parse_template
from prefect_mlprojects.spec.values import BOOLEANS, constraint, list_items, normalised, parse_bool, value_text

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_SHOWN_CHARACTERS = 100
# Higher than difflib's 0.6, since undeclared parameters are legal.
_TYPO_SIMILARITY = 0.75


@dataclass(frozen=True)
class CheckedParameters:
    """The valid values of a call, as text by parameter name.

    Attributes:
        declared: Values of declared parameters, with defaults, and with local paths absolute.
        extra: Values of undeclared parameters, in the order given.
        downloads: URIs of ``path`` parameters that must be downloaded first.
    """

    declared: Mapping[str, str]
    extra: Mapping[str, str] = field(default_factory=dict)
    downloads: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = ()

    def with_downloads(self, local_paths: Mapping[str, str]) -> CheckedParameters:
        """Returns a copy with the paths of downloaded parameters."""
        left = {name: uri for name, uri in self.downloads.items() if name not in local_paths}
        return dataclasses.replace(self, declared={**self.declared, **local_paths}, downloads=left)


def check_parameters(
    entry_point: EntryPoint, values: Mapping[str, Any] | None, project: Path | None = None
) -> CheckedParameters:
    """Checks the values of a call without any network request.

    None counts as not given. Relative paths are relative to the working directory, as in MLflow, except for a default that exists
    in the folder `project`. Values become text by ``str``, as in MLflow, and are never rounded or normalised. A default that is
    not of its numeric type is allowed, as in MLflow; the parser warns of it.

    Raises:
        ParameterError: Values are missing, not of their type, or impossible in a command line; all of them at once.
    """
    given = {
        str(name): value_text(entry_point.parameters.get(str(name)), value)
        for name, value in (values or {}).items()
        if value is not None
    }
    problems: list[Problem] = []
    declared: dict[str, str] = {}
    downloads: dict[str, str] = {}
    for parameter in entry_point.parameters.values():
        text = given.get(parameter.name, parameter.default)
        if project is not None and text == parameter.default and is_relative_default(parameter):
            text = in_project(project, parameter) or text
        if parameter.optional and not text:
            continue
        if text is None:
            problems.append(_missing(parameter, given, entry_point))
            continue
        expected = _expectation(parameter.type, text) or constraint(parameter, text)
        is_lenient_default = text == parameter.default and parameter.type not in {"path", "uri"}
        if expected is not None and not (is_lenient_default and not _unusable(parameter.name, text)):
            problems.append(_ill_typed(parameter, text, expected, is_default=parameter.name not in given))
            continue
        local = _local_path(text) if parameter.type == "path" else normalised(parameter, text)
        declared[parameter.name] = text if local is None else local
        if local is None:
            downloads[parameter.name] = text
    extra = {name: text for name, text in given.items() if name not in entry_point.parameters}
    problems += [problem for name, text in extra.items() if (problem := _unusable(name, text)) is not None]
    known = {name: text for name, text in declared.items() if name not in downloads}
    template = adapt_template(parse_template(entry_point.command), entry_point, known)
    problems += place_problems(template, command_values(entry_point, known), extra)
    if problems:
        raise ParameterError(f"Parameters of entry point '{entry_point.name}' do not fit", problems)
    return CheckedParameters(declared, extra, downloads, _typo_warnings(entry_point, given))


def is_relative_default(parameter: ProjectParameter) -> bool:
    """Whether a ``path`` parameter's default is a relative local path."""
    default = parameter.default if parameter.type == "path" else None
    parts = _split(default) if default and not os.path.isabs(default) else None  # noqa: PTH117 - any text is taken
    return parts is not None and not parts.scheme


def in_project(project: Path, parameter: ProjectParameter) -> str | None:
    """Returns the absolute path of a relative default in the project; None if it does not exist there."""
    path = os.path.normpath(os.path.join(project, parameter.default or ""))  # noqa: PTH118 - any text is taken
    exists = os.path.exists(path) and Path(path).resolve().is_relative_to(project.resolve())  # noqa: PTH110 - as above
    return path if exists else None


def _local_path(text: str) -> str | None:
    """Returns the absolute local path of a ``path`` value, which need not exist; None for a remote one.

    As in MLflow, a path without a scheme, or with ``file:`` and no host, is local.
    """
    parts = _split(text)
    # abspath, as in MLflow: it removes "a/..", which Path.absolute leaves in.
    if parts is not None and not parts.scheme:
        return os.path.abspath(text)  # noqa: PTH100
    if parts is not None and parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return os.path.abspath(unquote(parts.path))  # noqa: PTH100
    return None


def type_expectation(kind: ParameterType, text: str) -> str | None:
    """Returns what was expected if a text can't be of a type, whatever files exist; else None."""
    if "\0" in text:
        return "a value without NUL characters"
    if not _can_be_passed(text):
        return "text that can be encoded in UTF-8"
    match kind:
        case "string" | "choice":
            return None
        case "bool":
            return None if parse_bool(text) is not None else BOOLEANS
        case "list":
            return None if all(map(_can_be_passed, list_items(text))) else "a list of texts"
        case "int":
            return None if _INT.fullmatch(text) else "a whole number"
        case "float":
            return None if _FLOAT.fullmatch(text) else "a number"
        case "uri":
            parts = _split(text)
            return None if parts is not None and parts.scheme else "a URI with a scheme, such as s3://bucket/key,"
        case "path":
            return None if text and _split(text) is not None else "a path or a URI"
        case _:
            assert_never(kind)


def _expectation(kind: ParameterType, text: str) -> str | None:
    expected = type_expectation(kind, text)
    if expected is None and kind == "path":
        local = _local_path(text)
        if local is not None and not os.path.exists(local):  # noqa: PTH110 - Path.exists raises for names that are too long
            return "a file or folder that exists, or a remote URI,"
    return expected


def _split(text: str) -> SplitResult | None:
    """Returns a URI's parts; None if it is malformed, such as one with an unclosed IPv6 address."""
    try:
        return urlsplit(text)
    except ValueError:
        return None


def _can_be_passed(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _missing(parameter: ProjectParameter, given: Mapping[str, str], entry_point: EntryPoint) -> Problem:
    near = nearest(parameter.name, [name for name in given if name not in entry_point.parameters])
    return Problem(
        f"parameter '{parameter.name}' ({parameter.type}) needs a value",
        fix=f"did you mean it when you wrote {near!r}?" if near else f"give {parameter.name}=VALUE",
        parameter=parameter.name,
    )


def _ill_typed(parameter: ProjectParameter, text: str, expected: str, *, is_default: bool) -> Problem:
    shown, noun = _shorten(text), "default" if is_default else "value"
    relative = parameter.type == "path" and text and not os.path.isabs(text)  # noqa: PTH117 - any text is taken
    return Problem(
        f"parameter '{parameter.name}' ({parameter.type}) has the {noun} {shown!r}, but {expected} was expected",
        fix=f"relative paths are relative to the working directory, {os.getcwd()}" if relative else None,  # noqa: PTH109
        parameter=parameter.name,
        value=shown,
    )


def _unusable(name: str, text: str) -> Problem | None:
    if not name:
        message = "a parameter without a name can't be passed on a command line"
    elif "\0" in name or "\0" in text:
        message = f"parameter {name!r} can't be passed on a command line: it contains a NUL character"
    elif not _can_be_passed(name + text):
        message = f"parameter {name!r} can't be passed on a command line: it can't be encoded in UTF-8"
    else:
        return None
    return Problem(message, parameter=name, value=_shorten(text))


def place_problems(
    template: CommandTemplate, declared: Mapping[str, str], extra: Mapping[str, str]
) -> tuple[Problem, ...]:
    """Returns the values that can't be quoted at their placeholders (see :mod:`prefect_mlprojects.spec.template`)."""
    names = {each.name for each in template.placeholders if each.place == "unquotable"}
    found = {name: text for name, text in declared.items() if name in names and not is_plain(text)}
    if template.end != "word":
        found |= {name: text for name, text in extra.items() if not (is_plain(name) and is_plain(text))}
    return tuple(
        Problem(
            f"parameter '{name}' has the value {_shorten(text)!r}, which can't be quoted at its place in the command "
            "(in backquotes, a here-document, a comment, arithmetic, a subscript or ${…}, or after a backslash or a $)",
            fix="give a value of letters, digits and @%+=:,./- only, or put it elsewhere in the command",
            parameter=name,
            value=_shorten(text),
        )
        for name, text in found.items()
    )


def _typo_warnings(entry_point: EntryPoint, given: Mapping[str, str]) -> tuple[Problem, ...]:
    """Warns of undeclared parameters that look like a declared one that was not given."""
    missing = [name for name in entry_point.parameters if name not in given]
    message = "parameter {!r} is not declared and is passed on as it is"
    return tuple(
        Problem(message.format(name), fix=f"did you mean {near!r}?", parameter=name, value=_shorten(text))
        for name, text in given.items()
        if name not in entry_point.parameters and (near := nearest(name, missing, cutoff=_TYPO_SIMILARITY))
    )


def parameters_schema(entry_point: EntryPoint, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema of an entry point's parameters; `values` replace the project's defaults."""
    declared = entry_point.parameters
    properties = {
        name: _property(parameter, position, values.get(name))
        for position, (name, parameter) in enumerate(declared.items())
    }
    required = [name for name, parameter in declared.items() if parameter.required]
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _property(parameter: ProjectParameter, position: int, value: Any) -> dict[str, Any]:
    text = parameter.default if value is None else value_text(parameter, value)
    default = None if text is None or (parameter.optional and not text) else typed_value(parameter.type, text)
    schema = {**_TYPE_SCHEMAS[parameter.type], **_limits(parameter)}
    if isinstance(default, str) and schema["type"] not in ("string", "array"):
        # "inf", or a number with more digits than JSON's readers keep: only as text it is kept.
        schema = {"anyOf": [schema, {"type": "string"}], "description": schema["description"]}
    shown = {"title": parameter.name, "position": position, **schema}
    return shown if default is None else {**shown, "default": default}


def _limits(parameter: ProjectParameter) -> dict[str, Any]:
    """Returns the part of a parameter's JSON schema that its own keys add to its type's."""
    found: dict[str, Any] = {"minimum": parameter.minimum, "maximum": parameter.maximum}
    if parameter.choices:
        choices = [typed_value(parameter.type, each) for each in parameter.choices]
        found |= (
            {"items": {"type": "string", "enum": list(parameter.choices)}}
            if parameter.type == "list"
            else {"enum": choices}
        )
    if parameter.description:
        kind = _TYPE_SCHEMAS[parameter.type]["description"]
        found["description"] = f"{parameter.description.rstrip('.')}. {kind}" if ":" in kind else parameter.description
    return {key: value for key, value in found.items() if value is not None}


_PATH_DESCRIPTION = "path: a file or folder where it runs, or a remote URI"
_URI_PATTERN = r"^[A-Za-z][A-Za-z0-9+.\-]*:"
_TYPE_SCHEMAS: Mapping[ParameterType, dict[str, Any]] = {
    "int": {"type": "integer", "description": "int"},
    "float": {"type": "number", "description": "float"},
    "string": {"type": "string", "description": "string"},
    "path": {"type": "string", "format": "path", "description": _PATH_DESCRIPTION},
    "uri": {"type": "string", "format": "uri", "pattern": _URI_PATTERN, "description": "uri: with a scheme"},
    "bool": {"type": "boolean", "description": "bool"},
    "choice": {"type": "string", "description": "choice"},
    "list": {"type": "array", "items": {"type": "string"}, "description": "list: of texts"},
}


def typed_value(kind: ParameterType, text: str) -> int | float | str | list[str]:
    """Returns a value as its JSON type, or as text if that would change it (``inf``, very long numbers)."""
    if type_expectation(kind, text) is not None:
        return text
    if kind == "bool":
        return bool(parse_bool(text))
    if kind == "list":
        return list(list_items(text))
    if kind == "int" and abs(integer := int(text)) <= 2**53:
        return integer
    if kind == "float":
        number = float(text)
        if math.isfinite(number) and (float(repr(number)) == number):
            return int(text) if text.lstrip("+-").isdigit() and abs(number) <= 2**53 else number
    return text


def schema_changes(old: Mapping[str, Any], entry_point: EntryPoint) -> tuple[str, ...]:
    """Returns a sentence for each difference of an entry point to a deployment's schema; empty for a foreign schema."""
    before = old.get("properties", {}).get("parameters", {})
    if not isinstance(before, Mapping) or not isinstance(before.get("properties"), Mapping):
        return ()
    now = parameters_schema(entry_point, {})
    old_required, new_required = set(before.get("required", ())), set(now.get("required", ()))
    old_properties, new_properties = before["properties"], now["properties"]
    changes = [f"parameter '{name}' was removed" for name in old_properties if name not in new_properties]
    for name, schema in new_properties.items():
        kind = entry_point.parameters[name].type
        if name not in old_properties:
            need = " and needs a value" if name in new_required else ""
            changes.append(f"parameter '{name}' ({kind}) is new{need}")
            continue
        if (old_kind := _kind(old_properties[name])) != _kind(schema):
            changes.append(f"parameter '{name}' was {old_kind} and is {kind}")
        if name in new_required - old_required:
            changes.append(f"parameter '{name}' needs a value now")
    return tuple(changes)


def _kind(schema: Mapping[str, Any]) -> str:
    kinds = {"integer": "int", "number": "float", "boolean": "bool", "array": "list"}
    first = schema.get("anyOf", (schema,))[0]
    return str(schema.get("format") or kinds.get(str(first.get("type")), first.get("type")))
