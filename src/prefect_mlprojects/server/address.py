"""Whether a configured Prefect server can be reached, and if not, why: asked before Prefect waits for it in vain."""

from __future__ import annotations

import http.client
import os
import ssl
from base64 import b64encode
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.profile import read_setting


def check_reachable(api_url: str, timeout: float = 10.0) -> None:
    """Makes sure that a Prefect server answers, with the key, proxy and certificates that Prefect's client would use.

    Args:
        api_url: The API's address.
        timeout: Seconds to wait for an answer.

    Raises:
        PrefectServerError: It does not, with the address (passwords masked) and what to do.
    """
    shown = redact(api_url)

    def fail(why: str, advice: str) -> PrefectServerError:
        return PrefectServerError(f"The Prefect server at {shown} {why}. {advice}", api_url=shown)

    advice = "Start it, correct PREFECT_API_URL, or unset it to use the embedded server."
    try:
        status, body = _get(api_url.rstrip("/") + "/health", timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        if isinstance(cause, TimeoutError):
            raise fail(f"did not answer within {timeout:g} s", advice) from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            advice = "Name its certificate authority's file in PREFECT_API_SSL_CERT_FILE."
        raise fail(f"can't be reached: {redact(_reason(cause))}", advice) from None
    if status in {401, 403}:
        given = _authorization(urlsplit(api_url)) is not None
        raise fail(
            f"refused {'the key or password given to it' if given else 'access without a key'} ({status})",
            f"{'Correct' if given else 'Set'} PREFECT_API_KEY (Prefect Cloud) or PREFECT_API_AUTH_STRING.",
        )
    if status >= 500:
        raise fail(f"is in trouble: it answered {status}", "Look at its log.")
    # Prefect's client follows redirections; a workspace of Prefect Cloud need not have this address.
    if 300 <= status < 400 or "/accounts/" in api_url:
        return
    if status != 200 or body.strip() != b"true":
        raise fail("does not look like a Prefect server", "PREFECT_API_URL usually ends with /api.")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _StopAtRedirects(HTTPRedirectHandler):
    """Leaves redirections alone: urllib would carry the key along to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Follows nothing."""


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
        with build_opener(*handlers).open(request, timeout=timeout) as answer:
            return answer.status, answer.read(1000)
    except HTTPError as error:
        with error:
            return error.code, b""


def _authorization(parts: SplitResult) -> str | None:
    # As httpx and PrefectClient.__init__: the address's own password, else the password of a server, else a key.
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
    if (read_setting("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "api", "tls_insecure_skip_verify") or "").lower() in {
        "1",
        "true",
        "t",
        "yes",
        "y",
        "on",
    }:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    import certifi

    file = read_setting("PREFECT_API_SSL_CERT_FILE", "api", "ssl_cert_file") or os.environ.get("SSL_CERT_FILE")
    return ssl.create_default_context(cafile=file or certifi.where())
