"""The JSON schema of an entry point's parameters, for forms and checks of deployments; and values as JSON. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from prefect_mlprojects._support.secrets import MASK
from prefect_mlprojects.spec.parameters import type_expectation
from prefect_mlprojects.spec.project import EntryPoint, ParameterType, ProjectParameter
from prefect_mlprojects.spec.secrets import REFERENCE_HELP, REFERENCE_PATTERN
from prefect_mlprojects.spec.values import limits_text, list_items, list_text, parse_bool, text_like, value_text


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
    if parameter.secret:
        # The form's values are stored: only a reference may be.
        about = f"{parameter.description.rstrip('.')}. " if parameter.description else ""
        reference = {"type": "string", "pattern": REFERENCE_PATTERN, "description": f"{about}secret: {REFERENCE_HELP}"}
        given = {} if value is None else {"default": str(value)}
        return {"title": parameter.name, "position": position, **reference, **given}
    text = parameter.default if value is None else value_text(parameter, value)
    default = None if text is None or (parameter.optional and not text) else form_value(parameter, text)
    schema = {**_TYPE_SCHEMAS[parameter.type], **_limits(parameter)}
    if parameter.is_plain_list or (isinstance(default, str) and schema["type"] not in ("string", "array")):
        # "inf", a number with more digits than JSON's readers keep, "[1, 2]": only as text it is kept.
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
    kind, limits = _TYPE_SCHEMAS[parameter.type]["description"], limits_text(parameter)
    shown = parameter.description or kind
    if parameter.description and ":" in kind:
        shown = f"{shown.rstrip('.')}. {kind}"
    found["description"] = f"{shown.rstrip('.')} ({limits})" if limits else shown
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
    "list": {"type": "array", "items": {"type": "string"}, "description": "list"},
}


def form_value(parameter: ProjectParameter, text: str) -> int | float | str | list[str]:
    """Returns a value as a deployment stores it; the text of a plain list if its items would not give it again."""
    in_brackets = (parameter.default or "").startswith("[")
    if parameter.secret or (parameter.is_plain_list and (in_brackets or list_text(list_items(text)) != text)):
        return text
    return typed_value(parameter.type, text)


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


def value_for_schema(schema: Mapping[str, Any], value: Any) -> Any:
    """Returns a caller's value as a parameter's JSON schema has it: ``yes`` as true for a boolean, 5 as text for a string."""
    kinds: dict[Any, ParameterType] = {
        "integer": "int",
        "number": "float",
        "boolean": "bool",
        "array": "list",
        "string": "string",
    }
    kind = kinds.get(schema.get("type"))
    if "anyOf" in schema and isinstance(value, list | tuple):
        return text_like(schema.get("default"), value)
    if kind is None or value is None:
        return value
    return typed_value(kind, list_text(value) if kind == "list" and isinstance(value, list | tuple) else str(value))


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
        elif _allowed(old_properties[name]) != _allowed(schema):
            changes.append(f"parameter '{name}' has other choices or limits")
        if name in new_required - old_required:
            changes.append(f"parameter '{name}' needs a value now")
    return tuple(changes)


def _kind(schema: Mapping[str, Any]) -> str:
    kinds = {"integer": "int", "number": "float", "boolean": "bool", "array": "list"}
    first = schema.get("anyOf", (schema,))[0]
    return str(schema.get("format") or kinds.get(str(first.get("type")), first.get("type")))


def _allowed(schema: Mapping[str, Any]) -> list[Any]:
    first = schema.get("anyOf", (schema,))[0]
    return [first.get("enum"), first.get("items"), first.get("minimum"), first.get("maximum")]


def describe_parameter(parameter: ProjectParameter) -> tuple[str, str, str]:
    """Returns a parameter's type with its choices and limits, its default, and its description, for people."""
    facts = [", ".join(parameter.choices), limits_text(parameter), "secret" if parameter.secret else ""]
    details = "; ".join(filter(None, facts))
    if parameter.optional and not parameter.default:
        default = "(optional)"
    elif parameter.secret and parameter.default:
        default = MASK
    else:
        default = "(required)" if parameter.default is None else json.dumps(parameter.default, ensure_ascii=False)
    return f"{parameter.type} ({details})" if details else parameter.type, default, parameter.description
