"""Reads blocks by name, in memory, just before their values are used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.configuration import is_block_reference, load_backend_config
from prefect_mlprojects.exceptions import BackendError, ExecutionException, InvalidInputError
from prefect_mlprojects.request import PROJECT_SCHEME
from prefect_mlprojects.sources.git import GitCredentials, GitCredentialsLookup, GitUrl, host_origins

if TYPE_CHECKING:
    from prefect.blocks.core import Block
    from prefect.client.orchestration import PrefectClient

GIT_CREDENTIALS_SLUG = "git-credentials"
PROJECT_SLUG = "mlflow-project"
TRACKING_SLUG = "mlflow-tracking-server"

# The block type of a bare name, by the configuration's key and the backend.
_BLOCK_KEYS: Mapping[str, Mapping[str, str]] = {
    "credentials": {
        "local": "docker-registry",
        "kubernetes": "kubernetes-cluster",
        "databricks": "databricks-workspace",
    },
    "docker-engine": {"local": "docker-engine"},
}


async def load_block(client: PrefectClient, slug: str, name: str) -> Block:
    """Returns a block with its secrets; raises `ExecutionException` if it does not exist or can't be read here."""
    from prefect.exceptions import ObjectNotFound

    import prefect_mlprojects.blocks  # noqa: F401 - defines the block types
    from prefect_mlprojects.server.compat import block_from_document

    try:
        document = await client.read_block_document_by_name(name, slug)
    except ObjectNotFound:
        names = await _names(client, slug)
        raise InvalidInputError(
            f"The Prefect server has no block '{slug}/{name}'"
            + (f"; blocks of that type: {', '.join(names)}" if names else "")
            + ". Create it in the UI under Blocks, or with Block.save() in Python; `mlprojects blocks register` registers the "
            "block types of this package."
        ) from None
    try:
        return block_from_document(document)
    except Exception as error:
        raise ExecutionException(
            f"The block '{slug}/{name}' can't be read here: {type(error).__name__}. Install the package that defines "
            "its type where the run executes."
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
    """Returns a backend's configuration with the blocks that it names replaced by their values."""
    if isinstance(config, str) and is_block_reference(config):
        slug, _, name = config.partition("/")
        block = await load_block(client, slug, name)
        get_config = getattr(block, "get_backend_config", None)
        if not callable(get_config):
            raise BackendError(
                f"The block '{config}' is not a backend configuration. Use one of the types mlproject-backend, "
                "kubernetes-backend or databricks-backend.",
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
        values = get_credentials() if callable(get_credentials) else plain_values(block)
        resolved[key] = dict(values) if isinstance(values, Mapping) else values
    return resolved


def plain_values(block: Block) -> dict[str, Any]:
    """Returns the fields of a block that are set, its secrets in plain text; for use in memory."""
    values = {name: getattr(block, name) for name in type(block).model_fields}
    plain = {
        name: value.get_secret_value() if hasattr(value, "get_secret_value") else value
        for name, value in values.items()
    }
    # A form of Prefect's UI stores an empty text.
    return {name: value for name, value in plain.items() if value not in (None, "")}


async def resolve_tracking(client: PrefectClient, name: str) -> Secret:
    """Returns the tracking URI of a block, with its user name and password."""
    block: Any = await load_block(client, TRACKING_SLUG, name)
    return Secret(block.tracking_uri())


async def find_git_credentials(client: PrefectClient, url: GitUrl, name: str | None = None) -> GitCredentials | None:
    """Returns the git credentials of the block called `name`; without a name, of the one that lists the URL's host."""
    from prefect.exceptions import PrefectHTTPStatusError

    if name is not None:
        block: Any = await load_block(client, GIT_CREDENTIALS_SLUG, name)
        named: GitCredentials = block.get_credentials()
        return named
    try:
        documents = await client.read_block_documents_by_type(GIT_CREDENTIALS_SLUG, include_secrets=False)
    except PrefectHTTPStatusError:
        # The type is not registered, so no blocks of it exist.
        return None
    listing = (
        document.name
        for document in documents
        if document.name and any(url.origin in host_origins(str(host)) for host in document.data.get("hosts") or ())
    )
    found = min(listing, default=None)
    return await find_git_credentials(client, url, found) if found else None


def git_credentials_lookup(
    client: PrefectClient, loop: asyncio.AbstractEventLoop, name: str | None
) -> GitCredentialsLookup:
    """Returns a look-up of git credentials, for threads: `loop`, which `client` belongs to, must keep running meanwhile."""
    known: dict[str, GitCredentials | None] = {}

    def lookup(url: GitUrl) -> GitCredentials | None:
        if url.origin not in known:
            found = asyncio.run_coroutine_threadsafe(find_git_credentials(client, url, name), loop).result()
            known[url.origin] = found
        return known[url.origin]

    return lookup


async def read_project(client: PrefectClient, uri: str) -> dict[str, Any]:
    """Returns the fields of the project block of a ``block://NAME`` URI; a ``#sub/directory`` of the URI takes precedence."""
    name, _, below = uri.removeprefix(PROJECT_SCHEME).partition("#")
    block = await load_block(client, PROJECT_SLUG, name)
    values = plain_values(block)
    if below:
        values["uri"] = f"{str(values['uri']).partition('#')[0]}#{below}"
    return values
