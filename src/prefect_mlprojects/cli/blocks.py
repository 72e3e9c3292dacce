"""``mlprojects blocks register|list``: the block types of this package on the Prefect server."""

from __future__ import annotations

from typing import Any

import click


@click.group("blocks")
def blocks_command() -> None:
    """Credentials and configurations that are kept on the Prefect server."""


@blocks_command.command("register")
def register() -> None:
    """Make the block types of this package known to the Prefect server, so that its UI can make blocks of them.

    A server in whose environment this package is installed, such as the embedded one, does so by itself when it starts.
    """
    for name in _call(_register):
        click.echo(f"Registered {name}")


@blocks_command.command("list")
def list_blocks() -> None:
    """List the blocks of this package's types, as their type and name."""
    for line in _call(_list):
        click.echo(line)


def _call(method: Any) -> list[str]:
    from prefect_mlprojects.server.api import call_api
    from prefect_mlprojects.server.process import resolve_api

    address = resolve_api(lambda line: click.echo(line, err=True))
    found: list[str] = call_api(address.api_url, method)
    return found


async def _register(client: Any) -> list[str]:
    names = []
    for block in _block_types():
        await block.aregister_type_and_schema(client=client)
        names.append(f"{block.get_block_type_name()} ({block.get_block_type_slug()})")
    return names


async def _list(client: Any) -> list[str]:
    from prefect.exceptions import PrefectHTTPStatusError

    lines = []
    for block in _block_types():
        slug = block.get_block_type_slug()
        try:
            documents = await client.read_block_documents_by_type(slug, include_secrets=False)
        except PrefectHTTPStatusError:
            # The server does not know the type: there are no blocks of it.
            continue
        lines += [f"{slug}/{document.name}" for document in documents if document.name]
    return sorted(lines)


def _block_types() -> list[Any]:
    from prefect_mlprojects import blocks

    return [getattr(blocks, name) for name in blocks.__all__]
