"""Calls a Prefect API on the package's event loop, independent of the process's Prefect settings."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prefect_mlprojects._support.event_loop import background_loop
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.access import password_for

_T = TypeVar("_T")


@contextmanager
def use_api(api_url: str) -> Iterator[None]:
    """Makes `api_url` the Prefect API of the current context; does nothing if the settings already name it."""
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
        temporary_settings,
    )

    configured = PREFECT_API_AUTH_STRING.value()
    password = password_for(api_url, configured)
    if PREFECT_API_URL.value() == api_url and password == configured:
        yield
        return
    # The embedded server needs no CSRF token, and fetching one costs each client a request.
    changes = {PREFECT_API_URL: api_url, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False, PREFECT_API_AUTH_STRING: password}
    with temporary_settings(changes):
        yield


def api_variables() -> dict[str, Secret | str]:
    """Returns the variables by which a Prefect client in another process uses the API of the current settings."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

    url, auth = PREFECT_API_URL.value(), PREFECT_API_AUTH_STRING.value()
    return {
        **({"PREFECT_API_URL": str(url)} if url else {}),
        **({"PREFECT_API_AUTH_STRING": Secret(str(auth))} if url and auth else {}),
    }


def call_api(api_url: str, method: Callable[..., Coroutine[Any, Any, _T]], *arguments: Any) -> _T:
    """Calls ``method(client, *arguments)`` with a `PrefectClient` on the event loop and returns its result.

    Raises:
        PrefectServerError: The server can't be reached, or answered with an error.
    """

    async def call() -> _T:
        import httpx
        from prefect.client.orchestration import get_client

        with use_api(api_url):
            try:
                async with get_client() as client:
                    return await method(client, *arguments)
            except httpx.HTTPStatusError as error:
                raise PrefectServerError(
                    f"The Prefect server at {api_url} answered {error.response.status_code} to"
                    f" {error.request.method} {error.request.url.path}.",
                    api_url=api_url,
                ) from error
            except httpx.TransportError as error:
                raise PrefectServerError(
                    f"The Prefect server at {api_url} can't be reached: {str(error) or type(error).__name__}."
                    " Is it running, and is PREFECT_API_URL right?",
                    api_url=api_url,
                ) from error

    return background_loop().run(call())


_PAGE = 200  # the most that Prefect's server returns at once


async def read_all(read: Callable[..., Coroutine[Any, Any, list[_T]]], **arguments: Any) -> list[_T]:
    """Returns all objects that a paged method of a `PrefectClient` reads."""
    found: list[_T] = []
    while True:
        page = await read(**arguments, limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            return found


def flow_run_url(ui_url: str | None, flow_run_id: str) -> str | None:
    """Returns the URL of a flow run's page in the Prefect UI; None if the UI's URL is not known."""
    return f"{ui_url.rstrip('/')}/runs/flow-run/{flow_run_id}" if ui_url else None
