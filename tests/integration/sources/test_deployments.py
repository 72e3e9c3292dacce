"""Deployments of private repositories: the credentials are a block's, at deploy time as in each run."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr
from tests.services.prefect_api import use_server

from prefect_mlprojects import deploy
from prefect_mlprojects.blocks import GitCredentialsBlock
from prefect_mlprojects.exceptions import ExecutionException, FetchError
from prefect_mlprojects.server.process import ServerAddress

from .conftest import TOKEN, USER, Remote


@pytest.mark.parametrize("found", ["by host", "by name"])
def test_private_repository_with_credentials_block_is_deployed(
    save_block: Callable[[Any, str], None],
    found: str,
    git_http: str,
    remote: Remote,
    prefect_server: ServerAddress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_server(monkeypatch, prefect_server.api_url)
    name, uri = f"git-{uuid.uuid4().hex[:8]}", f"{git_http}/project.git"
    hosts = [git_http] if found == "by host" else []
    options: dict[str, Any] = {"git_credentials": name} if found == "by name" else {}
    with pytest.raises(FetchError, match="git-credentials"):
        deploy(uri, name=name)
    if options:
        with pytest.raises(ExecutionException, match=f"no block 'git-credentials/{name}'"):
            deploy(uri, name=name, **options)
    save_block(GitCredentialsBlock(username=USER, token=SecretStr(TOKEN), hosts=hosts), name)
    made = deploy(uri, name=name, version="annotated", pin=True, **options)
    assert made.specification.version == remote.commits["two"]
    assert made.specification.options["version"] == remote.commits["two"]
    assert TOKEN not in str(made.specification)
