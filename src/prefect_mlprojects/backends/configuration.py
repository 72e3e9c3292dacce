"""A backend's configuration as users give it: a mapping, a path to a JSON or YAML file, or a JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect_mlprojects.exceptions import BackendError

SECRET_KEYS = ("credentials", "kubeconfig", "docker-engine")
"""Keys of backend configurations whose values may be secret when they are written out."""

_BLOCK_REFERENCE = re.compile(r"[a-z0-9][a-z0-9-]*/[^/]+")


def is_block_reference(text: str) -> bool:
    """Tells whether a text names a block (``block-type/block-name``) and not a file.

    Args:
        text: What a user gave as a backend's configuration.
    """
    return (
        _BLOCK_REFERENCE.fullmatch(text) is not None
        and not text.endswith((".json", ".yaml", ".yml"))
        and not Path(text).exists()
    )


def load_backend_config(config: Mapping[str, Any] | str | Path | None, *, backend: str = "local") -> dict[str, Any]:
    """Returns the configuration as a mapping.

    Args:
        config: A mapping, the path of a ``.json``, ``.yaml`` or ``.yml`` file that holds one, a JSON text, or None.
        backend: The backend's name, for messages.

    Raises:
        BackendError: The file is missing, malformed or holds something else; or the text names no such file.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str) and config.lstrip().startswith("{"):
        return _as_mapping(_parse("the backend configuration", ".json", config, backend), "The text", backend)
    path = Path(config).expanduser()
    if path.suffix not in {".json", ".yaml", ".yml"}:
        raise BackendError(
            f"The backend configuration {str(config)!r} is neither a mapping nor a .json, .yaml or .yml file.",
            backend=backend,
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BackendError(
            f"The backend configuration {path} can't be read: {error.strerror or error}.", backend=backend
        ) from None
    except UnicodeDecodeError:
        raise BackendError(f"The backend configuration {path} is not a text file in UTF-8.", backend=backend) from None
    return _as_mapping(_parse(str(path), path.suffix, text, backend), f"The file {path}", backend)


def _as_mapping(loaded: Any, what: str, backend: str) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise BackendError(
            f"{what} of the backend configuration must hold a mapping, not {type(loaded).__name__}.", backend=backend
        )
    return {str(key): value for key, value in loaded.items()}


def _parse(path: str, kind: str, text: str, backend: str) -> Any:
    if kind == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise BackendError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.", backend=backend) from None
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BackendError(f"{path}{line}: not valid YAML: {error.problem}.", backend=backend) from None
    except yaml.YAMLError as error:
        raise BackendError(f"{path}: not valid YAML: {error}.", backend=backend) from None


def split_secrets(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides a configuration into what may be stored with a flow run and what must stay in memory.

    Args:
        config: The configuration.

    Returns:
        What may be stored, and the values of ``SECRET_KEYS`` that are more than the name of a block or the path of a file.
    """
    secret = {name: value for name, value in config.items() if name in SECRET_KEYS and value and not _is_name(value)}
    return {name: value for name, value in config.items() if name not in secret}, secret


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and "\n" not in value and not value.lstrip().startswith("{")
