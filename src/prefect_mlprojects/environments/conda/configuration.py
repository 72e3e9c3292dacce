"""Conda's configuration: ``.condarc`` files and ``CONDA_*`` variables, as far as they select channels and packages.

See https://docs.conda.io/projects/conda/en/stable/user-guide/configuration/use-condarc.html.
"""

from __future__ import annotations

import contextlib
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import unquote

from prefect_mlprojects._support.files import list_directory
from prefect_mlprojects._support.redaction import redact, strip_user_info
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.exceptions import EnvironmentBuildError, InvalidEnvironmentError
from prefect_mlprojects.spec.yaml_lines import read_yaml

ChannelPriority: TypeAlias = Literal["strict", "flexible", "disabled"]

DEFAULT_CHANNELS = ("https://repo.anaconda.com/pkgs/main", "https://repo.anaconda.com/pkgs/r")  # conda's `defaults`
CHANNEL_ALIAS = "https://conda.anaconda.org"  # the base URL of a channel that is only a name

_LISTS = ("channels", "default_channels", "allowlist_channels", "denylist_channels")
_MAPPINGS = ("custom_channels", "custom_multichannels", "proxy_servers")
_OLD_NAMES = {"whitelist_channels": "allowlist_channels", "add_pip": "add_pip_as_python_dependency"}
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
_TRUE, _FALSE = ("true", "yes", "on", "1", "y"), ("false", "no", "off", "0", "n", "")
_BOOLEANS = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)
_PRIORITIES: dict[str, ChannelPriority] = {
    **{"strict": "strict", "flexible": "flexible", "disabled": "disabled"},
    **dict.fromkeys(_TRUE, "flexible"),
    **dict.fromkeys(_FALSE, "disabled"),
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class CondaConfiguration:
    """Conda's settings, with conda's names and defaults. URLs, proxies included, may hold passwords."""

    channels: tuple[str, ...] = field(default=(), repr=False)  # besides those of an environment file
    default_channels: tuple[str, ...] = field(default=DEFAULT_CHANNELS, repr=False)
    channel_alias: str = field(default=CHANNEL_ALIAS, repr=False)
    custom_channels: Mapping[str, str] = field(default_factory=dict, repr=False)
    custom_multichannels: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    allowlist_channels: tuple[str, ...] = field(default=(), repr=False)
    denylist_channels: tuple[str, ...] = field(default=(), repr=False)
    channel_priority: ChannelPriority = "flexible"
    ssl_verify: bool | str = True  # a text is a file of trusted certificates
    proxy_servers: Mapping[str, str] = field(default_factory=dict, repr=False)
    offline: bool = False
    subdir: str = ""
    add_pip_as_python_dependency: bool = True
    remote_max_retries: int = 3
    remote_read_timeout_secs: int | None = None  # None for no limit


_NAMES = frozenset(item.name for item in fields(CondaConfiguration))


def current_subdir() -> str:
    """Returns conda's name of this machine's platform, such as ``linux-64``."""
    system = {"linux": "linux", "darwin": "osx"}.get(sys.platform, sys.platform)
    machine = platform.machine().lower()
    return f"{system}-{ {'x86_64': '64', 'amd64': '64', 'i686': '32', 'i386': '32'}.get(machine, machine) }"


def expand_variables(text: str, environ: Mapping[str, str]) -> str:
    """Replaces ``${NAME}`` and ``$NAME`` by values of environment variables, as conda does; unknown ones stay."""
    return _VARIABLE.sub(lambda match: environ.get(match[1] or match[2], match[0]), text)


def _configuration_files(environ: Mapping[str, str]) -> Iterator[Path]:
    """Yields the files that conda reads, if they exist; later ones have precedence."""
    home = Path(environ.get("HOME") or "~").expanduser()
    root, base = environ.get("CONDA_ROOT"), environ.get("XDG_CONFIG_HOME")
    named_folders = (*([Path(root)] if root else ()), *([Path(base).expanduser() / "conda"] if base else ()))
    shared = (Path("/etc/conda"), Path("/var/lib/conda"))
    for folder in (*shared, *named_folders, home / ".config" / "conda", home / ".conda"):
        yield from _files_in(folder)
    yield home / ".condarc"
    if prefix := environ.get("CONDA_PREFIX"):
        yield from _files_in(Path(prefix))
    if named := environ.get("CONDARC"):
        yield Path(named).expanduser()


def _files_in(folder: Path) -> Iterator[Path]:
    yield from (folder / ".condarc", folder / "condarc")
    more = list_directory(folder / "condarc.d")
    yield from (Path(entry.path) for entry in more if entry.name.endswith((".yml", ".yaml", "condarc")))


def read_configuration(environ: Mapping[str, str]) -> CondaConfiguration:
    """Reads conda's configuration; raises an ``EnvironmentBuildError`` for a malformed file or an invalid value."""
    found = _Settings(environ)
    for file in filter(Path.is_file, _configuration_files(environ)):
        for name, value in _read_file(file).items():
            found.add(name, value, str(file))
    for variable, text in environ.items():
        if variable.startswith("CONDA_") and text:
            name = variable.removeprefix("CONDA_").lower()
            name = _OLD_NAMES.get(name, name)
            if name in _LISTS:
                items = [item.strip() for item in re.split(r"[,&]", text) if item.strip()]
                found.add(name, items, f"the environment variable {variable}")
            elif name in _NAMES and name not in _MAPPINGS:
                found.add(name, text, f"the environment variable {variable}")
    return CondaConfiguration(
        channels=found.texts("channels"),
        default_channels=found.texts("default_channels", DEFAULT_CHANNELS),
        channel_alias=found.text("channel_alias", CHANNEL_ALIAS).rstrip("/"),
        custom_channels=found.mapping("custom_channels"),
        custom_multichannels=found.multichannels(),
        allowlist_channels=found.texts("allowlist_channels"),
        denylist_channels=found.texts("denylist_channels"),
        channel_priority=found.choice("channel_priority", _PRIORITIES, "flexible", "strict, flexible or disabled"),
        ssl_verify=_BOOLEANS.get(found.text("ssl_verify", "true").lower(), found.text("ssl_verify", "")),
        proxy_servers={scheme: url for scheme, url in found.mapping("proxy_servers").items() if url},
        offline=found.choice("offline", _BOOLEANS, "false"),
        subdir=found.text("subdir", "") or current_subdir(),
        add_pip_as_python_dependency=found.choice("add_pip_as_python_dependency", _BOOLEANS, "true"),
        remote_max_retries=max(found.number("remote_max_retries", 3), 0),
        remote_read_timeout_secs=max(found.number("remote_read_timeout_secs", 0), 0) or None,
    )


def _read_file(file: Path) -> dict[str, Any]:
    document = read_yaml(file)
    content = {} if document.content is None else document.content
    problems = (*document.problems, *document.duplicates)
    problem = redact(str(problems[0])) if problems else ""
    if not isinstance(content, dict):
        problem = f"{file} must be a mapping, such as 'channels: [conda-forge]'."
    if problem:
        raise InvalidEnvironmentError(f"Conda's settings can't be read: {problem}", manager="conda")
    named = {_OLD_NAMES.get(name, name): value for name, value in content.items() if value is not None}
    return {name: value for name, value in named.items() if name in _NAMES}


class _Settings:
    """The configured values, with their origins for messages."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._values: dict[str, Any] = {}
        self._origins: dict[str, str] = {}

    def add(self, name: str, value: Any, origin: str) -> None:
        """Adds a value of higher precedence: lists and mappings are merged, others replaced."""
        old = self._values.get(name)
        self._values[name], self._origins[name] = value, origin
        if name in _LISTS:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise self.error(name, "a list of channels")
            self._values[name] = [*value, *(item for item in old or () if item not in value)]
        elif name in _MAPPINGS:
            if not isinstance(value, dict):
                raise self.error(name, "a mapping")
            self._values[name] = {**(old or {}), **value}

    def error(self, name: str, expected: str) -> EnvironmentBuildError:
        value = redact(repr(self._values[name]))
        message = f"Conda's setting {name} in {self._origins[name]} is {value}; it must be {expected}."
        return InvalidEnvironmentError(message, manager="conda")

    def _expand(self, value: Any) -> str:
        return expand_variables(str(value), self._environ)

    def texts(self, name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        return tuple(map(self._expand, self._values[name])) if name in self._values else default

    def text(self, name: str, default: str) -> str:
        return self._expand(self._values.get(name, default)).strip()

    def mapping(self, name: str) -> dict[str, str]:
        return {str(key): self._expand(value) for key, value in self._values.get(name, {}).items() if value is not None}

    def multichannels(self) -> dict[str, tuple[str, ...]]:
        name = "custom_multichannels"
        channels = self._values.get(name, {})
        if not all(isinstance(members, list) for members in channels.values()):
            raise self.error(name, "a mapping of names to lists of channels")
        return {str(key): tuple(map(self._expand, members)) for key, members in channels.items()}

    def number(self, name: str, default: int) -> int:
        try:
            return int(float(str(self._values.get(name, default))))
        except (ValueError, OverflowError):
            raise self.error(name, "a number") from None

    def choice(self, name: str, choices: Mapping[str, _T], default: str, expected: str = "true or false") -> _T:
        text = str(self._values.get(name, default)).strip().lower()
        if text not in choices:
            raise self.error(name, expected)
        return choices[text]


NO_DEFAULTS = "nodefaults"  # in a file's list of channels: the user's own channels are not added

_ANACONDA_NAMES = ("pkgs/main", "pkgs/r", "pkgs/msys2", "pkgs/pro", "pkgs/free")
_ANACONDA = "https://repo.anaconda.com"
_TOKEN = re.compile(r"/t/[^/]+(?=/|$)")
_SUBDIR = re.compile(r"/(noarch|(linux|osx|win|freebsd|emscripten|wasi|zos)-\w+)$")


def channel_urls(name: str, configuration: CondaConfiguration, base: Path) -> tuple[str, ...]:
    """Returns the URLs of a channel's name, URL or folder (relative to `base`), or of several channels' name."""
    name = name.strip().rstrip("/") or "/"
    if "://" in name:
        return (_SUBDIR.sub("", name),)
    if name.startswith((".", "/", "~")):
        return (_folder_url(name, base),)
    members = configuration.default_channels if name == "defaults" else configuration.custom_multichannels.get(name)
    if members is not None:
        return tuple(url for member in members if member != name for url in channel_urls(member, configuration, base))
    # The longest prefix of the name that has a URL of its own counts.
    segments = name.split("/")
    for length in range(len(segments), 0, -1):
        if (custom := configuration.custom_channels.get("/".join(segments[:length]))) is not None:
            url = custom if "://" in custom else _folder_url(custom, base)
            return (f"{url.rstrip('/')}/{name}",)
    return (f"{_ANACONDA if name in _ANACONDA_NAMES else configuration.channel_alias}/{name}",)


def local_folder(name: str, base: Path) -> Path | None:
    """Returns the folder or file of a channel or package that is one; None for a name or another URL."""
    if name.lower().startswith("file:"):
        return base / unquote(split_url(name).path)
    return base / Path(name).expanduser() if name.startswith((".", "/", "~")) else None


def _folder_url(folder: str, base: Path) -> str:
    return (base / Path(folder).expanduser()).resolve().as_uri()


def environment_channels(names: Iterable[str], configuration: CondaConfiguration, base: Path) -> tuple[str, ...]:
    """Returns the URLs of an environment's channels: the file's, the user's, or without any those of ``defaults``."""
    # Conda used to append ``defaults`` to every list, and now warns of that.
    wanted = [name for name in names if name != NO_DEFAULTS]
    if NO_DEFAULTS not in names:
        wanted += configuration.channels
    found = (url for name in wanted or ["defaults"] for url in channel_urls(name, configuration, base))
    unique = tuple(dict.fromkeys(found))
    for url in unique:
        if not split_url(url).scheme:
            raise InvalidEnvironmentError(f"The conda channel {public_url(url)!r} is no URL.", manager="conda")
        check_allowed(url, configuration, base)
    return unique


def check_allowed(url: str, configuration: CondaConfiguration, base: Path) -> None:
    """Raises an ``EnvironmentBuildError`` if conda's settings forbid a channel."""

    def listed(names: tuple[str, ...]) -> bool:
        return any(url in channel_urls(name, configuration, base) for name in names)

    denied = listed(configuration.denylist_channels)
    if denied or (configuration.allowlist_channels and not listed(configuration.allowlist_channels)):
        name = "denylist_channels" if denied else "allowlist_channels"
        raise EnvironmentBuildError(f"Conda's setting {name} forbids the channel {public_url(url)}.", manager="conda")


def split_channel(spec: str) -> tuple[str | None, str]:
    """Splits a dependency (``channel::package``) into its channel, if it has one, and the rest."""
    channel, separator, rest = spec.rpartition("::")
    if not separator or "[" in channel:
        return None, spec
    return channel.strip(), rest.strip()


def public_url(url: str) -> str:
    """Returns a channel's URL without passwords and tokens, for messages and cache keys."""
    return _TOKEN.sub("", strip_user_info(url))


def channel_credentials(urls: Iterable[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the URLs that hold credentials, and the content of the file that ``RATTLER_AUTH_FILE`` names."""
    found = [url for url in urls if public_url(url) != url]
    if file := environ.get("RATTLER_AUTH_FILE"):
        with contextlib.suppress(OSError):
            found.append(Path(file).read_text(encoding="utf-8", errors="replace"))
    return tuple(found)
