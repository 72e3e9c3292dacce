"""Contracts with the parts of Prefect that are not public: each message says what breaks when Prefect changes one.

All uses are in ``server/compat.py`` and ``server/application.py``; the linter bans them elsewhere.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_mlprojects._support.event_loop import background_loop
from prefect_mlprojects.server.api import use_api
from prefect_mlprojects.server.compat import (
    block_from_document,
    client_context,
    run_flow,
    schema_errors,
    set_parameter_schema,
    subscribe_to_events,
)
from prefect_mlprojects.server.process import ServerAddress

Call = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def call(prefect_server: ServerAddress) -> Call:
    """Runs a coroutine function on the package's event loop, with the session's server as the API."""

    async def within(function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        with use_api(prefect_server.api_url):
            return await asyncio.wait_for(function(), 60)

    return lambda function: background_loop().run(within(function))


def test_transactions_begin_immediate() -> None:
    from prefect_mlprojects.server.application import ImmediateSqliteConfiguration

    async def modes() -> list[str]:
        from prefect.server.database.configurations import SQLITE_BEGIN_MODE
        from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

        seen: list[str] = []
        engine = create_async_engine("sqlite+aiosqlite://")
        configuration = ImmediateSqliteConfiguration(connection_url="sqlite+aiosqlite://")
        async with AsyncSession(engine) as session, configuration.begin_transaction(session):
            seen.append(str(SQLITE_BEGIN_MODE.get()))
        await engine.dispose()
        return seen

    assert asyncio.run(modes()) == ["IMMEDIATE"], (
        "BaseDatabaseConfiguration.begin_transaction(with_for_update=True) no longer begins IMMEDIATE transactions: "
        "concurrent runs get 503 from the embedded server"
    )


INSTALLED = """
from prefect.server.database import dependencies
import prefect_mlprojects.server.application as application
application.create_app()
print(type(dependencies.provide_database_interface().database_config).__name__)
"""


def test_application_uses_custom_database_configuration(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT")},
            "PREFECT_HOME": str(tmp_path),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path / 'p.db'}",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["ImmediateSqliteConfiguration"], (
        "provide_database_interface() ignores MODELS_DEPENDENCIES['database_config']: the embedded server runs on "
        f"Prefect's own configuration, with DEFERRED transactions\n{done.stderr}"
    )
    assert (tmp_path / "p.db").exists()
    assert "migrations failed" not in done.stderr, (
        "MigrationConfiguration no longer fits the migrations' env.py: the first start takes some 4 s longer"
    )


def test_application_factory_accepts_final_parameter() -> None:
    from prefect.server.api.server import create_app

    assert "final" in inspect.signature(create_app).parameters, (
        "prefect.server.api.server.create_app() has no 'final': the embedded server does not start"
    )


def test_block_from_document_has_its_values(call: Call) -> None:
    from prefect.blocks.system import Secret
    from prefect.client.orchestration import get_client

    name = f"contract-{uuid.uuid4().hex[:8]}"

    async def save_and_load() -> Any:
        block: Any = Secret(value=SecretStr("of the contract"))
        async with get_client() as client:
            await block.save(name, client=client)
            return block_from_document(await client.read_block_document_by_name(name, "secret"))

    block = call(save_and_load)
    assert isinstance(block, Secret), "Block._from_block_document() no longer finds the class: no block can be named"
    assert block.get() == "of the contract", "Block._from_block_document() loses secrets: credentials blocks are empty"


def test_deployment_has_our_parameter_schema(call: Call) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client

    @flow
    def contract(**parameters: Any) -> None: ...

    schema = {"type": "object", "properties": {"rate": {"type": "number"}}, "required": ["rate"]}

    async def deploy() -> Any:
        deployment: Any = contract.to_deployment(name=f"contract-{uuid.uuid4().hex[:8]}")
        if inspect.isawaitable(deployment):
            deployment = await deployment
        set_parameter_schema(deployment, schema)
        applied = deployment.apply()
        identifier = await applied if inspect.isawaitable(applied) else applied
        async with get_client() as client:
            stored = (await client.read_deployment(identifier)).parameter_openapi_schema
            await client.delete_deployment(identifier)
            return stored

    stored = call(deploy)
    assert stored["properties"] == schema["properties"], (
        "RunnerDeployment.apply() ignores _parameter_openapi_schema: `mlprojects serve` shows no typed form"
    )


def test_flow_runs_as_an_existing_flow_run(call: Call) -> None:
    from prefect import flow
    from prefect.runtime import flow_run as runtime
    from prefect.states import Pending

    @flow
    async def contract(word: str) -> str:
        return f"{word} {runtime.id}"

    async def run() -> tuple[Any, Any]:
        async with client_context() as outer, client_context() as inner:
            assert outer.client is inner.client, (
                "AsyncClientContext.get_or_create() opens a client each time: each task opens a connection of its own"
            )
            created = await outer.client.create_flow_run(contract, parameters={"word": "hi"}, state=Pending())
            state = await run_flow(contract, {"word": "hi"}, created)
            return created, state and await state.result()

    created, result = call(run)
    assert result == f"hi {created.id}", (
        "run_flow_async(flow_run=…) no longer runs the given flow run: run() would return the id of another one"
    )


def test_flow_run_events_arrive(call: Call) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling, Running

    @flow
    async def contract() -> None: ...

    async def cancel() -> tuple[str, str]:
        async with get_client() as client:
            created = await client.create_flow_run(contract, state=Running())
            async with subscribe_to_events("prefect.flow-run.Cancelling") as events:
                await client.set_flow_run_state(created.id, Cancelling(), force=True)
                async for event in events:
                    if event.resource.id.endswith(str(created.id)):
                        return str(created.id), event.resource.id
        raise AssertionError("the subscription ended")

    identifier, resource = call(cancel)
    assert resource == f"prefect.flow-run.{identifier}", (
        "the resource of a flow run's events has another id: a cancellation is noticed by the slow poll only"
    )


def test_abandoned_services_do_not_delay_the_exit_of_a_process() -> None:
    # An address that accepts and never answers: without `abandon_services` the exit waits for minutes.
    code = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
import os
os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
from prefect.events.worker import EventsWorker
from prefect.events import Event, Resource
from prefect.logging.handlers import APILogWorker
EventsWorker.instance().send(Event(event="x", resource=Resource({"prefect.resource.id": "x"})))
APILogWorker.instance().send({"message": "x", "__payload_size__": 1})
from prefect_mlprojects.server.compat import abandon_services
abandon_services()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, "Prefect's services changed: an interrupted run waits for a server that is gone"


def test_parameters_are_checked_as_by_the_server() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}}},
        "required": ["c"],
    }
    wrong = schema_errors({"a": {"b": "x"}}, schema)
    assert sorted(each.partition(":")[0] for each in wrong) == ["a.b", "run options"]
    assert "run options: 'c' is a required property" in wrong
    assert schema_errors({"a": {"b": 1}, "c": None}, schema) == []
