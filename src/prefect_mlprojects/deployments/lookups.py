"""What a deployment's project needs of the Prefect server before there is a deployment: blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from prefect_mlprojects.server.api import call_api
from prefect_mlprojects.sources.git.credentials import GitCredentials, GitCredentialsLookup


class BlockLookups:
    """Reads blocks. The server is found, or started, at the first question.

    Args:
        announce: Takes lines about a server that is being started; None prints them to stderr.
    """

    def __init__(self, announce: Callable[[str], None] | None = None) -> None:
        self._announce = announce

    @cached_property
    def _api_url(self) -> str:
        from prefect_mlprojects.server.process import resolve_api

        return resolve_api(self._announce).api_url

    def project(self, uri: str) -> dict[str, Any]:
        """Returns what the project block of a ``block://NAME`` URI holds.

        Args:
            uri: The URI.

        Raises:
            ExecutionException: There is no such block.
        """
        from prefect_mlprojects.blocks.resolution import read_project

        return call_api(self._api_url, read_project, uri)

    def git_credentials(self, name: str | None) -> GitCredentialsLookup:
        """Returns the lookup that fetching a git project asks when it needs credentials.

        Args:
            name: The name of a block; None to look for one by host.
        """

        def lookup(url: str, host: str) -> GitCredentials | None:  # noqa: ARG001 - the contract's signature
            from prefect_mlprojects.blocks.resolution import find_git_credentials

            return call_api(self._api_url, find_git_credentials, host, name) if host else None

        return lookup
