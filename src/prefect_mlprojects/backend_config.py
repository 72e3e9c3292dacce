"""A backend's configuration as users give it: a mapping, or a path to a JSON or YAML file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect_mlprojects.exceptions import BackendError


def load_backend_config(config: Mapping[str, Any] | str | Path | None, *, backend: str = "local") -> dict[str, Any]:
    """Returns the configuration as a mapping.

    Args:
        config: A mapping, the path of a ``.json``, ``.yaml`` or ``.yml`` file that holds one, or None.
        backend: The backend's name, for messages.

    Raises:
        BackendError: The file is missing, malformed or holds something else; or the text names no such file.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
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
    loaded = _parse(path, text, backend)
    if not isinstance(loaded, dict):
        raise BackendError(
            f"The backend configuration {path} must hold a mapping, not {type(loaded).__name__}.", backend=backend
        )
    return {str(key): value for key, value in loaded.items()}


def _parse(path: Path, text: str, backend: str) -> Any:
    if path.suffix == ".json":
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
