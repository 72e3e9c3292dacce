"""What the API answers when it refuses, and the checks of requests that lead there."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from typing import Any


class Refusal(Exception):
    """An error answer: https://docs.databricks.com/api/workspace/introduction, "Errors"."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


def invalid(message: str) -> Refusal:
    """What is wrong with a value of a request."""
    return Refusal(400, "INVALID_PARAMETER_VALUE", message)


def missing(message: str) -> Refusal:
    """What does not exist."""
    return Refusal(404, "RESOURCE_DOES_NOT_EXIST", message)


def no_endpoint(method: str, path: str) -> Refusal:
    """The answer to a wrong path."""
    return Refusal(404, "ENDPOINT_NOT_FOUND", f"No API found for '{method} {path}'")


def only(values: Mapping[str, Any], known: Collection[str], required: Collection[str] = ()) -> None:
    """Refuses parameters that the endpoint does not know, and asks for those that it needs."""
    unknown = sorted(set(values) - set(known) - set(required))
    if unknown:
        raise Refusal(400, "MALFORMED_REQUEST", f"Unknown fields in the request: {', '.join(unknown)}")
    for name in required:
        if values.get(name) in (None, ""):
            raise invalid(f"Missing required field: {name}")


def number(values: Mapping[str, Any], name: str, default: int, highest: int) -> int:
    """A number among the parameters of a request."""
    try:
        value = int(values.get(name, default))
    except ValueError:
        raise invalid(f"{name} must be a number.") from None
    if not 0 <= value <= highest:
        raise invalid(f"{name} must be between 0 and {highest}.")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def check(value: Any, kind: Any, where: str) -> None:
    """Refuses a value that is not of a type; of the SDK's dataclasses, their fields and enumerations are known."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (origin in (typing.Union, types.UnionType) and value is None and type(None) in arguments):
        return
    if origin in (typing.Union, types.UnionType):
        check(value, next(each for each in arguments if each is not type(None)), where)
    elif origin is list:
        _expect(isinstance(value, list), where, "a list")
        for position, item in enumerate(value):
            check(item, arguments[0], f"{where}[{position}]")
    elif origin is dict:
        _expect(isinstance(value, dict), where, "an object")
        for name, item in value.items():
            check(item, arguments[1], f"{where}.{name}")
    elif is_dataclass(kind):
        assert isinstance(kind, type)
        _check_fields(value, kind, where)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        words = [each.value for each in kind]
        if value not in words:
            raise Refusal(400, "MALFORMED_REQUEST", f"{where}: {value!r} is not one of {', '.join(words)}")
    elif isinstance(kind, type):
        right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        _expect(right or (kind is float and isinstance(value, int)), where, kind.__name__)


def _check_fields(value: Any, kind: type, where: str) -> None:
    _expect(isinstance(value, dict), where, "an object")
    unknown = sorted(set(value) - set(_hints(kind)))
    if unknown:
        raise Refusal(400, "MALFORMED_REQUEST", f"Could not parse request object: {where} has no {unknown[0]!r}")
    for name, item in value.items():
        check(item, _hints(kind)[name], f"{where}.{name}")


def _expect(right: bool, where: str, kind: str) -> None:
    if not right:
        raise Refusal(400, "MALFORMED_REQUEST", f"Could not parse request object: expected {where} to be {kind}")
