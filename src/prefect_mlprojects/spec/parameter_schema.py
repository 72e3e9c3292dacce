"""The form of a deployment: an OpenAPI schema of the flow's parameters, typed as the MLproject declares its own.

Prefect's UI draws the form from it, and the server checks every flow run's parameters against it
(https://docs.prefect.io/v3/how-to-guides/deployments/store-flow-code). Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from typing_extensions import assert_never

from prefect_mlprojects.spec.project import EntryPoint, ParameterType, ProjectParameter


def parameters_schema(entry_point: EntryPoint, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of an entry point's parameters; `values` are shown in place of the project's defaults."""
    declared = entry_point.parameters
    required = [name for name, parameter in declared.items() if parameter.required]
    return {
        "type": "object",
        "properties": {
            name: _property(parameter, place, values.get(name))
            for place, (name, parameter) in enumerate(declared.items())
        },
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _property(parameter: ProjectParameter, place: int, value: Any) -> dict[str, Any]:
    text = parameter.default if value is None else str(value)
    default = None if text is None else typed_value(parameter.type, text)
    schema = _type_schema(parameter.type)
    if isinstance(default, str) and schema["type"] != "string":
        # "inf", or a number with more digits than JSON's readers keep: only text holds it.
        schema = {"anyOf": [schema, {"type": "string"}], "description": schema["description"]}
    shown = {"title": parameter.name, "position": place, **schema}
    return shown if default is None else {**shown, "default": default}


def _type_schema(kind: ParameterType) -> dict[str, Any]:
    match kind:
        case "int":
            return {"type": "integer", "description": "int"}
        case "float":
            return {"type": "number", "description": "float"}
        case "string":
            return {"type": "string", "description": "string"}
        case "path":
            words = "path: a file or folder where it runs, or a remote URI"
            return {"type": "string", "format": "path", "description": words}
        case "uri":
            pattern = r"^[A-Za-z][A-Za-z0-9+.\-]*:"
            return {"type": "string", "format": "uri", "pattern": pattern, "description": "uri: with a scheme"}
        case _:
            assert_never(kind)


def typed_value(kind: ParameterType, text: str) -> int | float | str:
    """Returns a value as JSON's type for it, or as text where that would change it (``inf``, very long numbers)."""
    if kind == "int" and abs(whole := int(text)) <= 2**53:
        return whole
    if kind == "float":
        number = float(text)
        if math.isfinite(number) and (float(repr(number)) == number):
            return int(text) if text.lstrip("+-").isdigit() and abs(number) <= 2**53 else number
    return text


def schema_changes(old: Mapping[str, Any], entry_point: EntryPoint) -> tuple[str, ...]:
    """Says how an entry point's parameters differ from those that a deployment was made with.

    Returns:
        A sentence for each difference; empty when there is none or the schema is of another making.
    """
    before = old.get("properties", {}).get("parameters", {})
    if not isinstance(before, Mapping) or not isinstance(before.get("properties"), Mapping):
        return ()
    now = parameters_schema(entry_point, {})
    old_required, new_required = set(before.get("required", ())), set(now.get("required", ()))
    old_properties, new_properties = before["properties"], now["properties"]
    changes = [f"parameter '{name}' is gone" for name in old_properties if name not in new_properties]
    for name, facts in new_properties.items():
        kind = entry_point.parameters[name].type
        if name not in old_properties:
            changes.append(
                f"parameter '{name}' ({kind}) is new" + (" and needs a value" if name in new_required else "")
            )
            continue
        if _kind(old_properties[name]) != _kind(facts):
            changes.append(f"parameter '{name}' was {_kind(old_properties[name])} and is {kind}")
        if name in new_required - old_required:
            changes.append(f"parameter '{name}' needs a value now")
    return tuple(changes)


def _kind(facts: Mapping[str, Any]) -> str:
    kinds = {"integer": "int", "number": "float"}
    alternatives: Iterable[Mapping[str, Any]] = facts.get("anyOf", (facts,))
    first = next(iter(alternatives))
    return str(facts.get("format") or kinds.get(str(first.get("type")), first.get("type")))
