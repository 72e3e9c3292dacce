"""Requests to a Prefect server's API as its owner makes them, with the embedded server's password."""

from __future__ import annotations

from base64 import b64encode

import httpx
import pytest

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


def client_variables(api_url: str) -> dict[str, str]:
    """The variables by which Prefect's own commands use the server in the current server folder.

    The profile may name another one: the tests of several servers share it.
    """
    auth = read_auth(server_directory())
    return {"PREFECT_API_URL": api_url, **({"PREFECT_API_AUTH_STRING": reveal(auth)} if auth else {})}


def use_server(monkeypatch: pytest.MonkeyPatch, api_url: str) -> None:
    """Names the server in this process's environment, which the processes that a test starts inherit."""
    for name, value in client_variables(api_url).items():
        monkeypatch.setenv(name, value)
