"""Solves and installs conda environments in this process with py-rattler, and writes their lock files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlunsplit

import rattler
from rattler.exceptions import GatewayError, SolverError
from rattler.install import InstallerReporter
from rattler.lock import LockChannel, LockPlatform

from prefect_mlprojects._support.files import write_private
from prefect_mlprojects._support.process_folders import private_folder
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.environments import Build
from prefect_mlprojects.environments.activation import read_json
from prefect_mlprojects.environments.cache import Report, stopped_error
from prefect_mlprojects.environments.conda import CondaSpecification
from prefect_mlprojects.environments.conda.configuration import (
    CondaConfiguration,
    channel_credentials,
    public_url,
    split_channel,
)
from prefect_mlprojects.environments.python.files import digest_credentials, digest_text
from prefect_mlprojects.types import StopSignal

_T = TypeVar("_T")
_REPORT_SECONDS = 2.0
_URL = re.compile(r"(?:https?|s3|gcs|oci|file)://[^\s'\"]+")


def install_conda_packages(build: Build, specification: CondaSpecification) -> tuple[rattler.RepoDataRecord, ...]:
    """Solves and installs; an error names the channel that can't be reached, or has the solver's explanation."""
    access = take_credentials(specification.channels)
    with credentials_file(access, os.environ) as credentials:
        return _run_until_stopped(lambda: _Solving(build, specification, access).run(credentials), build.stop)


@dataclass(frozen=True)
class _Solving:
    build: Build
    specification: CondaSpecification
    access: ChannelAccess

    async def run(self, credentials: str | None) -> tuple[rattler.RepoDataRecord, ...]:
        configuration, build = self.specification.configuration, self.build
        with self._failing(f"conda's setting subdir is {configuration.subdir!r}, which is no platform"):
            platform = rattler.Subdir(configuration.subdir)
        self._warn_of_certificates()
        with self._failing("conda's network settings are invalid"):
            client = _make_client(configuration, credentials)
        packages, indexes = self._caches(build.cache)
        source = rattler.SourceConfig(cache_action="force-cache-only" if configuration.offline else "cache-or-fetch")
        gateway = rattler.Gateway(cache_dir=indexes, default_config=source, client=client)
        platforms = [platform, rattler.Subdir("noarch")]
        has_pip = await self._fetch_channels(gateway, platforms)
        add_pip = has_pip and configuration.add_pip_as_python_dependency
        records = await self._solve(gateway, platforms, add_pip=add_pip)
        build.report(f"Installing {len(records)} conda packages")
        with self._failing("a package could not be installed"):
            await rattler.install(
                records,
                build.location,
                cache_dir=packages,
                platform=platform,
                execute_link_scripts=True,  # as conda does
                show_progress=False,
                client=client,
                reporter=_Progress(build.report, len(records)),  # type: ignore[abstract]  # its bodies are defaults
            )
        return tuple(records)

    def _caches(self, cache: Path) -> tuple[Path, Path]:
        """Returns the folders of downloaded packages and of channels' indexes.

        The index of a private channel is not given to somebody with other credentials for it, or none; and what the library writes
        is only for this user where `take_credentials` had to leave a secret in a URL.
        """
        folder, channels = _package_cache(cache), self.specification.channels
        credentials = channel_credentials(channels, os.environ)
        if not credentials:
            return folder / "pkgs", folder / "repodata"
        (digest,) = digest_credentials(credentials)
        private = cache / "conda" / "private" / digest_text([digest])
        private.mkdir(parents=True, exist_ok=True, mode=0o700)
        private.chmod(0o700)
        clean = all(public_url(url) == url for url in map(self.access.url, channels))
        return (folder if clean else private) / "pkgs", private / "repodata"

    @contextlib.contextmanager
    def _failing(self, cause: str) -> Iterator[None]:
        """Converts any error of the library, whose errors have no common type and may hold passwords of URLs."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - see above
            raise self.build.failure(f"{cause}: {_error_text(error)}") from None

    def _warn_of_certificates(self) -> None:
        """Warns because the library reads a certificates file from a variable only, which we must not change."""
        file = self.specification.configuration.ssl_verify
        if isinstance(file, str) and os.environ.get("SSL_CERT_FILE") != file:
            advice = (
                "set the environment variable SSL_CERT_FILE to it too, else the machine's own certificates are used"
            )
            self.build.report(f"Warning: conda's setting ssl_verify names {file}; {advice}")

    async def _fetch_channels(self, gateway: rattler.Gateway, platforms: list[rattler.Subdir]) -> bool:
        """Fetches each channel's index, so that an unreachable one is named; returns whether any has pip."""
        found = False
        for url in self.specification.channels:
            self.build.report(f"Asking the channel {public_url(url)}")
            try:
                channel = rattler.Channel(self.access.url(url))
                packages = await gateway.query([channel], platforms, ["pip"], recursive=False)
            except GatewayError as error:
                advice = (
                    "Conda's setting offline is on, and this machine has no copy of its index."
                    if self.specification.configuration.offline
                    else "Is its address right, and can this machine reach it?"
                )
                cause = f"the channel {public_url(url)} can't be reached. {advice}\nIt said: {_error_text(error)}"
                raise self.build.failure(cause) from None
            found = found or any(packages)
        return found

    async def _solve(
        self, gateway: rattler.Gateway, platforms: list[rattler.Subdir], *, add_pip: bool
    ) -> list[rattler.RepoDataRecord]:
        specification, failure = self.specification, self.build.failure
        listed = ", ".join(_redacted(spec.text) for spec in specification.specs)
        self.build.report(f"Solving for {listed or 'nothing'}")
        strict, disabled = rattler.ChannelPriority.Strict, rattler.ChannelPriority.Disabled
        with self._failing("this machine's virtual packages can't be detected"):
            virtual = rattler.VirtualPackage.detect(rattler.VirtualPackageOverrides.from_env())
        # Conda's flexible priority takes from another channel only what the first does not have.
        orders = {"strict": [strict], "disabled": [disabled], "flexible": [strict, disabled]}
        for order in (chosen := orders[specification.configuration.channel_priority]):
            try:
                return await rattler.solve(
                    [rattler.Channel(self.access.url(url)) for url in specification.channels],
                    [rattler.MatchSpec(_with_channel(spec.match, self.access)) for spec in specification.specs],
                    gateway=gateway,
                    platforms=platforms,
                    virtual_packages=virtual,
                    channel_priority=order,
                    add_pip_as_python_dependency=add_pip,
                )
            except SolverError as error:
                if order is chosen[-1]:
                    channels = ", ".join(public_url(url) for url in specification.channels)
                    lines = [f"\n  {line}" for line in _redacted(str(error)).strip().splitlines() if line.strip()]
                    cause = f"no set of packages fits {specification.file.file} in the channels {channels}."
                    raise failure(cause + "".join(lines)) from None
            except GatewayError as error:
                raise failure(f"a channel could not be read: {_error_text(error)}") from None
        raise AssertionError("the last order returns or raises")


def _package_cache(cache: Path) -> Path:
    """Returns the folder of downloaded packages and indexes (``RATTLER_CACHE_DIR``, else in our cache)."""
    named = os.environ.get("RATTLER_CACHE_DIR", "").strip()
    return Path(named).expanduser() if named else cache / "conda"


def _redacted(text: str) -> str:
    """Redacts secrets and all tokens of channels, also those further in a path."""
    return redact(_URL.sub(lambda match: public_url(match[0]), text))


def _error_text(error: BaseException) -> str:
    return _redacted(" ".join(str(error).split())) or type(error).__name__


def _with_channel(match: str, access: ChannelAccess) -> str:
    channel, rest = split_channel(match)
    return match if channel is None else f"{access.url(channel)}::{rest}"


def _run_until_stopped(make: Callable[[], Awaitable[_T]], stop: StopSignal) -> _T:
    async def main() -> _T:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(make())

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the loop may just have been closed
                loop.call_soon_threadsafe(task.cancel)

        forget = stop.on_request(cancel)
        try:
            return await task
        except asyncio.CancelledError:
            if stop.requested:
                raise stopped_error("conda", stop) from None
            raise
        finally:
            forget()

    return asyncio.run(main())


def _make_client(configuration: CondaConfiguration, credentials: str | None) -> rattler.Client:
    """Creates a client with conda's network settings; rattler itself reads RATTLER_AUTH_FILE, keyring and netrc."""
    verify, proxies = configuration.ssl_verify, configuration.proxy_servers
    lines = ["tls-no-verify = true"] if verify is False else [] if verify is True else ['tls-root-certs = "system"']
    if credentials is not None:
        lines.append(f"authentication-override-file = {json.dumps(credentials)}")
    if proxies:
        lines.append("[proxy-config]")
        lines += [f"{scheme} = {json.dumps(proxies[scheme])}" for scheme in ("http", "https") if scheme in proxies]
    settings = rattler.Config.from_toml("\n".join(lines))
    retries, timeout = configuration.remote_max_retries, configuration.remote_read_timeout_secs
    return rattler.Client.from_config(settings, max_retries=retries, timeout=timeout)


class _Progress(InstallerReporter):
    """Reports downloads and the progress of the installation; called from the library's threads."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total = report, total
        self._installed = 0
        self._names: list[str] = []
        self._last = time.monotonic()

    def on_populate_cache_start(self, operation: int, package_name: str) -> int:  # noqa: ARG002 - the protocol's
        self._names.append(package_name)
        return len(self._names) - 1

    def on_download_start(self, cache_entry: int) -> int:
        self._report(f"Downloading {self._names[cache_entry]}")
        return cache_entry

    def on_download_progress(self, download_idx: int, progress: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._last > _REPORT_SECONDS:
            self._last = now
            of = f" of {total:,}" if total else ""
            self._report(f"Downloading {self._names[download_idx]}: {progress:,}{of} bytes")

    def on_link_start(self, operation: int, package_name: str) -> int:  # noqa: ARG002 - the protocol's
        self._installed += 1
        self._report(f"Installing {package_name} ({self._installed} of {self._total})")
        return self._installed

    def on_post_link_complete(self, index: int, success: bool) -> None:  # noqa: ARG002 - the protocol's
        if not success:
            self._report("Warning: a package's post-link script failed")


_TOKEN_PATH = re.compile(r"^/t/(?P<token>[^/]+)(?P<rest>/.*)?$")


@dataclass(frozen=True)
class ChannelAccess:
    """The channels' URLs without credentials, by the original ones, and the credentials of each host for rattler."""

    urls: Mapping[str, str] = field(default_factory=dict, repr=False)
    credentials: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def url(self, given: str) -> str:
        """Returns the URL to use instead of a channel's."""
        return self.urls.get(given, given)


def take_credentials(urls: Iterable[str]) -> ChannelAccess:
    """Removes user names, passwords and tokens from URLs, except a host's second one and tokens further in the path."""
    clean: dict[str, str] = {}
    credentials: dict[str, Mapping[str, Any]] = {}
    for url in urls:
        split = split_url(url)
        token = _TOKEN_PATH.match(split.path)
        if split.scheme not in ("http", "https") or not split.hostname or bool(split.username) == bool(token):
            continue
        login = {"username": unquote(split.username or ""), "password": unquote(split.password or "")}
        found = {"BasicHTTP": login} if token is None else {"CondaToken": token["token"]}
        if credentials.setdefault(split.hostname, found) == found:
            path = split.path if token is None else token["rest"] or ""
            clean[url] = urlunsplit(split._replace(netloc=split.netloc.rpartition("@")[2], path=path))
    return ChannelAccess(clean, credentials)


@contextlib.contextmanager
def credentials_file(access: ChannelAccess, environ: Mapping[str, str]) -> Iterator[str | None]:
    """Yields a temporary, private file of credentials for rattler, with those of the user's own, or that one's path."""
    named = environ.get("RATTLER_AUTH_FILE") or None
    if not access.credentials:
        yield named
        return
    known = read_json(Path(named)) if named is not None else {}
    with private_folder() as folder:
        file = folder / "credentials.json"
        write_private(file, json.dumps({**known, **access.credentials}))
        yield str(file)


def write_lock(file: Path, specification: CondaSpecification, records: tuple[rattler.RepoDataRecord, ...]) -> None:
    """Writes packages, URLs without credentials, and hashes for Pixi and rattler (https://docs.rs/rattler_lock)."""
    platform = LockPlatform(specification.configuration.subdir)
    lock = rattler.LockFile([platform])
    lock.set_channels("default", [LockChannel(public_url(url)) for url in specification.channels])
    for record in records:
        lock.add_conda_package("default", platform, record)
    lock.to_path(file)
    text = _URL.sub(lambda match: public_url(match[0]), file.read_text(encoding="utf-8"))
    file.write_text(text, encoding="utf-8")


def installed_by_pip(location: Path) -> frozenset[tuple[str, str]]:
    """Returns the names and versions of an environment's Python packages that no conda package contains."""
    conda = {file.name for file in (location / "conda-meta").glob("*.json")}
    folders = [str(folder) for folder in (location / "lib").glob("python*/site-packages")]
    found = set()
    for distribution in distributions(path=folders):
        installer = (distribution.read_text("INSTALLER") or "").strip()
        name, version = distribution.metadata["Name"], distribution.version
        if name and installer != "conda" and not any(file.startswith(f"{name}-{version}-") for file in conda):
            found.add((str(name), str(version)))
    return frozenset(found)


def write_pip_lock(location: Path, packages: frozenset[tuple[str, str]]) -> None:
    """Writes the versions of the pip section beside the environment, in the format of a requirements file."""
    text = "".join(sorted(f"{name}=={version}\n" for name, version in packages))
    location.with_name(f"{location.name}.requirements.txt").write_text(text, encoding="utf-8")
