"""Checks what users write as a backend's configuration against its pydantic model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import BackendError

_Model = TypeVar("_Model", bound=BaseModel)


def parse_config(model: type[_Model], config: Mapping[str, Any], *, backend: str) -> _Model:
    """Returns the configuration as a value of its model.

    Args:
        model: The model; it forbids extra keys.
        config: What the user wrote.
        backend: The backend's name, for the message.

    Raises:
        BackendError: A key is unknown (the nearest is named) or a value is not of its kind; all of them at once.
    """
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        problems = "; ".join(_describe(model, dict(detail)) for detail in error.errors())
        # From None: pydantic's own error shows the values, which may be secret.
        raise BackendError(
            f"The configuration of the {backend} backend does not fit: {problems}", backend=backend
        ) from None


def _describe(model: type[BaseModel], detail: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        return f"{key}: {detail['msg']}" if key else str(detail["msg"])
    known = [field.alias or name for name, field in model.model_fields.items()]
    near = nearest(key, known)
    return f"unknown key {key!r} " + (f"(did you mean {near!r}?)" if near else f"(known: {', '.join(known)})")
