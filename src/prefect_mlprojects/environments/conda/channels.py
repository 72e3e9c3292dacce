"""Where the channels lie that conda files and settings name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.environments.conda.configuration import CondaConfiguration
from prefect_mlprojects.exceptions import EnvironmentBuildError

NO_DEFAULTS = "nodefaults"
"""In a file's list of channels: the user's own channels are not added."""

_ANACONDA_NAMES = ("pkgs/main", "pkgs/r", "pkgs/msys2", "pkgs/pro", "pkgs/free")
_ANACONDA = "https://repo.anaconda.com"
_TOKEN = re.compile(r"/t/[^/]+(?=/|$)")
_SUBDIR = re.compile(r"/(noarch|(linux|osx|win|freebsd|emscripten|wasi|zos)-\w+)$")


def channel_urls(name: str, configuration: CondaConfiguration, base: Path) -> tuple[str, ...]:
    """Finds where a channel lies, as conda does.

    Args:
        name: A channel's name, URL or folder, or the name of several channels, such as ``defaults``.
        configuration: Conda's settings.
        base: The folder that relative folders are relative to.

    Returns:
        The channels' URLs, without a slash at the end.
    """
    name = name.strip().rstrip("/") or "/"
    if "://" in name:
        return (_SUBDIR.sub("", name),)
    if name.startswith((".", "/", "~")):
        return ((base / Path(name).expanduser()).resolve().as_uri(),)
    members = configuration.default_channels if name == "defaults" else configuration.custom_multichannels.get(name)
    if members is not None:
        return tuple(url for member in members if member != name for url in channel_urls(member, configuration, base))
    # The longest beginning of the name that has a place of its own counts.
    parts = name.split("/")
    for length in range(len(parts), 0, -1):
        place = configuration.custom_channels.get("/".join(parts[:length]))
        if place is not None:
            if "://" not in place:
                place = (base / Path(place).expanduser()).resolve().as_uri()
            return (f"{place.rstrip('/')}/{name}",)
    if name in _ANACONDA_NAMES:
        return (f"{_ANACONDA}/{name}",)
    return (f"{configuration.channel_alias}/{name}",)


def environment_channels(names: Iterable[str], configuration: CondaConfiguration, base: Path) -> tuple[str, ...]:
    """The channels of an environment: the file's, then the user's own, and only without any the ``defaults``.

    Conda used to add ``defaults`` to every list, and warns of that now; here it comes only where it is named, or where
    nothing else is.

    Returns:
        URLs, each once.

    Raises:
        EnvironmentBuildError: The settings forbid one of them.
    """
    wanted = [name for name in names if name != NO_DEFAULTS]
    if NO_DEFAULTS not in names:
        wanted += configuration.channels
    found = [url for name in wanted or ["defaults"] for url in channel_urls(name, configuration, base)]
    unique = tuple(dict.fromkeys(found))
    for url in unique:
        check_allowed(url, configuration, base)
    return unique


def check_allowed(url: str, configuration: CondaConfiguration, base: Path) -> None:
    """Makes sure that conda's settings allow a channel.

    Raises:
        EnvironmentBuildError: They forbid it.
    """

    def listed(names: tuple[str, ...]) -> bool:
        return any(url in channel_urls(name, configuration, base) for name in names)

    denied = listed(configuration.denylist_channels)
    if denied or (configuration.allowlist_channels and not listed(configuration.allowlist_channels)):
        name = "denylist_channels" if denied else "allowlist_channels"
        raise EnvironmentBuildError(
            f"Conda's setting {name} forbids the channel {public_url(url)}.",
            manager="conda",
        )


def split_channel(spec: str) -> tuple[str | None, str]:
    """Takes the channel off a dependency (``channel::package``).

    Returns:
        The channel, or None when it names none, and the rest.
    """
    channel, separator, rest = spec.rpartition("::")
    if not separator or "[" in channel:
        return None, spec
    return channel.strip(), rest.strip()


def public_url(url: str) -> str:
    """A channel's URL without passwords and tokens, for messages and keys."""
    return _TOKEN.sub("", strip_user_info(url))
