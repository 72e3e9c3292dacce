"""The semi-private parts of Prefect's client that this package uses, each behind one function.

Checked with prefect 3.8. ``tests/integration/server/test_compat.py`` holds a contract test for each function, and for
each use of `prefect.server` in `server.application`; its messages say what breaks when Prefect changes. The linter bans
these parts of Prefect in all other modules (``banned-api`` in ``pyproject.toml``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.secrets import Secret, reveal
from prefect_mlprojects.server.access import password_for

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


def schema_errors(parameters: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Returns what a flow run's parameters violate in a deployment's schema, as Prefect's server reads it."""
    from prefect.utilities.schema_tools.validation import validate

    errors = validate(dict(parameters), dict(schema))
    return [f"{'.'.join(map(str, error.absolute_path)) or 'run options'}: {error.message}" for error in errors]


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


def abandon_services() -> None:
    """Lets this process exit without sending the logs and events that Prefect's services still hold."""
    from prefect._internal.concurrency.services import _QueueServiceBase

    services: Any = _QueueServiceBase
    # At exit each service is drained, which waits for this event.
    for service in tuple(services._instances.values()):  # noqa: SLF001
        if service._loop is not None and service._done_event is not None:  # noqa: SLF001
            service._loop.call_soon_threadsafe(service._done_event.set)  # noqa: SLF001


async def schedule_dates(schedule: Any, count: int) -> list[datetime]:
    """Returns the next dates of a schedule of the client, as the server's scheduler computes them.

    Raises:
        ValueError: It never fires.
    """
    from prefect.server.schemas import schedules

    server_schedule = getattr(schedules, type(schedule).__name__).model_validate(schedule.model_dump())
    dates: list[datetime] = await server_schedule.get_dates(count)
    return dates


def use_api_everywhere(api_url: str) -> None:
    """Changes the Prefect API of this process, and its password, for code that enters no settings of its own."""
    from prefect import context
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED

    present = context.GLOBAL_SETTINGS_CONTEXT
    updates: dict[Any, Any] = {
        PREFECT_API_URL: api_url,
        PREFECT_API_AUTH_STRING: password_for(api_url, PREFECT_API_AUTH_STRING.value_from(present.settings)),
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False,
    }
    settings = present.settings.copy_with_update(updates=updates)
    context.GLOBAL_SETTINGS_CONTEXT = context.SettingsContext(profile=present.profile, settings=settings)


def publish_profile(name: str, api_url: str, auth: Secret | None = None) -> None:
    """Names a Prefect API and its password in a profile and makes that the active one, unless the user has chosen another.

    Raises:
        OSError: The file of profiles can't be written, or can't be closed to other users.
    """
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        Profile,
        get_current_settings,
        load_profiles,
        save_profiles,
    )

    profiles = load_profiles(include_defaults=False)
    active = profiles.active_name
    chosen = active is not None and active != name and (active != "ephemeral" or active in profiles.names)
    if chosen or os.environ.get("PREFECT_PROFILE", name) != name:
        return
    settings = {PREFECT_API_URL: api_url, PREFECT_API_AUTH_STRING: reveal(auth) if auth is not None else None}
    if name not in profiles.names:
        profiles.add_profile(Profile(name=name, settings={}))
    profiles.update_profile(name, settings)
    profiles.set_active(name)
    if auth is not None:
        # Before the password is written: Prefect keeps the mode of an existing file.
        file = Path(str(get_current_settings().profiles_path))
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
        file.chmod(0o600)
    save_profiles(profiles)


def subscribe_to_events(*names: str) -> AbstractAsyncContextManager[Any]:
    """Opens a subscription to events by name; it yields an asynchronous iterator of events."""
    from prefect.events.clients import get_events_subscriber
    from prefect.events.filters import EventFilter, EventNameFilter

    return get_events_subscriber(filter=EventFilter(event=EventNameFilter(name=list(names))))
