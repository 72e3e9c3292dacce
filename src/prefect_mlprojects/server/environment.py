"""The environment of the embedded server's process.

The server outlives its starter. Of the starter's environment it keeps what it needs itself, the system's variables and
Prefect's settings for servers, so that no credentials of a terminal or a job stay in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.server.record import HOST

_KEPT = frozenset(
    name
    for group in (
        "HOME USER LOGNAME SHELL PATH TMPDIR TEMP TMP TZ LANG LANGUAGE LD_LIBRARY_PATH DYLD_LIBRARY_PATH VIRTUAL_ENV",
        "PYTHONPATH PYTHONHOME PYTHONUTF8 PYTHONIOENCODING PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX",
        "SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NO_PROXY no_proxy",
        "PREFECT_HOME PREFECT_PROFILE PREFECT_PROFILES_PATH PREFECT_DEBUG_MODE",
    )
    for name in group.split()
)
_KEPT_PREFIXES = ("LC_", "XDG_", "PREFECT_SERVER_", "PREFECT_API_DATABASE_", "PREFECT_UI_", "PREFECT_LOGGING_")
_PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
"""Kept without a password in them: notifications of automations go through them."""


def server_environment(environ: Mapping[str, str], port: int, database: str, auth: Secret | None) -> dict[str, str]:
    """Returns the environment of a server process: of `environ` only what it needs itself, so that no secret stays in it."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES) or (name.upper() in _PROXIES and "@" not in value)
    }
    origins = ",".join(f"http://{name}:{port}" for name in (HOST, "localhost"))
    for name in ("PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"):
        origins = kept.pop(name, "") or origins
    kept |= {
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
        "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
    }
    kept.pop("PREFECT_SERVER_API_AUTH_STRING", None)
    return kept if auth is None else {**kept, "PREFECT_SERVER_API_AUTH_STRING": reveal(auth)}
