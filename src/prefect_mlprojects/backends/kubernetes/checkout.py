"""What an init container clones, and with which credentials: those of the repository, never those of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prefect_mlprojects.backends.kubernetes.config import BACKEND
from prefect_mlprojects.exceptions import BackendError, FetchError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.sources.git.credentials import GitCredentials, GitCredentialsLookup
from prefect_mlprojects.sources.git.urls import parse_git_url

CLONE_CONTAINER = "mlprojects-clone"
REPOSITORY_FOLDER = ".repository"
"""Where the repository is in the volume that becomes the project's folder."""

_TOKEN = "MLPROJECTS_GIT_TOKEN"  # noqa: S105 - the name of a variable
_USERNAME = "MLPROJECTS_GIT_USERNAME"
_SSH_KEY = "MLPROJECTS_GIT_SSH_KEY"
_KNOWN_HOSTS = "MLPROJECTS_GIT_KNOWN_HOSTS"

CLONE_SCRIPT = f"""set -eu
export HOME=/tmp GIT_TERMINAL_PROMPT=0
if [ -n "${{{_SSH_KEY}:-}}" ]; then
  (umask 077; printf '%s\\n' "${_SSH_KEY}" > /tmp/mlprojects-key)
  options="-o BatchMode=yes -o ConnectTimeout=30 -o IdentitiesOnly=yes -i /tmp/mlprojects-key"
  if [ -n "${{{_KNOWN_HOSTS}:-}}" ]; then
    printf '%s\\n' "${_KNOWN_HOSTS}" > /tmp/mlprojects-hosts
    options="$options -o UserKnownHostsFile=/tmp/mlprojects-hosts -o StrictHostKeyChecking=yes"
  else
    options="$options -o UserKnownHostsFile=/tmp/mlprojects-hosts -o StrictHostKeyChecking=accept-new"
  fi
  export GIT_SSH_COMMAND="ssh $options"
fi
umask 000
git init -q "$1/{REPOSITORY_FOLDER}"
cd "$1/{REPOSITORY_FOLDER}"
if [ -n "${{{_TOKEN}:-}}" ]; then
  helper='!f() {{ test "$1" = get && printf "username=%s\\npassword=%s\\n" "${_USERNAME}" "${_TOKEN}"; }}; f'
  origin=$(printf '%s' "$2" | sed 's|^\\([a-z]*://[^/]*\\).*|\\1|')
  git config "credential.$origin.helper" "$helper"
fi
git remote add origin "$2"
git fetch -q --depth 1 origin "$3" || git fetch -q origin "+refs/heads/*:refs/remotes/origin/*" "+refs/tags/*:refs/tags/*"
git -c advice.detachedHead=false checkout -q "$3"
"""
"""A script for ``sh``: clones the commit ``$3`` of the repository ``$2`` into the folder ``$1``."""


@dataclass(frozen=True)
class GitCheckout:
    """What an init container clones.

    Attributes:
        url: The repository's URL, without credentials.
        commit: The full SHA.
        subdirectory: The project's folder in it; empty for its top.
        variables: With which the clone signs in; secret.
    """

    url: str
    commit: str
    subdirectory: str = ""
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)


def git_checkout(copy: WorkingCopy, ways: str) -> GitCheckout:
    """Returns what an init container has to clone, without credentials.

    Args:
        copy: The project's files.
        ways: What else there is, for messages.

    Raises:
        BackendError: The project is under no commit, its repository has no remote, or files differ from the commit.
    """
    if copy.commit is None or copy.repository_url is None:
        missing = "is not at a git commit" if copy.commit is None else "is in a git repository without a remote"
        raise _error(f"'code-delivery: git' can't work: the project {copy.uri} {missing}. {ways}")
    try:
        address = parse_git_url(copy.repository_url)
    except FetchError as error:
        raise _error(f"'code-delivery: git' can't work: {error} {ways}") from None
    if address is None or address.scheme == "file":
        raise _error(
            f"'code-delivery: git' can't work: the repository's remote {copy.repository_url} is a folder of this machine, "
            f"which a pod can't clone. {ways}"
        )
    if copy.dirty:
        raise _error(
            f"'code-delivery: git' would run commit {copy.commit[:12]}, from which the project's files differ. Commit and "
            "push them, or use 'archive' or 'image'."
        )
    return GitCheckout(address.url, copy.commit, copy.source_name.partition("#")[2])


def signed_in(checkout: GitCheckout, lookup: GitCredentialsLookup | None) -> GitCheckout:
    """Returns a checkout with the credentials that its repository's host needs; asks Prefect, so not for ``plan``.

    Args:
        checkout: The checkout.
        lookup: Finds the git-credentials block that the project itself was fetched with.
    """
    address = parse_git_url(checkout.url)
    credentials = lookup(checkout.url, address.host) if lookup is not None and address is not None else None
    if credentials is None or address is None:
        return checkout
    return GitCheckout(checkout.url, checkout.commit, checkout.subdirectory, git_variables(credentials, address.scheme))


def git_variables(credentials: GitCredentials, scheme: str) -> dict[str, str]:
    """Returns the variables with which the clone signs in; secret.

    Args:
        credentials: The credentials.
        scheme: The transport: a token is not for SSH, nor a key for https.
    """
    variables: dict[str, str] = {}
    if scheme in ("http", "https") and credentials.token is not None:
        variables |= {_TOKEN: credentials.token, _USERNAME: credentials.username or "git"}
    if scheme == "ssh" and credentials.ssh_private_key is not None:
        variables[_SSH_KEY] = credentials.ssh_private_key.strip()
        if credentials.known_hosts is not None:
            variables[_KNOWN_HOSTS] = credentials.known_hosts.strip()
    return variables


def _error(message: str) -> BackendError:
    return BackendError(message, backend=BACKEND)
