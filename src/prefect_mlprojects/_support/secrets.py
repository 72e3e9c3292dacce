"""The type of secrets, and the functions that reveal, find, replace and refuse them."""

from __future__ import annotations

import hmac
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

MASK = "***"


class Secret:
    """A text that must not be seen: a password, a token, a URL with user-info.

    It shows as ``***``, can't be pickled, and is refused by JSON, so that a leak is an error instead of a finding in a
    database. `reveal` returns the text; call it where the text leaves for an SDK or a child process, not before.

    As the type of a pydantic field it takes a ``str``, a ``SecretStr`` or a ``Secret``, and marks the field of a backend's
    configuration as one that must not be stored.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return f"Secret({MASK!r})"

    def __str__(self) -> str:
        return MASK

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __reduce__(self) -> NoReturn:
        raise TypeError("A secret can't be pickled.")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            cls._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(_refuse, when_used="json"),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"type": "string", "format": "password", "writeOnly": True}

    @classmethod
    def _validate(cls, value: Any) -> Secret:
        if isinstance(value, Secret):
            return value
        if _is_of_pydantic(value, "SecretStr"):
            return cls(value.get_secret_value())
        if isinstance(value, str):
            return cls(value)
        raise ValueError("must be a text")


def _is_of_pydantic(value: Any, name: str) -> bool:
    """Whether a value is of a class of pydantic, whose import would take longer than a short command: it is imported then."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(value, getattr(pydantic, name))


def _is_secret(value: Any) -> bool:
    return isinstance(value, Secret) or _is_of_pydantic(value, "SecretStr")


class Withheld(Secret):
    """A value that may be a secret, since nothing tells it from one: a short text under a plain name.

    ``run()`` keeps it in memory like a secret. `disclose` returns it as a plain value for whoever stores it on purpose.
    """

    __slots__ = ()


def _refuse(_secret: Secret) -> NoReturn:
    raise TypeError("A secret can't be serialised.")


def reveal(secret: Secret) -> str:
    """Returns the text of a secret, for an SDK call or a child process's environment."""
    return secret._value


def reveal_all(value: Any) -> Any:
    """Returns `value` with every secret in it revealed, in nested mappings and sequences too."""
    return _replace_secrets(value, lambda secret: secret._value)


def without_secrets(value: Any) -> Any:
    """Returns `value` with ``***`` in the place of every secret, for texts that people read."""
    return _replace_secrets(value, lambda _: MASK)


def disclose(value: Any) -> Any:
    """Returns `value` with every `Withheld` in it as plain text; secrets stay."""
    return _replace_secrets(value, lambda secret: secret._value if isinstance(secret, Withheld) else secret)


def _replace_secrets(value: Any, replacement: Callable[[Secret], Any]) -> Any:
    if _is_secret(value):
        return replacement(Secret._validate(value))
    if isinstance(value, Mapping):
        return {key: _replace_secrets(each, replacement) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_secrets(each, replacement) for each in value]
    return value


def reveal_values(values: Mapping[str, Secret | str]) -> dict[str, str]:
    """Returns variables as texts, for a child process's environment."""
    return {name: value._value if isinstance(value, Secret) else value for name, value in values.items()}


def has_secret(value: Any) -> bool:
    """Returns whether `value` is or holds a secret that is not empty."""
    return any(secrets_in(value))


def secrets_in(value: Any) -> list[Secret]:
    """Returns the secrets that `value` is or holds, in nested mappings, sequences and models too."""
    if _is_secret(value):
        return [Secret._validate(value)]
    if _is_of_pydantic(value, "BaseModel"):
        value = dict(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [found for each in value for found in secrets_in(each)]
    return []


def storable(value: Any, where: str = "value") -> Any:
    """Returns `value` as plain JSON data for Prefect's API; `where` names it in the error message.

    Raises:
        TypeError: `value` is or holds a secret, or something that JSON can't represent.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): storable(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [storable(each, f"{where}[{index}]") for index, each in enumerate(value)]
    kind = "a secret" if _is_secret(value) else type(value).__name__
    raise TypeError(f"{where} is {kind}, which can't be stored with a flow run.")
