"""Which Prefect API this process is configured for, read as Prefect reads its settings but without importing Prefect.

The order is that of ``prefect.settings.base.PrefectBaseSettings.settings_customise_sources`` (Prefect 3.8):
environment, ``.env``, ``prefect.toml``, ``[tool.prefect]`` of ``pyproject.toml``, the active profile.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def configured_api_url() -> str | None:
    """Returns the API address that the environment, a settings file or the active profile names; None when none does."""
    if "prefect.settings" in sys.modules:
        from prefect.settings import get_current_settings

        return get_current_settings().api.url
    for value in (
        os.environ.get("PREFECT_API_URL"),
        _from_dotenv(Path(".env")),
        _in(_read_toml(Path("prefect.toml")), "api", "url"),
        _in(_read_toml(Path("pyproject.toml")), "tool", "prefect", "api", "url"),
        _from_profile(),
    ):
        if value:
            return value
    return None


def _from_dotenv(path: Path) -> str | None:
    if not path.is_file():
        return None
    from dotenv import dotenv_values

    return dotenv_values(path).get("PREFECT_API_URL")


def _from_profile() -> str | None:
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    settings = _read_toml(Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser())
    active = os.environ.get("PREFECT_PROFILE") or settings.get("active")
    return _in(settings, "profiles", str(active), "PREFECT_API_URL") if active else None


def _read_toml(path: Path) -> Mapping[str, Any]:
    """Reads a TOML file; one that is missing or malformed says nothing (Prefect itself warns of it)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    # tomllib came with Python 3.11; Prefect brings `toml` for older ones.
    library = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "toml")
    try:
        parsed: Mapping[str, Any] = library.loads(text)
    except ValueError:
        return {}
    return parsed


def _in(settings: Any, *keys: str) -> str | None:
    for key in keys:
        if not isinstance(settings, Mapping):
            return None
        settings = settings.get(key)
    return settings if isinstance(settings, str) else None
