"""Reads from a Prefect API without importing Prefect, whose import takes longer than the rest of a short command."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.error import URLError
from uuid import uuid4

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import PrefectServerError
from prefect_mlprojects.server.address import send


class RestApi:
    """A Prefect API; each method raises `PrefectServerError` if it can't be reached or refuses.

    `timeout` is the time limit of one request, in seconds.
    """

    def __init__(self, api_url: str, timeout: float = 30.0) -> None:
        self.api_url = api_url
        self._timeout = timeout
        self._csrf: dict[str, str] = {}

    def get(self, path: str) -> Any:
        """Returns an object; None if it does not exist."""
        status, answer = self._send(path)
        return None if status == 404 else self._checked(path, status, answer)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Returns the answer to a query."""
        data = json.dumps(body).encode()
        status, answer = self._send(path, data)
        if status == 403 and b"CSRF" in answer.upper():
            self._csrf = self._csrf_headers()
            status, answer = self._send(path, data)
        return self._checked(path, status, answer)

    def _csrf_headers(self) -> dict[str, str]:
        # As prefect.client.base.PrefectHttpxAsyncClient; only servers with CSRF protection want it.
        client = str(uuid4())
        token = self.get(f"/csrf-token?client={client}")
        return {"Prefect-Csrf-Token": str(token["token"]), "Prefect-Csrf-Client": client}

    def _send(self, path: str, data: bytes | None = None) -> tuple[int, bytes]:
        url = self.api_url.rstrip("/") + path
        try:
            return send(url, self._timeout, data, {"Content-Type": "application/json", **self._csrf})
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, URLError) else error
            raise PrefectServerError(
                f"The Prefect server at {redact(self.api_url)} can't be reached: {str(cause) or type(cause).__name__}."
                " Is it running, and is PREFECT_API_URL right?",
                api_url=redact(self.api_url),
            ) from None

    def _checked(self, path: str, status: int, answer: bytes) -> Any:
        if status != 200:
            raise PrefectServerError(
                f"The Prefect server at {redact(self.api_url)} answered {status} to {path.partition('?')[0]}.",
                api_url=redact(self.api_url),
            )
        return json.loads(answer)
