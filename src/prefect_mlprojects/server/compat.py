"""The semi-private parts of Prefect's client that this package uses, each behind one function.

Checked with prefect 3.8. ``tests/integration/server/test_compat.py`` holds a contract test for each function, and for
each use of `prefect.server` in `server.application`; its messages say what breaks when Prefect changes. The linter bans
these parts of Prefect in all other modules (``banned-api`` in ``pyproject.toml``).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect.blocks.core import Block
    from prefect.client.schemas.objects import BlockDocument, FlowRun, State
    from prefect.context import AsyncClientContext


def block_from_document(document: BlockDocument) -> Block:
    """Creates a block from its document; `Block.load` would read the document through a client of its own settings."""
    from prefect.blocks.core import Block

    block: Block = Block._from_block_document(document)  # noqa: SLF001 - the reason for this module
    return block


def set_parameter_schema(deployment: Any, schema: Mapping[str, Any]) -> None:
    """Replaces the parameter schema that `Flow.to_deployment` derived from the flow's signature."""
    from prefect.utilities.callables import ParameterSchema

    deployment._parameter_openapi_schema = ParameterSchema.model_validate(dict(schema))  # noqa: SLF001


async def run_flow(flow: Any, parameters: Mapping[str, Any], flow_run: FlowRun | None = None) -> State[Any] | None:
    """Runs an asynchronous flow, as `flow_run` if one was created before, and returns its final state."""
    from prefect.flow_engine import run_flow_async

    state: State[Any] | None = await run_flow_async(
        flow, flow_run=flow_run, parameters=dict(parameters), return_type="state"
    )
    return state


def client_context() -> AbstractAsyncContextManager[AsyncClientContext]:
    """Opens the client that Prefect's engine shares within a flow or task run, or enters the open one."""
    from prefect.context import AsyncClientContext

    return AsyncClientContext.get_or_create()


def subscribe_to_events(*names: str) -> AbstractAsyncContextManager[Any]:
    """Opens a subscription to events by name; it yields an asynchronous iterator of events."""
    from prefect.events.clients import get_events_subscriber
    from prefect.events.filters import EventFilter, EventNameFilter

    return get_events_subscriber(filter=EventFilter(event=EventNameFilter(name=list(names))))
