"""Delivers a project's code to its pod: chooses the way, and prepares the archive, the image or the clone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefect_mlprojects._support.secrets import reveal_all
from prefect_mlprojects.backends.containers.archive import iterate_archive, project_files
from prefect_mlprojects.backends.containers.config import LocalConfig
from prefect_mlprojects.backends.containers.engine import connect
from prefect_mlprojects.backends.containers.image import CODE_FOLDER, build_project_image, ensure_image, push_image
from prefect_mlprojects.backends.contract import Report
from prefect_mlprojects.backends.kubernetes.config import BACKEND, DeliveryName, KubernetesRequest, backend_error
from prefect_mlprojects.exceptions import BackendError, FetchError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.sources.git.credentials import GitCredentials, GitCredentialsLookup
from prefect_mlprojects.sources.git.urls import parse_git_url
from prefect_mlprojects.types import StopSignal

ARCHIVE_LIMIT = 900_000
"""The largest archive in bytes: the API server accepts ConfigMaps of up to 1 MiB."""
ARCHIVE_DIRECTORY = "/mlflow/projects/archive"
ARCHIVE_FILE = "project.tar.gz"
UNPACK_FAILED_CODE = 120
"""The exit code of `UNPACK_SCRIPT` when it fails."""

# tar's -o: files belong to the user who unpacks them; busybox and GNU tar both have it, but share no long option.
UNPACK_SCRIPT = f"""fail() {{ echo "mlprojects: the project could not be unpacked: $1" >&2; exit {UNPACK_FAILED_CODE}; }}
command -v tar >/dev/null 2>&1 || fail "the image has no tar"
command -v gzip >/dev/null 2>&1 || fail "the image has no gzip"
mkdir -p {CODE_FOLDER} && cd {CODE_FOLDER} || fail "{CODE_FOLDER} can't be used"
gzip -dc {ARCHIVE_DIRECTORY}/{ARCHIVE_FILE} | tar -xf - -o -p || fail "tar failed"
"""

CLONE_CONTAINER = "mlprojects-clone"
REPOSITORY_FOLDER = ".repository"
"""The repository's folder in the volume that becomes the project's folder."""

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

_WAYS = (
    "Ways for the code to get to the pod: 'code-delivery: image' with 'repository-uri' (an image is built and pushed), "
    "'archive' (needs no registry, up to 900 kB), 'git' (the pod clones the commit), or 'none' (the image holds the project)."
)
_TRIM = "List what the pod does not need in the project's .dockerignore."
_NO_GIT = "'code-delivery: git' can't work:"
_ENGINE_SECONDS = 600


@dataclass(frozen=True)
class Choice:
    """A way of delivery, and why it was chosen, for messages."""

    delivery: DeliveryName
    reason: str


def choose_delivery(
    requested: DeliveryName | None, *, repository_uri: str | None, build_image: bool, archive_size: int | None
) -> Choice:
    """Chooses how the code gets to the pod. Pure.

    Args:
        requested: ``code-delivery`` of the configuration.
        repository_uri: The image repository to push to.
        build_image: Whether the caller asked for an image to be built.
        archive_size: Size of the project's archive in bytes; None if it exceeds `ARCHIVE_LIMIT`.

    Raises:
        BackendError: No way is possible, or the options contradict each other; the message lists the ways.
    """
    if build_image and requested not in (None, "image"):
        raise backend_error(f"build_image=True contradicts 'code-delivery: {requested}'. {_WAYS}")
    if (build_image or requested == "image") and not repository_uri:
        option = "build_image=True" if build_image else "'code-delivery: image'"
        raise backend_error(
            f"{option} needs 'repository-uri': a registry that the cluster's nodes can pull from. {_WAYS}"
        )
    if requested == "archive" and archive_size is None:
        raise backend_error(f"The project's archive exceeds {ARCHIVE_LIMIT // 1000} kB, compressed. {_TRIM} {_WAYS}")
    if requested is not None:
        return Choice(requested, "the configuration asks for it")
    if build_image:
        return Choice("image", "build_image=True")
    if repository_uri:
        return Choice("image", "'repository-uri' is set")
    if archive_size is None:
        raise backend_error(
            f"The project is too large for an archive of {ARCHIVE_LIMIT // 1000} kB, and no 'repository-uri' is set. "
            f"{_TRIM} {_WAYS}"
        )
    return Choice(
        "archive", f"it fits: {archive_size:,} bytes of at most {ARCHIVE_LIMIT:,}, and no 'repository-uri' is set"
    )


def find_delivery(request: KubernetesRequest) -> Choice:
    """Chooses how a request's code gets to the pod; reads the project's files, sends no request.

    Raises:
        BackendError: No way is possible, or the project does not meet the requirements of the way.
    """
    config = request.config
    needs_size = config.code_delivery == "archive" or (
        config.code_delivery is None and not config.repository_uri and not request.build_image
    )
    archive = pack_project(request.working_copy.directory) if needs_size else None
    choice = choose_delivery(
        config.code_delivery,
        repository_uri=config.repository_uri,
        build_image=request.build_image,
        archive_size=None if archive is None else len(archive),
    )
    if choice.delivery == "git":
        find_checkout(request.working_copy)
    return choice


def map_project_paths(request: KubernetesRequest, delivery: DeliveryName, paths: Mapping[str, str]) -> dict[str, str]:
    """Returns the values of ``path`` parameters relative to the project's folder.

    Raises:
        BackendError: A path is outside the project, or is not delivered.
    """
    directory = request.working_copy.directory
    delivered = (
        {file.name for file in project_files(directory, backend=BACKEND)} if delivery in ("archive", "image") else None
    )
    advice = (
        "Declare the parameter as 'uri' and open it in the project's code, or mount a volume in the job template and pass "
        "its path as a 'string'."
    )
    mapped: dict[str, str] = {}
    for name, value in paths.items():
        unreachable = f"The pod can't be given parameter {name!r}: {value}"
        if "://" in value or not value.startswith("/"):
            raise backend_error(f"{unreachable} is not part of the project. {advice}")
        if not Path(value).is_relative_to(directory):
            raise backend_error(f"{unreachable} is not inside the project {directory}. {advice}")
        inside = Path(value).relative_to(directory).as_posix()
        if delivered is not None and inside != "." and inside not in delivered:
            raise backend_error(
                f"{unreachable} is excluded from what is delivered. Include it with '!{inside}' in the project's "
                ".dockerignore."
            )
        mapped[name] = inside
    return mapped


def pack_project(directory: Path) -> bytes | None:
    """Returns the project as a compressed archive; None if it exceeds `ARCHIVE_LIMIT`.

    Raises:
        BackendError: A file can't be read.
    """
    packed = io.BytesIO()
    files = project_files(directory, backend=BACKEND)
    for piece in iterate_archive(files, compressed=True, tar_format=tarfile.GNU_FORMAT, backend=BACKEND):
        packed.write(piece)
        if packed.tell() > ARCHIVE_LIMIT:
            return None
    return packed.getvalue()


@dataclass(frozen=True)
class PushedImage:
    """An image in a registry; `reference` is its name pinned by `digest`, `reused` is true if it was built earlier."""

    reference: str
    digest: str
    reused: bool


def no_image() -> BackendError:
    """Returns the error for a request that names no image."""
    return backend_error(
        "No image is named for the Kubernetes pod: pass docker_args={'image': 'name:tag'}, write 'docker_env: {image: ...}' "
        "into the MLproject file, or set the image of the job template's container."
    )


def base_image(request: KubernetesRequest) -> str:
    """Returns the image that a project's own image is built on.

    Raises:
        BackendError: The request names none.
    """
    if not request.image:
        raise no_image()
    return request.image


def push_project_image(request: KubernetesRequest, report: Report, stop: StopSignal) -> PushedImage:
    """Builds the project's image on the Docker engine, unless its files are unchanged, and pushes it.

    Raises:
        BackendError: No engine answers, or it could not build or push the image.
    """
    base, login = base_image(request), reveal_all(request.docker_auth) if request.docker_auth else None
    try:
        engine = connect(LocalConfig(), backend=BACKEND, timeout=_ENGINE_SECONDS)
    except BackendError as error:
        raise backend_error(
            f"'code-delivery: image' needs a Docker engine to build with. {error.message} 'code-delivery: archive' and 'git' "
            "need none."
        ) from None
    try:
        base_id, _ = ensure_image(engine, base, pull="missing", auth=login, backend=BACKEND, report=report, stop=stop)
        repository, copy = request.config.repository_uri, request.working_copy
        built = build_project_image(engine, base, base_id, copy, repository, backend=BACKEND, report=report, stop=stop)
        reference = push_image(engine, built.name, auth=login, backend=BACKEND, report=report, stop=stop)
    finally:
        engine.close()
    return PushedImage(reference, reference.rpartition("@")[2], built.reused)


@dataclass(frozen=True)
class GitCheckout:
    """A commit for an init container to clone.

    Attributes:
        url: URL of the repository, without credentials.
        commit: The full SHA.
        subdirectory: The project's folder in the repository; empty for its top.
        child_env: Credentials of the repository as variables of the init container; secret.
    """

    url: str
    commit: str
    subdirectory: str = ""
    child_env: Mapping[str, str] = field(default_factory=dict, repr=False)


def find_checkout(copy: WorkingCopy) -> GitCheckout:
    """Returns the commit that an init container has to clone, without credentials.

    Raises:
        BackendError: The project is not at a commit, its repository has no remote, or files differ from the commit.
    """
    if copy.commit is None or copy.repository_url is None:
        missing = "is not at a git commit" if copy.commit is None else "is in a git repository without a remote"
        raise backend_error(f"{_NO_GIT} the project {copy.uri} {missing}. {_WAYS}")
    try:
        address = parse_git_url(copy.repository_url)
    except FetchError as error:
        raise backend_error(f"{_NO_GIT} {error} {_WAYS}") from None
    if address is None or address.scheme == "file":
        raise backend_error(
            f"{_NO_GIT} the repository's remote {copy.repository_url} is a folder of this machine, which a pod can't clone. "
            f"{_WAYS}"
        )
    if copy.dirty:
        raise backend_error(
            f"'code-delivery: git' would run commit {copy.commit[:12]}, but the project's files differ from it. Commit and "
            "push them, or use 'archive' or 'image'."
        )
    return GitCheckout(address.url, copy.commit, copy.source_name.partition("#")[2])


def with_credentials(checkout: GitCheckout, lookup: GitCredentialsLookup | None) -> GitCheckout:
    """Returns a checkout with the credentials that `lookup` has for its repository's host; `lookup` blocks."""
    address = parse_git_url(checkout.url)
    credentials = lookup(checkout.url, address.host) if lookup is not None and address is not None else None
    if credentials is None or address is None:
        return checkout
    return replace(checkout, child_env=_credential_env(credentials, address.scheme))


def _credential_env(credentials: GitCredentials, scheme: str) -> dict[str, str]:
    child_env: dict[str, str] = {}
    if scheme in ("http", "https") and credentials.token is not None:
        child_env |= {_TOKEN: credentials.token, _USERNAME: credentials.username or "git"}
    if scheme == "ssh" and credentials.ssh_private_key is not None:
        child_env[_SSH_KEY] = credentials.ssh_private_key.strip()
        if credentials.known_hosts is not None:
            child_env[_KNOWN_HOSTS] = credentials.known_hosts.strip()
    return child_env
