"""Which run options the form of a deployment has. Whoever may only start its runs can't set the others.

Prefect's server checks a run's parameters against the schema unless the caller asks it not to, so the run checks them again
(`flows.deployment_check`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect_mlprojects.exceptions import ParameterError
from prefect_mlprojects.request import options_of, unknown_options

ALL, NONE = "all", "none"


def default_form_options() -> tuple[str, ...]:
    """Returns the run options that a form has unless others are named: those that choose no other code, machine or server."""
    return tuple(option.name for option in options_of("form") if not option.restricted)


def parse_form_options(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the named run options in their usual order; ``all`` and ``none`` stand for themselves. Raises `ParameterError`."""
    wanted = {name for name in names if name != NONE}
    known = tuple(option.name for option in options_of("form"))
    if ALL in wanted:
        return known
    if problems := unknown_options(wanted, "form"):
        raise ParameterError("The deployment can't be created", problems)
    return tuple(name for name in known if name in wanted)


def form_options_of(schema: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Returns the run options that a deployment's form has; None for one that refuses nothing: of an older version, or not ours."""
    if schema is None or schema.get("additionalProperties") is not False:
        return None
    shown = schema.get("properties") or {}
    return tuple(option.name for option in options_of("form") if option.name in shown)


def narrow_form(schema: Mapping[str, Any], names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a form's schema with the named run options only.

    Of the others it accepts what the deployment itself has, `options`. Such a value is a pattern property, because the UI shows
    plain properties.
    """
    hidden = {option.name for option in options_of("form")} - set(names)
    return {
        **schema,
        "properties": {name: field for name, field in schema["properties"].items() if name not in hidden},
        "patternProperties": {f"^{name}$": {"const": options[name]} for name in sorted(hidden & options.keys())},
        "additionalProperties": False,
    }
