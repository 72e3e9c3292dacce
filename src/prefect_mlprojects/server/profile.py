"""Reads the Prefect settings of this process without importing Prefect.

The precedence is that of ``prefect.settings.base.PrefectBaseSettings.settings_customise_sources`` (Prefect 3.8):
environment, ``.env``, ``prefect.toml``, ``[tool.prefect]`` of ``pyproject.toml``, the active profile.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROFILE = "mlprojects"
"""The Prefect profile that names the embedded server, for Prefect's own commands and clients."""

_published: set[str] = set()


def publish_in_process(api_url: str) -> None:
    """Makes the embedded server the Prefect API of this process, where nothing else is configured."""
    if "prefect.settings" in sys.modules and configured_api_url() is None:
        from prefect_mlprojects.server.compat import use_api_everywhere

        _published.add(api_url)
        use_api_everywhere(api_url)


def configured_api_url() -> str | None:
    """Returns the API's URL from the environment, a settings file or the active profile; None if it is not set.

    The address of the embedded server that we ourselves published, in this process or in the profile, does not count.
    """
    if "prefect.settings" in sys.modules:
        from prefect.context import get_settings_context
        from prefect.settings import PREFECT_API_URL

        context = get_settings_context()
        url = context.settings.api.url
        of_profile = context.profile.name == PROFILE and context.profile.settings.get(PREFECT_API_URL) == url
        ours = url in _published or (of_profile and os.environ.get("PREFECT_API_URL") != url)
        return None if ours else url
    return read_setting("PREFECT_API_URL", "api", "url")


def read_setting(variable: str, *keys: str) -> str | None:
    """Returns a Prefect setting from the environment, a settings file or the active profile; None if it is not set.

    Args:
        variable: The setting's environment variable, which is also its name in a profile.
        *keys: Path of the setting in ``prefect.toml`` and below ``[tool.prefect]``.
    """
    return (
        os.environ.get(variable)
        or _from_dotenv(variable)
        or _in(_read_toml(Path("prefect.toml")), *keys)
        or _in(_read_toml(Path("pyproject.toml")), "tool", "prefect", *keys)
        or _from_profile(variable)
        or None
    )


def _from_dotenv(variable: str) -> str | None:
    path = Path(".env")
    if not path.is_file():
        return None
    from dotenv import dotenv_values

    return dotenv_values(path).get(variable)


def _from_profile(variable: str) -> str | None:
    settings = _read_toml(_profiles_path())
    active = os.environ.get("PREFECT_PROFILE") or settings.get("active")
    # The profile of the embedded server is no choice of the user.
    return _in(settings, "profiles", str(active), variable) if active and active != PROFILE else None


def _profiles_path() -> Path:
    # As prefect.settings.sources._get_profiles_path.
    named = (
        os.environ.get("PREFECT_PROFILES_PATH")
        or _from_dotenv("PREFECT_PROFILES_PATH")
        or _in(_read_toml(Path("prefect.toml")), "profiles_path")
        or _in(_read_toml(Path("pyproject.toml")), "tool", "prefect", "profiles_path")
    )
    return Path(named or Path(os.environ.get("PREFECT_HOME") or "~/.prefect") / "profiles.toml").expanduser()


def _read_toml(path: Path) -> Mapping[str, Any]:
    """Reads a TOML file; a missing or malformed one counts as empty, and Prefect itself warns about it."""
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
    return str(settings) if isinstance(settings, str | bool) else None
