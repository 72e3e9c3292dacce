"""Middleware of the embedded server: refuses foreign hosts and web pages, and logs browsers in by one-time links.

Prefect's own authentication protects its API. It does not check the ``Host`` header (a name that an attacker's DNS points to
127.0.0.1 would do), and answers requests of any page to its UI.
"""

from __future__ import annotations

import hmac
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any, TypeAlias
from urllib.parse import quote, urlsplit

from fastapi.requests import HTTPConnection, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response

from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.server.access import LOGIN_PATH, LoginCodes

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

HOSTS = frozenset({"127.0.0.1", "localhost", "::1", "host.docker.internal"})
"""The names of this machine, also those that containers use; no other name can be registered for it."""

_MAX_CODE_BYTES = 200


class ServerGuard:
    """ASGI middleware around Prefect's application; `auth` None means that the server has no password."""

    def __init__(self, app: ASGIApp, *, auth: Secret | None, origins: Iterable[str]) -> None:
        self._app = app
        self._auth = auth
        self._codes = LoginCodes(auth) if auth is not None else None
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on to Prefect's application."""
        if scope["type"] in ("http", "websocket"):
            connection = HTTPConnection(scope)
            if (why := self._refusal(connection)) is not None:
                await _refuse(scope, receive, send, why)
                return
            if scope["type"] == "http" and self._codes is not None:
                answer = await self._login(Request(scope, receive), self._codes)
                if answer is not None:
                    await answer(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _refusal(self, connection: HTTPConnection) -> str | None:
        """Returns why a request is refused; None if it is not."""
        hosts = connection.headers.getlist("host")
        if len(hosts) != 1 or _name_of(hosts[0]) not in HOSTS:
            return "This server answers to 127.0.0.1 and localhost only."
        foreign = [each for each in connection.headers.getlist("origin") if each not in self._origins]
        if foreign and "*" not in self._origins:
            return "This server refuses requests of other web pages (PREFECT_SERVER_CORS_ALLOWED_ORIGINS)."
        framed = connection.headers.get("sec-fetch-dest") in ("iframe", "frame", "embed", "object")
        if framed and connection.headers.get("sec-fetch-site") == "cross-site":
            return "This server's pages can't be shown in those of others."
        return None

    async def _login(self, request: Request, codes: LoginCodes) -> Response | None:
        """Returns the answer to the login page's requests, and the way to it for a browser without the password."""
        path = request.scope["path"]
        if path == LOGIN_PATH:
            return await self._exchange(request, codes) if request.method == "POST" else _page()
        cookies = SimpleCookie(request.headers.get("cookie", ""))
        marker = cookies.get(_cookie_name(request))
        logged_in = marker is not None and marker.value == codes.marker()
        if logged_in or not _is_navigation(request) or path.startswith("/api"):
            return None
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(
            f"{LOGIN_PATH}?next={quote(path + query, safe='/')}", 303, {"Cache-Control": "no-store"}
        )

    async def _exchange(self, request: Request, codes: LoginCodes) -> Response:
        """Answers a one-time code, or the right password, with the password as the UI keeps it."""
        assert self._auth is not None
        password = b64encode(reveal(self._auth).encode()).decode()
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_CODE_BYTES:
                break
        code = body[: _MAX_CODE_BYTES + 1].decode("utf-8", "replace")
        if not (self._is_password(request.headers.get("authorization", "")) or codes.use(code)):
            return JSONResponse({"detail": "The link is used, too old or invalid."}, 401, {"Cache-Control": "no-store"})
        answer = JSONResponse({"password": password}, headers={"Cache-Control": "no-store"})
        answer.set_cookie(_cookie_name(request), codes.marker(), max_age=365 * 86400, httponly=True, samesite="lax")
        return answer

    def _is_password(self, authorization: str) -> bool:
        assert self._auth is not None
        scheme, _, given = authorization.partition(" ")
        try:
            decoded = b64decode(given)
        except ValueError:
            return False
        return scheme == "Basic" and hmac.compare_digest(decoded, reveal(self._auth).encode())


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _cookie_name(request: Request) -> str:
    # Cookies are shared by all ports of a host.
    return f"mlprojects-login-{request.url.port or 80}"


def _is_navigation(request: Request) -> bool:
    if request.method not in ("GET", "HEAD"):
        return False
    return request.headers.get("sec-fetch-mode") == "navigate" or "text/html" in request.headers.get("accept", "")


async def _refuse(scope: Scope, receive: Receive, send: Send, why: str) -> None:
    if scope["type"] == "websocket":
        # Closing before the handshake is accepted answers it with 403.
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": why})
        return
    await PlainTextResponse(why, 403)(scope, receive, send)


def _page() -> Response:
    headers: dict[str, Any] = {
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'",
    }
    return HTMLResponse(_PAGE, headers=headers)


# Prefect's UI keeps the password, base64-encoded, in the local storage of its origin under `prefect-password`.
_PAGE = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Prefect server of mlprojects</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 40em; margin: 4em auto; padding: 0 1em }} code {{ font-size: 1.1em }}</style>
<body>
<p id="text">Logging in ...</p>
<script>
const name = "prefect-password";
const [code, ...rest] = location.hash.slice(1).split("/");
const target = () => {{
  const path = rest.length ? "/" + rest.join("/") : new URLSearchParams(location.search).get("next") || "/";
  const wanted = new URL(path, location.origin);
  return wanted.origin === location.origin && wanted.pathname !== location.pathname ? wanted : new URL("/", location.origin);
}};
const next = target();
history.replaceState(null, "", location.pathname);
const exchange = async (options) => {{
  const answer = await fetch("{LOGIN_PATH}", {{ method: "POST", credentials: "same-origin", ...options }});
  if (!answer.ok) return false;
  localStorage.setItem(name, (await answer.json()).password);
  location.replace(next);
  return true;
}};
const login = async () => {{
  if (code && await exchange({{ body: code }})) return;
  const kept = localStorage.getItem(name);
  if (kept && await exchange({{ headers: {{ Authorization: "Basic " + kept }} }})) return;
  const why = code ? "This link was used before, or is too old." : "This browser is not logged in.";
  document.getElementById("text").innerHTML = why
    + " Run <code>mlprojects server status</code> in a terminal and open the link that it prints.";
}};
addEventListener("hashchange", () => location.reload()); // a link that is pasted into this page
login();
</script>
"""
