"""Secret parameters: how callers refer to their values, and the variables that carry them to the command."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prefect_mlprojects._support.redaction import redact_url
from prefect_mlprojects._support.secrets import MASK

BLOCK_SCHEME = "block://secret/"
"""``block://secret/NAME`` refers to a Secret block of Prefect."""
VARIABLE_SCHEME = "env://"
"""``env://NAME`` refers to an environment variable of the process that runs the project."""

REFERENCE_PATTERN = r"^(block://secret/[^/\s]+|env://[A-Za-z_]\w*|\{\{secrets/[^/}\s]+/[^}\s]+\}\})$"
REFERENCE_HELP = "block://secret/NAME (a Secret block of Prefect) or env://NAME (a variable where it runs)"
_REFERENCE = re.compile(REFERENCE_PATTERN)
_DATABRICKS_REFERENCE = re.compile(r"\{\{secrets/([^/}\s]+/[^}\s]+)\}\}")
_PREFIX = "MLPROJECTS_PARAM_"


def is_reference(text: str) -> bool:
    """Returns whether a secret parameter's value is a reference, which may be stored."""
    return _REFERENCE.match(text) is not None


def databricks_place(text: str) -> str | None:
    """Returns ``scope/key`` of a reference to a Databricks secret, ``{{secrets/scope/key}}``; None for other texts."""
    match = _DATABRICKS_REFERENCE.fullmatch(text)
    return match[1] if match else None


def shown_value(text: str, *, declared: bool) -> str:
    """Returns what people see of a secret parameter: of a URL all but its secrets, else ``***``, or a reference."""
    if declared:
        return text if is_reference(text) else MASK
    shown = redact_url(text)
    return shown if shown != text else MASK


def variables_for(names: Iterable[str]) -> dict[str, str]:
    """Returns the environment variable for each secret parameter; no two are the same."""
    variables: dict[str, str] = {}
    for name in names:
        variable = _PREFIX + re.sub(r"[^A-Z0-9_]", "_", name.upper())
        while variable in variables.values():
            variable += "_"
        variables[name] = variable
    return variables
