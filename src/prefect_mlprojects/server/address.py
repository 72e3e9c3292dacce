"""Finds the configured Prefect API without importing Prefect, and checks that it answers; finds ports and proxies.

The precedence of settings is that of ``prefect.settings.base.PrefectBaseSettings.settings_customise_sources`` (Prefect 3.8):
environment, ``.env``, ``prefect.toml``, ``[tool.prefect]`` of ``pyproject.toml``, the active profile.
"""

from __future__ import annotations

import http.client
import importlib
import os
import socket
import ssl
import sys
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote
from urllib.request import (
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
    getproxies_environment,
    proxy_bypass,
)

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import reveal
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.access import known_auth

_TRUE = {"1", "true", "t", "yes", "y", "on"}


def check_reachable(api_url: str, timeout: float = 10.0) -> None:
    """Checks that a Prefect server answers within `timeout` seconds; uses the key, proxy and certificates of Prefect's client.

    Raises `PrefectServerError`, whose message has the redacted URL and what to do.
    """
    shown = redact(api_url)

    def failure(why: str, advice: str) -> PrefectServerError:
        return PrefectServerError(f"The Prefect server at {shown} {why}. {advice}", api_url=shown)

    advice = "Start it, correct PREFECT_API_URL, or unset it to use the embedded server."
    try:
        status, body = send(api_url.rstrip("/") + "/health", timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        if isinstance(cause, TimeoutError):
            raise failure(f"did not answer within {timeout:g} s", advice) from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            advice = "Set PREFECT_API_SSL_CERT_FILE to the file of its certificate authority."
        raise failure(f"can't be reached: {redact(_reason(cause))}", advice) from None
    if status in {401, 403}:
        has_key = _authorization(split_url(api_url)) is not None
        raise failure(
            f"refused {'the key or password' if has_key else 'access without a key'} ({status})",
            f"{'Correct' if has_key else 'Set'} PREFECT_API_KEY (Prefect Cloud) or PREFECT_API_AUTH_STRING.",
        )
    if status >= 500:
        raise failure(f"failed: it answered {status}", "See its log.")
    # Prefect's client follows redirects; a workspace of Prefect Cloud may have no health endpoint.
    if 300 <= status < 400 or "/accounts/" in api_url:
        return
    if status != 200 or body.strip() != b"true":
        raise failure("does not look like a Prefect server", "PREFECT_API_URL usually ends with /api.")


def ui_url_of(api_url: str) -> str | None:
    """Returns the UI's URL that belongs to an API's URL; None if it is not known."""
    if os.environ.get("PREFECT_UI_URL"):
        return os.environ["PREFECT_UI_URL"]
    if "api.prefect.cloud/api" in api_url:
        return (
            api_url.replace("https://api.prefect.cloud/api", "https://app.prefect.cloud")
            .replace("/accounts/", "/account/")
            .replace("/workspaces/", "/workspace/")
        )
    return api_url.rstrip("/").removesuffix("/api") if api_url.rstrip("/").endswith("/api") else None


def choose_port(host: str, preferred: int) -> int:
    """Returns the preferred port, or a free one if it is taken."""
    with socket.socket() as caller, socket.socket() as probe:
        # On macOS binding to one address succeeds although a server listens on all of them; that server answers.
        caller.settimeout(1)
        taken = preferred != 0 and caller.connect_ex((host, preferred)) == 0
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, 0 if taken else preferred))
        except OSError:
            probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def uses_proxy(host: str) -> bool:
    """Returns whether Prefect's client asks an HTTP proxy for a host."""
    if not any(name.lower() in {"http_proxy", "all_proxy"} for name in os.environ):
        return False
    return bool(getproxies_environment().keys() & {"http", "all"}) and not proxy_bypass(host)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _StopAtRedirects(HTTPRedirectHandler):
    """Does not follow redirects: urllib would send the key to the other host."""

    def redirect_request(self, *_: Any) -> None:
        """Returns no request."""


def send(
    url: str, timeout: float, body: bytes | None = None, headers: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, bytes]:
    """Sends a request, a POST if there is a body, with the key, proxy and certificates of Prefect's client.

    Returns the status and the answer, of an error its first 1000 bytes. Raises `OSError`, `HTTPException` or `ValueError`.
    """
    parts = split_url(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("it is not an http(s) address")
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    request = Request(address, body, dict(headers))  # noqa: S310 - checked above
    authorization = _authorization(parts)
    if authorization is not None:
        request.add_unredirected_header("Authorization", authorization)
    handlers: list[Any] = [_StopAtRedirects()]
    if parts.scheme == "https":
        handlers.append(HTTPSHandler(context=_tls()))
    try:
        with build_opener(*handlers).open(request, timeout=timeout) as response:
            return response.status, response.read()
    except HTTPError as error:
        with error:
            return error.code, error.read(1000)


def _authorization(parts: SplitResult) -> str | None:
    # The order of httpx and PrefectClient.__init__: the URL's password, the server's password, the key.
    if parts.username:
        return _basic(f"{unquote(parts.username)}:{unquote(parts.password or '')}")
    if known := known_auth(f"{parts.scheme}://{parts.netloc}/api"):
        return _basic(reveal(known))
    if auth := read_setting("PREFECT_API_AUTH_STRING", "api", "auth_string"):
        return _basic(auth)
    key = read_setting("PREFECT_API_KEY", "api", "key")
    return f"Bearer {key}" if key else None


def _basic(credentials: str) -> str:
    return f"Basic {b64encode(credentials.encode()).decode()}"


def _tls() -> ssl.SSLContext:
    # As PrefectClient.__init__.
    insecure = read_setting("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "api", "tls_insecure_skip_verify")
    if (insecure or "").lower() in _TRUE:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    import certifi

    file = read_setting("PREFECT_API_SSL_CERT_FILE", "api", "ssl_cert_file") or os.environ.get("SSL_CERT_FILE")
    return ssl.create_default_context(cafile=file or certifi.where())


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
    """Returns a Prefect setting; None if it is not set.

    `variable` names it in the environment and in profiles, `keys` is its path in ``prefect.toml`` and ``[tool.prefect]``.
    """
    return _from_environment_or_files(variable, *keys) or _from_profile(variable) or None


def _from_environment_or_files(variable: str, *keys: str) -> str | None:
    return (
        os.environ.get(variable)
        or _from_dotenv(variable)
        or _in(_read_toml(Path("prefect.toml")), *keys)
        or _in(_read_toml(Path("pyproject.toml")), "tool", "prefect", *keys)
    )


def _from_dotenv(variable: str) -> str | None:
    if not Path(".env").is_file():
        return None
    from dotenv import dotenv_values

    return dotenv_values(".env").get(variable)


def _from_profile(variable: str) -> str | None:
    settings = _read_toml(_profiles_path())
    active = os.environ.get("PREFECT_PROFILE") or settings.get("active")
    # The profile of the embedded server is no choice of the user.
    return _in(settings, "profiles", str(active), variable) if active and active != PROFILE else None


def _profiles_path() -> Path:
    # As prefect.settings.sources._get_profiles_path.
    configured = _from_environment_or_files("PREFECT_PROFILES_PATH", "profiles_path")
    return Path(configured or Path(os.environ.get("PREFECT_HOME") or "~/.prefect") / "profiles.toml").expanduser()


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
