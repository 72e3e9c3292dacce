"""Who asks: tokens, OAuth for service principals, and secrets with their readers."""

from __future__ import annotations

import base64
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from tests.fakes.databricks_api.errors import Refusal, missing, no_endpoint, only

USER = "ada@example.com"


@dataclass
class Directory:
    """Users, service principals, groups and their tokens.

    Attributes:
        tokens: A token -> whose it is.
        users: The users.
        groups: A group -> its members.
        clients: A service principal's client -> its OAuth secret.
        token_seconds: How long an OAuth token is good.
        issued: How many OAuth tokens were handed out.
    """

    tokens: dict[str, str] = field(default_factory=lambda: {"good-token": USER})
    users: set[str] = field(default_factory=lambda: {USER, "bob@example.com"})
    groups: dict[str, set[str]] = field(
        default_factory=lambda: {"admins": set(), "users": {USER, "bob@example.com"}, "data-science": set()}
    )
    clients: dict[str, str] = field(default_factory=lambda: {"robot": "robot-secret"})
    token_seconds: int = 3600
    issued: int = 0
    _ends: dict[str, float] = field(default_factory=dict)

    def who(self, authorization: str | None) -> str:
        """Whose token a request carries."""
        kind, _, token = (authorization or "").partition(" ")
        if kind != "Bearer" or not token:
            raise Refusal(401, "UNAUTHENTICATED", "Credential was not sent or was of an unsupported type for this API.")
        if token not in self.tokens or self._ends.get(token, math.inf) < time.time():
            raise Refusal(403 if token.startswith("dapi") else 401, "UNAUTHENTICATED", "Invalid access token.")
        return self.tokens[token]

    def grant(self, user: str) -> str:
        """A new token for somebody."""
        token = secrets.token_hex(16)
        self.tokens[token] = user
        return token

    def oauth(self, authorization: str, body: bytes) -> dict[str, Any]:
        """``/oidc/v1/token``: https://docs.databricks.com/dev-tools/auth/oauth-m2m."""
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        client, _, secret = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        if not secret or self.clients.get(client) != secret:
            raise Refusal(401, "invalid_client", "Client authentication failed")
        if form.get("grant_type") != "client_credentials" or form.get("scope") != "all-apis":
            raise Refusal(400, "invalid_request", "grant_type or scope is missing")
        token = self.grant(client)
        self._ends[token] = time.time() + self.token_seconds
        self.issued += 1
        return {"access_token": token, "token_type": "Bearer", "expires_in": self.token_seconds}

    def exists(self, principal: Mapping[str, str]) -> bool:
        """Whether an entry of an access control list names somebody."""
        return (
            principal.get("user_name") in self.users
            or principal.get("group_name") in self.groups
            or principal.get("service_principal_name") in self.clients
        )

    def is_one_of(self, user: str, principal: Mapping[str, str]) -> bool:
        """Whether an entry of an access control list means a user."""
        return user in (principal.get("user_name"), principal.get("service_principal_name")) or user in self.groups.get(
            principal.get("group_name", ""), ()
        )


@dataclass
class SecretScopes:
    """``/api/2.0/secrets``.

    Attributes:
        values: scope -> key -> value.
        readers: scope -> who may read it; everybody where it is missing.
    """

    values: dict[str, dict[str, str]] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)

    def read(self, scope: str, key: str, user: str) -> str:
        """A secret's value."""
        if scope not in self.values:
            raise missing(f"Secret does not exist with scope: {scope} and key: {key}")
        if user not in self.readers.get(scope, {user}):
            raise Refusal(403, "PERMISSION_DENIED", f"User {user} does not have READ permission on scope {scope}.")
        if key not in self.values[scope]:
            raise missing(f"Secret does not exist with scope: {scope} and key: {key}")
        return self.values[scope][key]

    def answer(self, method: str, name: str, values: Mapping[str, Any], user: str) -> Any:
        """Answers a request."""
        if method != "GET" or name not in ("get", "list", "scopes/list"):
            raise no_endpoint(method, f"/api/2.0/secrets/{name}")
        if name == "scopes/list":
            return {"scopes": [{"name": each, "backend_type": "DATABRICKS"} for each in self.values]}
        if name == "list":
            only(values, (), ("scope",))
            return {"secrets": [{"key": each} for each in self.values.get(values["scope"], {})]}
        only(values, (), ("scope", "key"))
        value = self.read(values["scope"], values["key"], user)
        return {"key": values["key"], "value": base64.b64encode(value.encode()).decode()}
