"""Checks a configured Prefect server before Prefect's client waits for it in vain; finds ports and proxies."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from base64 import b64encode
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import (
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
    getproxies_environment,
    proxy_bypass,
)

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.profile import read_setting

_TRUE = {"1", "true", "t", "yes", "y", "on"}


def check_reachable(api_url: str, timeout: float = 10.0) -> None:
    """Checks that a Prefect server answers, with the key, proxy and certificates that Prefect's client uses.

    Args:
        api_url: URL of the API.
        timeout: Seconds to wait for an answer.

    Raises:
        PrefectServerError: It does not answer, or not as a Prefect server. Names the URL, redacted, and what to do.
    """
    shown = redact(api_url)

    def failure(why: str, advice: str) -> PrefectServerError:
        return PrefectServerError(f"The Prefect server at {shown} {why}. {advice}", api_url=shown)

    advice = "Start it, correct PREFECT_API_URL, or unset it to use the embedded server."
    try:
        status, body = _get(api_url.rstrip("/") + "/health", timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        if isinstance(cause, TimeoutError):
            raise failure(f"did not answer within {timeout:g} s", advice) from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            advice = "Set PREFECT_API_SSL_CERT_FILE to the file of its certificate authority."
        raise failure(f"can't be reached: {redact(_reason(cause))}", advice) from None
    if status in {401, 403}:
        has_key = _authorization(urlsplit(api_url)) is not None
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


def _get(url: str, timeout: float) -> tuple[int, bytes]:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("it is not an http(s) address")
    request = Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())  # noqa: S310 - checked above
    authorization = _authorization(parts)
    if authorization is not None:
        request.add_unredirected_header("Authorization", authorization)
    handlers: list[Any] = [_StopAtRedirects()]
    if parts.scheme == "https":
        handlers.append(HTTPSHandler(context=_tls()))
    try:
        with build_opener(*handlers).open(request, timeout=timeout) as response:
            return response.status, response.read(1000)
    except HTTPError as error:
        with error:
            return error.code, b""


def _authorization(parts: SplitResult) -> str | None:
    # The order of httpx and PrefectClient.__init__: the URL's password, the server's password, the key.
    if parts.username:
        return _basic(f"{unquote(parts.username)}:{unquote(parts.password or '')}")
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
