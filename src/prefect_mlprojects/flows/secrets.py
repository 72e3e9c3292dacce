"""A run's secrets: those that it finds on its way."""

from __future__ import annotations

from prefect_mlprojects._support.known_secrets import KnownSecrets
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.sources.git import GitCredentials, GitCredentialsLookup


def remembering(lookup: GitCredentialsLookup, known: KnownSecrets) -> GitCredentialsLookup:
    """Returns a look-up whose credentials are redacted in the run's output and messages."""

    def find(url: str, host: str) -> GitCredentials | None:
        if found := lookup(url, host):
            known.add(*(Secret(each) for each in (found.token, found.ssh_private_key) if each))
        return found

    return find
