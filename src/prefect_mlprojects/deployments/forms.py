"""The form of a deployment: a JSON schema of the flow's parameters that Prefect's UI shows and its server enforces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect_mlprojects.runs.request import options_of
from prefect_mlprojects.spec import EntryPoint
from prefect_mlprojects.spec.parameters import parameters_schema


def deployment_schema(
    uri: str,
    entry_point: EntryPoint,
    values: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the schema of the flow's parameters for one entry point of one project.

    Args:
        uri: The project.
        entry_point: The entry point.
        values: Values that the deployment gives parameters, shown in the form in place of the project's defaults.
        options: Run options that the deployment sets, shown likewise.
    """
    values, options = values or {}, options or {}
    fields: dict[str, dict[str, Any]] = {
        "parameters": {"title": f"Parameters of {entry_point.name}", **parameters_schema(entry_point, values)},
        "extra_parameters": {
            "title": "Extra parameters",
            "description": "Further parameters by name, appended to the command as --name value.",
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "integer", "boolean"]},
            "default": {name: value for name, value in values.items() if name not in entry_point.parameters},
        },
        **{option.name: option.json_schema(options.get(option.name)) for option in options_of("form")},
        "uri": {"title": "Project", "type": "string", "enum": [uri], "default": uri},
        "entry_point": {
            "title": "Entry point",
            "type": "string",
            "enum": [entry_point.name],
            "default": entry_point.name,
        },
    }
    needs_values = any(each.required for each in entry_point.parameters.values())
    return {
        "title": "Parameters",
        "type": "object",
        "properties": {name: {"position": place, **field} for place, (name, field) in enumerate(fields.items())},
        "required": ["uri", *(["parameters"] if needs_values else [])],
        "definitions": {},
    }
