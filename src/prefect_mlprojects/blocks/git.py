"""Credentials for private git repositories."""

from __future__ import annotations

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from prefect_mlprojects.blocks import logos
from prefect_mlprojects.sources.git.credentials import GitCredentials


class GitCredentialsBlock(Block):
    """A user name and token, or an SSH key, for the git repositories of some hosts.

    Example:
        Keep a token for a host; every project that is fetched from it uses the token::

            from prefect_mlprojects.blocks import GitCredentialsBlock

            GitCredentialsBlock(token="…", hosts=["github.com"]).save("github")
    """

    _block_type_name = "Git Credentials"
    _block_type_slug = "git-credentials"
    _logo_url = logos.GIT
    _description = "A user name and token, or an SSH key, for the git repositories of some hosts."

    username: str | None = Field(
        default=None, description="The user name that goes with the token; most services take any."
    )
    token: SecretStr | None = Field(default=None, description="A password or access token for https:// and http://.")
    ssh_private_key: SecretStr | None = Field(
        default=None,
        title="SSH private key",
        description="An unencrypted private key for ssh://, with its first and last line.",
    )
    known_hosts: str | None = Field(
        default=None, description="Lines of a known_hosts file for ssh://; the worker's own file when left out."
    )
    hosts: list[str] = Field(
        default_factory=list,
        description="The hosts that they are for, such as github.com or git.example.com:8443; none: any host.",
    )

    def get_credentials(self) -> GitCredentials:
        """Returns the credentials with their secrets, for use in memory."""
        return GitCredentials(
            username=self.username,
            token=self.token.get_secret_value() if self.token is not None else None,
            ssh_private_key=self.ssh_private_key.get_secret_value() if self.ssh_private_key is not None else None,
            known_hosts=self.known_hosts,
            hosts=tuple(host.strip().lower() for host in self.hosts),
        )

    def test_connection(self, url: str) -> None:
        """Asks a repository for its branches with these credentials.

        Args:
            url: The repository.

        Raises:
            FetchError: It refused, or could not be reached.
        """
        from prefect_mlprojects.exceptions import FetchError
        from prefect_mlprojects.sources.git.program import explain_failure, use_git
        from prefect_mlprojects.sources.git.urls import parse_git_url
        from prefect_mlprojects.types import StopSignal

        address = parse_git_url(url)
        if address is None:
            raise FetchError(f"{url!r} is no address of a git repository.", uri=url)
        with use_git(address, self.get_credentials(), StopSignal(), address.url) as git:
            answer = git.run("ls-remote", "--heads", "--", address.url)
        if not answer.succeeded:
            failure = explain_failure(answer.text, scheme=address.scheme, host=address.host)
            raise FetchError(f"{address.url!r} can't be reached: {failure.text}. {failure.advice}", uri=address.url)
