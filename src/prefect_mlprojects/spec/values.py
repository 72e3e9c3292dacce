"""Values of parameters as text: what a caller, a form or a file gives, what is allowed, and what the command gets. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from prefect_mlprojects.spec.project import ProjectParameter

_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "y", "on", "1", "t"), "True"),
    **dict.fromkeys(("false", "no", "n", "off", "0", "f"), "False"),
}
_SPELLINGS = (("true", "false"), ("yes", "no"), ("on", "off"), ("1", "0"), ("y", "n"), ("t", "f"))
BOOLEANS = "true or false (yes, no, on, off, 1 and 0 are understood)"


def parse_bool(text: str) -> bool | None:
    """Returns the truth value that a text means; None if it means none."""
    known = _BOOLEANS.get(text.strip().lower())
    return None if known is None else known == "True"


def list_items(text: str) -> tuple[str, ...]:
    """Returns the items of a list's text: a JSON array, or items with commas between them."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list):
            return tuple(map(_item_text, found))
    return tuple(each.strip() for each in text.split(",")) if text.strip() else ()


def list_text(items: Iterable[Any]) -> str:
    """Returns the text of a list, from which `list_items` returns its items: with commas where that is enough, else JSON."""
    texts = [_item_text(each) for each in items]
    plain = ",".join(texts)
    return plain if list_items(plain) == tuple(texts) else json.dumps(texts, ensure_ascii=False)


def _item_text(item: Any) -> str:
    return item if isinstance(item, str) else json.dumps(item) if isinstance(item, list | dict) else str(item)


def value_text(parameter: ProjectParameter | None, value: Any) -> str:
    """Returns a caller's value as text: by ``str``, as in MLflow; a sequence for a list parameter as its list's text."""
    if parameter is None or parameter.type != "list" or not isinstance(value, list | tuple):
        return str(value)
    return text_like(parameter.default, value) if parameter.is_plain_list else list_text(value)


def text_like(default: Any, items: Iterable[Any]) -> str:
    """Returns the text of a plain list, written as its default is: ``a,b``, or in brackets as JSON or Python have it."""
    if not isinstance(default, str) or not default.startswith("["):
        return list_text(items)
    return str(list(items)) if "'" in default else json.dumps(list(items), ensure_ascii=False)


def normalised(parameter: ProjectParameter, text: str) -> str:
    """Returns a valid text as the command gets it: a bool as ``True`` or ``False``, as ``mlflow run`` writes YAML's booleans.

    An author's default stays as it is written; where it is a text such as ``no``, a caller's bool is written in the same way.
    """
    if text == parameter.default:
        return text
    if parameter.type == "bool":
        return _bool_text(text, parameter.default)
    return list_text(list_items(text)) if parameter.type == "list" and not parameter.is_plain_list else text


def _bool_text(text: str, default: str | None) -> str:
    value = parse_bool(text)
    if value is None:
        return text
    spellings = (tuple(map(change, pair)) for pair in _SPELLINGS for change in (str.title, str.lower, str.upper))
    true, false = next((pair for pair in spellings if default in pair), ("True", "False"))
    return true if value else false


def may_be_written_otherwise(parameter: ProjectParameter | None, text: str) -> bool:
    """Whether a text is a number that a program may write in another way: 5 as 5.0, 1e-5 as 1e-05."""
    try:
        number = float(text)
    except ValueError:
        return False
    if parameter is not None and parameter.type == "int":
        return not text.lstrip("-").isdigit() or text != str(int(text))
    return text != repr(number)


def constraint(parameter: ProjectParameter, text: str) -> str | None:
    """Returns what was expected if a text of the right type breaks the parameter's choices or limits; else None."""
    texts = list_items(text) if parameter.type == "list" else (text,)
    if parameter.choices and not all(_is_choice(parameter, each) for each in texts):
        return f"one of {', '.join(parameter.choices)}"
    if parameter.minimum is None and parameter.maximum is None:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    low, high = parameter.minimum, parameter.maximum
    if math.isnan(number) or (low is not None and number < low) or (high is not None and number > high):
        return f"a number {limits_text(parameter)}"
    return None


def _is_choice(parameter: ProjectParameter, text: str) -> bool:
    if parameter.type == "bool":
        return parse_bool(text) in map(parse_bool, parameter.choices)
    if parameter.type in ("int", "float") and text not in parameter.choices:
        return float(text) in map(float, parameter.choices)
    return text in parameter.choices


def limits_text(parameter: ProjectParameter) -> str:
    """Returns a number's limits in words; empty if it has none."""
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None:
        return f"from {low} to {high}"
    return f"of at least {low}" if low is not None else f"of at most {high}" if high is not None else ""
