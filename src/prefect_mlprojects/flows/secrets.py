"""A run's secrets: those that it lacks, those that it refers to, and those that it finds on its way."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from prefect_mlprojects._support.known_secrets import KnownSecrets
from prefect_mlprojects._support.secrets import Secret, Withheld, reveal
from prefect_mlprojects.blocks.resolution import git_credentials_lookup, load_block
from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.request.check import CheckedRun, RunSecrets
from prefect_mlprojects.sources.git import GitCredentials, GitCredentialsLookup, GitUrl
from prefect_mlprojects.spec.secrets import BLOCK_SCHEME, VARIABLE_SCHEME

_logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient


def credentials_lookup(client: PrefectClient, name: str | None, known: KnownSecrets) -> GitCredentialsLookup:
    """Returns a look-up of git credentials, for threads, which are redacted in the run's output and messages."""
    lookup = git_credentials_lookup(client, asyncio.get_running_loop(), name)

    def find(url: GitUrl) -> GitCredentials | None:
        if found := lookup(url):
            known.add(*(Secret(each) for each in (found.token, found.ssh_private_key) if each))
        return found

    return find


def refuse_missing(request: RunRequest, secrets: RunSecrets) -> None:
    """Raises `ParameterError` if the process that started this run kept values in memory, and this is another process."""
    problems = [
        Problem(f"{name} was given in memory and is not stored", parameter=name) for name in secrets.missing(request)
    ]
    if problems:
        advice = "start the run again with run() or `mlprojects run`, or refer to secrets by blocks"
        raise ParameterError("The run lacks values", [*problems, Problem(advice)])


async def store_public_parameters(
    client: PrefectClient, flow_run_id: UUID, request: RunRequest, secrets: RunSecrets, checked: CheckedRun
) -> None:
    """Stores the parameters that were withheld until the project was read, and are not secret."""
    public = {
        name: reveal(value)
        for name, value in secrets.parameters.items()
        if isinstance(value, Withheld) and name not in checked.parameters.secrets
    }
    if public:
        stored = replace(request, parameters={**(request.parameters or {}), **public})
        try:
            await client.update_flow_run(flow_run_id, parameters=asdict(stored))
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("The flow run's parameters could not be stored: %s", error)


def secret_resolver(client: PrefectClient, known: KnownSecrets) -> Callable[[str, Secret], Secret]:
    """Returns a function for threads that returns the value of a secret parameter, which may be a reference."""
    loop = asyncio.get_running_loop()

    def resolve(name: str, value: Secret) -> Secret:
        text = reveal(value)
        if text.startswith(BLOCK_SCHEME):
            block = load_block(client, "secret", text.removeprefix(BLOCK_SCHEME))
            value = Secret(_text(asyncio.run_coroutine_threadsafe(block, loop).result()))
        elif text.startswith(VARIABLE_SCHEME):
            variable = text.removeprefix(VARIABLE_SCHEME)
            if variable not in os.environ:
                problem = f"parameter '{name}' is {text}, but the variable {variable} is not set where the run executes"
                raise ParameterError("A secret parameter has no value", [Problem(problem, parameter=name)])
            value = Secret(os.environ[variable])
        known.add(value)
        return value

    return resolve


def _text(block: Any) -> str:
    """Returns the value of a Secret block, which may be any JSON data."""
    value = block.get()
    return value if isinstance(value, str) else str(value)
