"""The Prefect server of a process that runs projects on several ones."""

from __future__ import annotations

import os

import pytest

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.runs.start import configure_prefect
from prefect_mlprojects.server.access import password_for, remember_auth

EMBEDDED, OTHER = "http://127.0.0.1:4999/api", "http://prefect.example/api"


@pytest.mark.parametrize("url", [EMBEDDED, f"{EMBEDDED}/", EMBEDDED.replace("127.0.0.1", "localhost")])
def test_password_belongs_to_each_spelling_of_the_address(url: str) -> None:
    remember_auth(EMBEDDED, Secret("embedded:secret"))
    try:
        assert password_for(url, "embedded:secret") == "embedded:secret"
        assert password_for(url.replace("4999", "4998"), "embedded:secret") is None
    finally:
        remember_auth(f"{EMBEDDED}/", None)
    assert password_for(url, None) is None


@pytest.mark.parametrize(
    ("own", "kept"), [(None, None), ("user:pass", "user:pass")], ids=["no password of its own", "one of its own"]
)
def test_password_of_the_embedded_server_is_for_it_only(
    own: str | None, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    remember_auth(EMBEDDED, Secret("embedded:secret"))
    try:
        configure_prefect(EMBEDDED)
        assert os.environ["PREFECT_API_AUTH_STRING"] == "embedded:secret"
        monkeypatch.setenv("PREFECT_API_URL", OTHER)
        if own:
            monkeypatch.setenv("PREFECT_API_AUTH_STRING", own)
        configure_prefect(OTHER)
        assert os.environ.get("PREFECT_API_AUTH_STRING") == kept
    finally:
        remember_auth(EMBEDDED, None)
