"""Talking to one Prefect API from this package's event loop, whatever the process's own Prefect settings are."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prefect_mlprojects._support.event_loop import background_loop
from prefect_mlprojects.exceptions import PrefectServerError

_T = TypeVar("_T")


@contextmanager
def use_api(api_url: str) -> Iterator[None]:
    """Makes ``api_url`` the Prefect API of this context; the process's environment stays as it is.

    Args:
        api_url: The API's address. A process that is configured for it already keeps its settings untouched.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED, temporary_settings

    if PREFECT_API_URL.value() == api_url:
        yield
        return
    # The embedded server asks for no CSRF token: asking for one would cost each client a request.
    with temporary_settings({PREFECT_API_URL: api_url, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False}):
        yield


def call_api(api_url: str, method: Callable[..., Coroutine[Any, Any, _T]], *arguments: Any) -> _T:
    """Calls ``method(client, *arguments)`` on the event loop and returns its result.

    Args:
        api_url: The API's address.
        method: A coroutine function that takes a ``PrefectClient`` first.
        *arguments: What it takes after that.

    Raises:
        PrefectServerError: The server could not be reached, or answered with an error.
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


def flow_run_url(ui_url: str | None, flow_run_id: str) -> str | None:
    """Returns the flow run's page in the Prefect UI, or None when the UI's address is not known."""
    return f"{ui_url.rstrip('/')}/runs/flow-run/{flow_run_id}" if ui_url else None
