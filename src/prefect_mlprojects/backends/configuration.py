"""A backend's configuration as users give it: a mapping, a path to a JSON or YAML file, or a JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prefect_mlprojects._support.documents import decode, load_json, load_yaml, read_limited
from prefect_mlprojects._support.secrets import has_secret, storable, without_secrets
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import BackendError

_Model = TypeVar("_Model", bound=BaseModel)

_BLOCK_REFERENCE = re.compile(r"[a-z0-9][a-z0-9-]*/[^/]+")


def is_block_reference(text: str) -> bool:
    """Returns whether a user's text names a block (``block-type/block-name``) and not a file."""
    return (
        _BLOCK_REFERENCE.fullmatch(text) is not None
        and not text.endswith((".json", ".yaml", ".yml"))
        and not Path(text).exists()
    )


def load_backend_config(config: Mapping[str, Any] | str | Path | None, *, backend: str = "local") -> dict[str, Any]:
    """Returns a mapping from a mapping, the path of a ``.json``, ``.yaml`` or ``.yml`` file, a JSON text, or None.

    Raises `BackendError` if the file is missing, malformed or holds something else, or the text names no such file.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str) and config.lstrip().startswith("{"):
        return _as_mapping(_parse("the backend configuration", ".json", config, backend), "The text", backend)
    path = Path(config).expanduser()
    if path.suffix not in {".json", ".yaml", ".yml"}:
        message = f"The backend configuration {str(config)!r} is neither a mapping nor a .json, .yaml or .yml file."
        raise BackendError(message, backend=backend)
    try:
        text = decode(read_limited(path))
    except OSError as error:
        message = f"The backend configuration {path} can't be read: {error.strerror or error}."
        raise BackendError(message, backend=backend) from None
    except UnicodeDecodeError:
        raise BackendError(f"The backend configuration {path} is not a text file in UTF-8.", backend=backend) from None
    return _as_mapping(_parse(str(path), path.suffix, text, backend), f"The file {path}", backend)


def _as_mapping(loaded: Any, what: str, backend: str) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        message = f"{what} of the backend configuration must hold a mapping, not {type(loaded).__name__}."
        raise BackendError(message, backend=backend)
    return {str(key): value for key, value in loaded.items()}


def _parse(path: str, kind: str, text: str, backend: str) -> Any:
    if kind == ".json":
        try:
            return load_json(text)
        except json.JSONDecodeError as error:
            raise BackendError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.", backend=backend) from None
    import yaml

    try:
        documents = load_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BackendError(f"{path}{line}: not valid YAML: {error.problem}.", backend=backend) from None
    except yaml.YAMLError as error:
        raise BackendError(f"{path}: not valid YAML: {error}.", backend=backend) from None
    if len(documents) > 1:
        raise BackendError(f"{path}: the file has more than one document.", backend=backend)
    return documents[0] if documents else None


def parse_config(model: type[_Model], config: Mapping[str, Any], *, backend: str) -> _Model:
    """Returns a configuration as a value of its model.

    Raises `BackendError` for unknown keys (the nearest is named) and values of the wrong type; all at once.
    """
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        problems = "; ".join(_describe(model, dict(detail)) for detail in error.errors())
        # From None: pydantic's own error quotes the values, which may be secret.
        message = f"The configuration of the {backend} backend is not valid: {problems}"
        raise BackendError(message, backend=backend) from None


def _describe(model: type[BaseModel], detail: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        return f"{key}: {detail['msg']}" if key else str(detail["msg"])
    known = [field.alias or name for name, field in model.model_fields.items()]
    near = nearest(key, known)
    return f"unknown key {key!r} " + (f"(did you mean {near!r}?)" if near else f"(known: {', '.join(known)})")


def dump_config(config: BaseModel) -> dict[str, Any]:
    """Returns what was set in a configuration, by the names that users write; secrets stay `Secret`."""
    return config.model_dump(by_alias=True, exclude_unset=True, exclude_none=True)


def split_config(config: BaseModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides a configuration into plain JSON data, which may be stored with a flow run, and the keys that hold secrets.

    The former has them too, with ``***`` in the place of each secret.
    """
    values = dump_config(config)
    secret = {name: value for name, value in values.items() if has_secret(value)}
    return {name: storable(without_secrets(value), name) for name, value in values.items()}, secret
