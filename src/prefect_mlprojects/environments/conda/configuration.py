"""How the user has set conda up: ``.condarc`` files and ``CONDA_*`` variables.

See https://docs.conda.io/projects/conda/en/stable/user-guide/configuration/use-condarc.html. Read is what decides where
packages come from and which of them are chosen; what only conda's own commands need is passed over.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.spec.yaml_lines import read_yaml

ChannelPriority: TypeAlias = Literal["strict", "flexible", "disabled"]

DEFAULT_CHANNELS = ("https://repo.anaconda.com/pkgs/main", "https://repo.anaconda.com/pkgs/r")
"""What conda means by ``defaults``."""

CHANNEL_ALIAS = "https://conda.anaconda.org"
"""Where conda looks for a channel that is only a name."""

_LISTS = ("channels", "default_channels", "allowlist_channels", "denylist_channels")
_MAPPINGS = ("custom_channels", "custom_multichannels", "proxy_servers")
_VALUES = (
    *("channel_alias", "channel_priority", "ssl_verify", "offline", "subdir", "add_pip_as_python_dependency"),
    *("remote_max_retries", "remote_read_timeout_secs"),
)
_OLD_NAMES = {"whitelist_channels": "allowlist_channels", "add_pip": "add_pip_as_python_dependency"}
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
_TRUE = frozenset(("true", "yes", "on", "1", "y"))
_FALSE = frozenset(("false", "no", "off", "0", "n", ""))


@dataclass(frozen=True)
class CondaConfiguration:
    """Conda's settings, as far as they matter here.

    Attributes:
        channels: The channels the user wants besides those of an environment file, most wanted first.
        default_channels: What ``defaults`` stands for.
        channel_alias: Where a channel lies that is only a name.
        custom_channels: Where channels of certain names lie: the name is appended to the URL.
        custom_multichannels: What certain names stand for.
        allowlist_channels: The only channels that may be used; empty for all.
        denylist_channels: Channels that must not be used.
        channel_priority: Whether a package may come from another channel than the first that has it.
        ssl_verify: Whether the certificates of servers are checked, or the file of those to trust.
        proxy_servers: Proxies by scheme.
        offline: Whether nothing may be fetched.
        subdir: The platform, such as ``linux-64``.
        add_pip_as_python_dependency: Whether every Python brings pip.
        max_retries: How often a request is tried again.
        timeout: Seconds that a server may take to answer; None for no limit.
    """

    channels: tuple[str, ...] = ()
    default_channels: tuple[str, ...] = DEFAULT_CHANNELS
    channel_alias: str = CHANNEL_ALIAS
    custom_channels: Mapping[str, str] = field(default_factory=dict)
    custom_multichannels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    allowlist_channels: tuple[str, ...] = ()
    denylist_channels: tuple[str, ...] = ()
    channel_priority: ChannelPriority = "flexible"
    ssl_verify: bool | str = True
    proxy_servers: Mapping[str, str] = field(default_factory=dict, repr=False)
    offline: bool = False
    subdir: str = ""
    add_pip_as_python_dependency: bool = True
    max_retries: int = 3
    timeout: int | None = None


def current_subdir() -> str:
    """Conda's name of this machine's platform, such as ``linux-64``."""
    system = {"linux": "linux", "darwin": "osx"}.get(sys.platform, sys.platform)
    machine = platform.machine().lower()
    return f"{system}-{ {'x86_64': '64', 'amd64': '64', 'i686': '32', 'i386': '32'}.get(machine, machine) }"


def expand_variables(text: str, environ: Mapping[str, str]) -> str:
    """Replaces ``${NAME}`` and ``$NAME`` by values of environment variables, as conda does; unknown ones stay."""
    return _VARIABLE.sub(lambda match: environ.get(match[1] or match[2], match[0]), text)


def configuration_files(environ: Mapping[str, str]) -> Iterator[Path]:
    """The files that conda reads, later ones outdo earlier ones; not all of them need be there."""
    home = Path(environ.get("HOME") or "~").expanduser()
    folders = [Path("/etc/conda"), Path("/var/lib/conda")]
    if root := environ.get("CONDA_ROOT"):
        folders.append(Path(root))
    if base := environ.get("XDG_CONFIG_HOME"):
        folders.append(Path(base).expanduser() / "conda")
    folders += [home / ".config" / "conda", home / ".conda"]
    for folder in folders:
        yield from _files_in(folder)
    yield home / ".condarc"
    if prefix := environ.get("CONDA_PREFIX"):
        yield from _files_in(Path(prefix))
    if named := environ.get("CONDARC"):
        yield Path(named).expanduser()


def _files_in(folder: Path) -> Iterator[Path]:
    yield from (folder / ".condarc", folder / "condarc")
    try:
        more = sorted(entry.name for entry in os.scandir(folder / "condarc.d"))
    except OSError:
        return
    yield from (folder / "condarc.d" / name for name in more if name.endswith((".yml", ".yaml", "condarc")))


def read_configuration(environ: Mapping[str, str]) -> CondaConfiguration:
    """Reads conda's settings.

    Returns:
        The settings, with conda's own defaults.

    Raises:
        EnvironmentBuildError: A file is malformed, or a setting has a value that it can't have.
    """
    found: dict[str, _Setting] = {}
    for file in configuration_files(environ):
        if file.is_file():
            for name, value in _read_file(file).items():
                _merge(found, name, _Setting(value, str(file)))
    for name, value in environ.items():
        if name.startswith("CONDA_") and value:
            key = name[len("CONDA_") :].lower()
            key = _OLD_NAMES.get(key, key)
            if key in _LISTS:
                items = [item.strip() for item in re.split(r"[,&]", value) if item.strip()]
                _merge(found, key, _Setting(items, f"the environment variable {name}"))
            elif key in _VALUES:
                _merge(found, key, _Setting(value, f"the environment variable {name}"))
    return _make(found, environ)


@dataclass(frozen=True)
class _Setting:
    value: Any
    place: str

    def error(self, name: str, expected: str) -> EnvironmentBuildError:
        return EnvironmentBuildError(
            f"Conda's setting {name} in {self.place} is {self.value!r}; it must be {expected}.", manager="conda"
        )


def _read_file(file: Path) -> dict[str, Any]:
    document = read_yaml(file)
    if document.problems:
        raise EnvironmentBuildError(f"Conda's settings can't be read: {document.problems[0]}", manager="conda")
    content = {} if document.content is None else document.content
    if not isinstance(content, dict):
        raise EnvironmentBuildError(
            f"Conda's settings can't be read: {file} must be a mapping, such as 'channels: [conda-forge]'.",
            manager="conda",
        )
    return {
        _OLD_NAMES.get(name, name): value
        for name, value in content.items()
        if _OLD_NAMES.get(name, name) in (*_LISTS, *_MAPPINGS, *_VALUES) and value is not None
    }


def _merge(found: dict[str, _Setting], name: str, new: _Setting) -> None:
    """Joins lists, the newer first, and mappings; other values are replaced."""
    old = found.get(name)
    if name in _LISTS:
        if not isinstance(new.value, list) or not all(isinstance(item, str) for item in new.value):
            raise new.error(name, "a list of channels")
        before = old.value if old is not None else []
        new = _Setting([*new.value, *(item for item in before if item not in new.value)], new.place)
    elif name in _MAPPINGS:
        if not isinstance(new.value, dict):
            raise new.error(name, "a mapping")
        new = _Setting({**(old.value if old is not None else {}), **new.value}, new.place)
    found[name] = new


def _make(found: Mapping[str, _Setting], environ: Mapping[str, str]) -> CondaConfiguration:
    def texts(name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        setting = found.get(name)
        return default if setting is None else tuple(expand_variables(item, environ) for item in setting.value)

    def text(name: str, default: str) -> str:
        setting = found.get(name)
        return default if setting is None else expand_variables(str(setting.value), environ)

    def mapping(name: str) -> dict[str, Any]:
        return found[name].value if name in found else {}

    def number(name: str, default: int) -> int:
        setting = found.get(name)
        try:
            return default if setting is None else int(float(str(setting.value)))
        except (ValueError, OverflowError):
            assert setting is not None
            raise setting.error(name, "a number") from None

    multichannels: dict[str, tuple[str, ...]] = {}
    for name, members in mapping("custom_multichannels").items():
        if not isinstance(members, list):
            raise found["custom_multichannels"].error("custom_multichannels", "a mapping of names to lists of channels")
        multichannels[str(name)] = tuple(expand_variables(str(member), environ) for member in members)
    timeout = number("remote_read_timeout_secs", 0)
    return CondaConfiguration(
        texts("channels"),
        texts("default_channels", DEFAULT_CHANNELS),
        text("channel_alias", CHANNEL_ALIAS).rstrip("/"),
        {str(name): expand_variables(str(url), environ) for name, url in mapping("custom_channels").items()},
        multichannels,
        texts("allowlist_channels"),
        texts("denylist_channels"),
        _priority(found),
        _ssl_verify(found, environ),
        {str(scheme): expand_variables(str(url), environ) for scheme, url in mapping("proxy_servers").items() if url},
        _flag(found, "offline", default=False),
        text("subdir", "") or current_subdir(),
        _flag(found, "add_pip_as_python_dependency", default=True),
        max(number("remote_max_retries", 3), 0),
        timeout if timeout > 0 else None,
    )


def _priority(found: Mapping[str, _Setting]) -> ChannelPriority:
    setting = found.get("channel_priority")
    if setting is None:
        return "flexible"
    text = str(setting.value).strip().lower()
    for name in get_args(ChannelPriority):
        if text == name:
            chosen: ChannelPriority = name
            return chosen
    if text in _TRUE:
        return "flexible"
    if text in _FALSE:
        return "disabled"
    raise setting.error("channel_priority", "strict, flexible or disabled")


def _flag(found: Mapping[str, _Setting], name: str, *, default: bool) -> bool:
    setting = found.get(name)
    if setting is None:
        return default
    text = str(setting.value).strip().lower()
    if text not in _TRUE and text not in _FALSE:
        raise setting.error(name, "true or false")
    return text in _TRUE


def _ssl_verify(found: Mapping[str, _Setting], environ: Mapping[str, str]) -> bool | str:
    setting = found.get("ssl_verify")
    if setting is None:
        return True
    text = expand_variables(str(setting.value).strip(), environ)
    if text.lower() in _TRUE:
        return True
    return False if text.lower() in _FALSE else text


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
