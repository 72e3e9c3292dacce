"""Turns the names of blocks into what they hold: in memory, just before it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect_mlprojects.backends.configuration import is_block_reference, load_backend_config
from prefect_mlprojects.exceptions import BackendError, ExecutionException
from prefect_mlprojects.runs.request import PROJECT_SCHEME
from prefect_mlprojects.sources.git.credentials import GitCredentials, GitCredentialsLookup

if TYPE_CHECKING:
    from prefect.blocks.core import Block
    from prefect.client.orchestration import PrefectClient

GIT_CREDENTIALS_SLUG = "git-credentials"
PROJECT_SLUG = "mlflow-project"
TRACKING_SLUG = "mlflow-tracking-server"

# The block that a bare name means, by the key of the configuration that holds it, and the backend.
_BLOCK_KEYS: Mapping[str, Mapping[str, str]] = {
    "credentials": {
        "local": "docker-registry",
        "kubernetes": "kubernetes-cluster",
        "databricks": "databricks-workspace",
    },
    "docker-engine": {"local": "docker-engine"},
}


async def load_block(client: PrefectClient, slug: str, name: str) -> Block:
    """Loads a block with its secrets.

    Args:
        client: Prefect's client.
        slug: The slug of its type.
        name: Its name.

    Raises:
        ExecutionException: There is none of that name, or its type is not known to this Python environment.
    """
    from prefect.exceptions import ObjectNotFound

    import prefect_mlprojects.blocks  # noqa: F401 - its classes must be known before one is looked for
    from prefect_mlprojects.server.compat import block_from_document

    try:
        document = await client.read_block_document_by_name(name, slug)
    except ObjectNotFound:
        there = await _names(client, slug)
        raise ExecutionException(
            f"There is no block '{slug}/{name}' on the Prefect server"
            + (f"; of that type there are {', '.join(there)}" if there else "")
            + ". Make it in the UI under Blocks, or by Block.save() in Python; `mlprojects blocks register` makes the types of "
            "this package known to a server."
        ) from None
    try:
        return block_from_document(document)
    except Exception as error:
        raise ExecutionException(
            f"The block '{slug}/{name}' can't be read here: {type(error).__name__}. The package that defines its type must be "
            "installed where the run is."
        ) from error


async def _names(client: PrefectClient, slug: str) -> list[str]:
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        documents = await client.read_block_documents_by_type(slug, include_secrets=False)
    except PrefectHTTPStatusError:
        return []
    return sorted(document.name for document in documents if document.name)


async def resolve_backend_config(
    client: PrefectClient, config: Mapping[str, Any] | str | None, backend: str
) -> dict[str, Any]:
    """Returns a backend's configuration with what it names in blocks.

    Args:
        client: Prefect's client.
        config: A mapping, a file, a JSON text, or the name of a block (``block-type/block-name``).
        backend: The backend's name.

    Raises:
        ExecutionException: A block is missing or is not one for a backend.
    """
    if isinstance(config, str) and is_block_reference(config):
        slug, _, name = config.partition("/")
        block = await load_block(client, slug, name)
        get_config = getattr(block, "get_backend_config", None)
        if not callable(get_config):
            raise BackendError(
                f"The block '{config}' holds no configuration of a backend. Name one of the types "
                "mlproject-backend, kubernetes-backend or databricks-backend.",
                backend=backend,
            )
        resolved = dict(get_config())
    else:
        resolved = load_backend_config(config, backend=backend)
    for key, slugs in _BLOCK_KEYS.items():
        named = resolved.get(key)
        if not isinstance(named, str):
            continue
        slug, separator, name = named.rpartition("/")
        default = slugs.get(backend)
        if not separator and default is None:
            raise BackendError(f"The backend {backend} takes no {key}.", backend=backend)
        block = await load_block(client, slug or default or "", name)
        get_credentials = getattr(block, "get_credentials", None)
        values = get_credentials() if callable(get_credentials) else _plain(block)
        resolved[key] = dict(values) if isinstance(values, Mapping) else values
    return resolved


def _plain(block: Block) -> dict[str, Any]:
    """The fields of another package's block, secrets included."""
    values = {name: getattr(block, name) for name in type(block).model_fields}
    return {
        name: value.get_secret_value() if hasattr(value, "get_secret_value") else value
        for name, value in values.items()
        if value is not None
    }


async def resolve_tracking(client: PrefectClient, name: str) -> str:
    """Returns the tracking URI of a block, with its user name and password.

    Args:
        client: Prefect's client.
        name: The block's name.

    Raises:
        ExecutionException: There is no such block.
    """
    block: Any = await load_block(client, TRACKING_SLUG, name)
    uri: str = block.tracking_uri()
    return uri


async def find_git_credentials(client: PrefectClient, host: str, name: str | None = None) -> GitCredentials | None:
    """Returns the git credentials of a block: the named one, else the one whose hosts name the host most exactly.

    Args:
        client: Prefect's client.
        host: The host, with the port if the URL names one.
        name: The block's name; None to look for one by host.

    Raises:
        ExecutionException: There is no block of that name.
    """
    from prefect.exceptions import PrefectHTTPStatusError

    if name is not None:
        block: Any = await load_block(client, GIT_CREDENTIALS_SLUG, name)
        named: GitCredentials = block.get_credentials()
        return named
    try:
        documents = await client.read_block_documents_by_type(GIT_CREDENTIALS_SLUG, include_secrets=False)
    except PrefectHTTPStatusError:
        # The server knows no such type: nobody has made one.
        return None
    found = None
    for document in sorted(documents, key=lambda each: each.name or ""):
        hosts = [str(each).strip().lower() for each in document.data.get("hosts") or ()]
        rank = 3 if host in hosts else 2 if host.partition(":")[0] in hosts else 0
        if rank and document.name and (found is None or rank > found[0]):
            found = (rank, document.name)
    return await find_git_credentials(client, host, found[1]) if found is not None else None


def git_credentials_lookup(
    client: PrefectClient, loop: asyncio.AbstractEventLoop, name: str | None
) -> GitCredentialsLookup:
    """Returns the lookup that fetching a git project asks, from a thread, when it needs credentials.

    Args:
        client: Prefect's client, which belongs to the loop.
        loop: The event loop, which must go on while the project is fetched.
        name: The name of a block; None to look for one by host.
    """
    known: dict[str, GitCredentials | None] = {}

    def lookup(url: str, host: str) -> GitCredentials | None:  # noqa: ARG001 - the contract's signature
        if not host:
            return None
        if host not in known:
            known[host] = asyncio.run_coroutine_threadsafe(find_git_credentials(client, host, name), loop).result()
        return known[host]

    return lookup


async def read_project(client: PrefectClient, uri: str) -> dict[str, Any]:
    """Returns what the project block of a ``block://NAME`` URI holds.

    Args:
        client: Prefect's client.
        uri: The URI.

    Returns:
        ``uri`` (with the ``#sub/directory`` of the one given), ``version``, ``entry_point``, ``parameters`` and ``options``.

    Raises:
        ExecutionException: There is no such block.
    """
    name, _, below = uri.removeprefix(PROJECT_SCHEME).partition("#")
    block = await load_block(client, PROJECT_SLUG, name)
    values = _plain(block)
    if below:
        values["uri"] = f"{str(values['uri']).partition('#')[0]}#{below}"
    return values
