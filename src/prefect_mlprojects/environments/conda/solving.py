"""Solves and installs conda environments in this process with py-rattler, and writes their lock files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import rattler
from rattler.exceptions import GatewayError, SolverError
from rattler.install import InstallerReporter
from rattler.lock import LockChannel, LockPlatform

from prefect_mlprojects._support.files import write_private
from prefect_mlprojects.environments.building import Build
from prefect_mlprojects.environments.cache import stopped_error
from prefect_mlprojects.environments.conda import CondaSpecification
from prefect_mlprojects.environments.conda.configuration import CondaConfiguration, public_url, split_channel
from prefect_mlprojects.environments.python.files import redact_urls
from prefect_mlprojects.types import StopSignal

_T = TypeVar("_T")
_REPORT_SECONDS = 2.0
_DISK_FULL = ("No space left on device", "os error 28", "Disk quota exceeded")


@dataclass(frozen=True)
class CondaBuild:
    """One build under way.

    Attributes:
        recipe: What is built.
        location: Where it is made.
        cache_directory: Our cache directory; downloaded packages are kept below it.
        report: Takes lines about the progress.
        stop: Asks for the end.
    """

    recipe: CondaRecipe
    location: Path
    cache_directory: Path
    report: Callable[[str], None]
    stop: StopSignal

    def run(self) -> tuple[rattler.RepoDataRecord, ...]:
        """Solves and installs.

        Returns:
            What was installed.

        Raises:
            EnvironmentBuildError: A channel could not be reached, there is no solution, a package could not be
                installed, or a stop was requested.
        """
        problems = spec_problems(self.recipe.specs, self.recipe.file)
        if problems:
            raise EnvironmentBuildError(describe_problems(self.recipe.project, problems), manager="conda")
        access = take_credentials(self.recipe.channels)
        with credentials_file(access, os.environ) as credentials:
            return _run_until_stopped(lambda: self._build(access, credentials), self.stop)

    async def _build(self, access: ChannelAccess, credentials: str | None) -> tuple[rattler.RepoDataRecord, ...]:
        configuration = self.recipe.configuration
        try:
            platform = rattler.Subdir(configuration.subdir)
        except Exception as error:
            raise self.failure(f"conda's setting subdir is {configuration.subdir!r}, which is no platform") from error
        self._warn_of_certificates()
        client = _make_client(configuration, credentials)
        folder = package_cache(self.cache_directory)
        action = "force-cache-only" if configuration.offline else "cache-or-fetch"
        gateway = rattler.Gateway(
            cache_dir=folder / "repodata",
            default_config=rattler.SourceConfig(cache_action=action),  # type: ignore[arg-type]
            client=client,
        )
        platforms = [platform, rattler.Subdir("noarch")]
        has_pip = await self._reach_channels(gateway, platforms, access)
        add_pip = has_pip and configuration.add_pip_as_python_dependency
        records = await self._solve(gateway, platforms, access, add_pip=add_pip)
        self.report(f"Installing {len(records)} conda packages")
        try:
            await rattler.install(
                records,
                self.location,
                cache_dir=folder / "pkgs",
                platform=platform,
                execute_link_scripts=True,  # as conda does
                show_progress=False,
                client=client,
                reporter=_Progress(self.report, len(records)),  # type: ignore[abstract]  # its bodies are defaults
            )
        except Exception as error:
            raise self.failure(f"a package could not be installed: {words(error)}") from error
        return tuple(records)

    def _warn_of_certificates(self) -> None:
        """The library takes a file of certificates from the environment only, which this process must not change."""
        file = self.recipe.configuration.ssl_verify
        if isinstance(file, str) and os.environ.get("SSL_CERT_FILE") != file:
            self.report(
                f"Warning: conda's setting ssl_verify names {file}; set the environment variable SSL_CERT_FILE to it as "
                "well, else the machine's own certificates are used"
            )

    async def _reach_channels(
        self, gateway: rattler.Gateway, platforms: list[rattler.Subdir], access: ChannelAccess
    ) -> bool:
        """Fetches what each channel has, so that one that can't be reached is named; tells whether any has pip."""
        found = False
        for url in self.recipe.channels:
            self.report(f"Asking the channel {public_url(url)}")
            try:
                channel = rattler.Channel(access.url(url))
                packages = await gateway.query([channel], platforms, ["pip"], recursive=False)
            except GatewayError as error:
                advice = (
                    "Conda's setting offline is on, and this machine has no copy of its index."
                    if self.recipe.configuration.offline
                    else "Is its address right, and can this machine reach it?"
                )
                raise self.failure(
                    f"the channel {public_url(url)} can't be reached. {advice}\nIt said: {words(error)}"
                ) from error
            found = found or any(packages)
        return found

    async def _solve(
        self, gateway: rattler.Gateway, platforms: list[rattler.Subdir], access: ChannelAccess, *, add_pip: bool
    ) -> list[rattler.RepoDataRecord]:
        self.report(f"Solving for {', '.join(spec.text for spec in self.recipe.specs) or 'nothing'}")
        priority = self.recipe.configuration.channel_priority
        strict, disabled = rattler.ChannelPriority.Strict, rattler.ChannelPriority.Disabled
        try:
            virtual = rattler.VirtualPackage.detect(rattler.VirtualPackageOverrides.from_env())
        except Exception as error:
            raise self.failure(f"this machine's virtual packages can't be told: {words(error)}") from error
        # Conda's flexible priority takes from another channel only what can't be had from the first.
        orders = {"strict": [strict], "disabled": [disabled], "flexible": [strict, disabled]}[priority]
        for order in orders:
            try:
                return await rattler.solve(
                    [rattler.Channel(access.url(url)) for url in self.recipe.channels],
                    [rattler.MatchSpec(_with_channel(spec.match, access)) for spec in self.recipe.specs],
                    gateway=gateway,
                    platforms=platforms,
                    virtual_packages=virtual,
                    channel_priority=order,
                    add_pip_as_python_dependency=add_pip,
                )
            except SolverError as error:
                if order is orders[-1]:
                    channels = ", ".join(public_url(url) for url in self.recipe.channels)
                    raise self.failure(
                        f"no set of packages fits {self.recipe.file.file} in the channels {channels}.\n{_block(error)}"
                    ) from error
            except GatewayError as error:
                raise self.failure(f"a channel could not be read: {words(error)}") from error
        raise AssertionError("the last order returns or raises")

    def failure(self, what: str) -> EnvironmentBuildError:
        """The error of this build."""
        message = f"The conda environment of project '{self.recipe.project.display_name}' can't be built: {what}"
        if any(sign in what for sign in _DISK_FULL):
            message += "\n" + disk_full_message(self.cache_directory)
        return EnvironmentBuildError(message, manager="conda", output_tail=what.splitlines()[-10:])


def package_cache(cache_directory: Path) -> Path:
    """Where conda packages and indexes are kept once they were downloaded (``RATTLER_CACHE_DIR``, else our cache)."""
    named = os.environ.get("RATTLER_CACHE_DIR", "").strip()
    return Path(named).expanduser() if named else cache_directory / "conda"


def python_version_of(records: tuple[rattler.RepoDataRecord, ...]) -> str:
    """The version of the Python among packages; empty when there is none."""
    return next((str(record.version) for record in records if record.name.normalized == "python"), "")


def words(error: BaseException) -> str:
    """What an error of the library says, without secrets, in one line."""
    return public_url(redact(" ".join(str(error).split()))) or type(error).__name__


def _with_channel(match: str, access: ChannelAccess) -> str:
    channel, rest = split_channel(match)
    return match if channel is None else f"{access.url(channel)}::{rest}"


def _block(error: BaseException) -> str:
    lines = [line for line in redact(str(error)).strip().splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines)


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
    """A client with conda's network settings; rattler itself finds credentials: RATTLER_AUTH_FILE, keyring, netrc."""
    lines = []
    if configuration.ssl_verify is False:
        lines.append("tls-no-verify = true")
    elif configuration.ssl_verify is not True:
        lines.append('tls-root-certs = "system"')
    if credentials is not None:
        lines.append(f"authentication-override-file = {json.dumps(credentials)}")
    if configuration.proxy_servers:
        lines.append("[proxy-config]")
        lines += [
            f"{scheme} = {json.dumps(configuration.proxy_servers[scheme])}"
            for scheme in ("http", "https")
            if scheme in configuration.proxy_servers
        ]
    return rattler.Client.from_config(
        rattler.Config.from_toml("\n".join(lines)),
        max_retries=configuration.max_retries,
        timeout=configuration.timeout,
    )


class _Progress(InstallerReporter):
    """Tells what is downloaded and how far the installation is; called from the library's threads."""

    def __init__(self, report: Callable[[str], None], total: int) -> None:
        self._report = report
        self._total = total
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
    """Channels without the credentials that their URLs had.

    Attributes:
        urls: The URL to use, by the one that was given; those that need no other are left out.
        credentials: What to present to each host, in the format of rattler's credentials file.
    """

    urls: Mapping[str, str] = field(default_factory=dict, repr=False)
    credentials: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def url(self, given: str) -> str:
        """The URL to use."""
        return self.urls.get(given, given)


def take_credentials(urls: Iterable[str]) -> ChannelAccess:
    """Takes user names, passwords and tokens out of URLs.

    A host can be given one credential only: a URL with another one, and one whose token does not stand first in its
    path, stay as they are.
    """
    clean: dict[str, str] = {}
    credentials: dict[str, Mapping[str, Any]] = {}
    for url in urls:
        parts = urlsplit(url)
        token = _TOKEN_PATH.match(parts.path)
        if parts.scheme not in ("http", "https") or not parts.hostname or (parts.username and token):
            continue
        found: Mapping[str, Any]
        if parts.username:
            password = unquote(parts.password or "")
            found = {"BasicHTTP": {"username": unquote(parts.username), "password": password}}
            parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        elif token is not None:
            found = {"CondaToken": token["token"]}
            parts = parts._replace(path=token["rest"] or "")
        else:
            continue
        if credentials.setdefault(parts.hostname or "", found) == found:
            clean[url] = urlunsplit(parts)
    return ChannelAccess(clean, credentials)


@contextlib.contextmanager
def credentials_file(access: ChannelAccess, environ: Mapping[str, str]) -> Iterator[str | None]:
    """A file with credentials for rattler, which only this user can read and which is gone after the block.

    Args:
        access: What the channels' URLs had.
        environ: The environment variables; ``RATTLER_AUTH_FILE`` names a file of the user, which counts as well.

    Yields:
        The file's path; the user's own when there is nothing to add to it, None without any.
    """
    named = environ.get("RATTLER_AUTH_FILE") or None
    if not access.credentials:
        yield named
        return
    known: dict[str, Any] = {}
    if named is not None:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(Path(named).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="mlprojects-conda-") as folder:
        file = Path(folder, "credentials.json")
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            json.dump({**known, **access.credentials}, out)
        yield str(file)
