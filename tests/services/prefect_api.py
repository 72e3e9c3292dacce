"""Requests to a Prefect server's API as its owner makes them, with the embedded server's password."""

from __future__ import annotations

from base64 import b64encode

import httpx

from prefect_mlprojects._support.secrets import reveal
from prefect_mlprojects.server.access import read_auth
from prefect_mlprojects.settings import server_directory


def authorization() -> dict[str, str]:
    """The header with the password of the server in the current server folder."""
    auth = read_auth(server_directory())
    return {"Authorization": f"Basic {b64encode(reveal(auth).encode()).decode()}"} if auth else {}


def api(api_url: str) -> httpx.Client:
    """A client whose paths are those of the API."""
    return httpx.Client(base_url=api_url, headers=authorization(), timeout=60)
