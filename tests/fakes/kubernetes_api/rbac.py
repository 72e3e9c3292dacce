"""Who may do what: bearer tokens, Roles and RoleBindings."""

from __future__ import annotations

import secrets

from .store import ApiError, Resource, Store


class Access:
    """Knows users by their tokens; the administrator may do all, service accounts what their Roles say."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.admin_token = secrets.token_hex(16)
        self._users = {self.admin_token: "admin"}

    def token_for(self, namespace: str, name: str) -> str:
        """Makes a token for a service account."""
        token = secrets.token_hex(16)
        self._users[token] = f"system:serviceaccount:{namespace}:{name}"
        return token

    def user(self, authorization: str) -> str:
        """Returns who a header names.

        Raises:
            ApiError: Nobody (401).
        """
        user = self._users.get(authorization.removeprefix("Bearer ").strip())
        if user is None:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        return user

    def check(self, user: str, verb: str, resource: Resource, subresource: str, namespace: str) -> None:
        """Refuses what a user may not do.

        Raises:
            ApiError: 403, in the words of the real server.
        """
        name = f"{resource.plural}/{subresource}" if subresource else resource.plural
        if user == "admin" or self._allowed(user, verb, resource.group, name, namespace):
            return
        qualified = f"{resource.qualified}/{subresource}" if subresource else resource.qualified
        raise ApiError(
            403,
            "Forbidden",
            f'{qualified} is forbidden: User "{user}" cannot {verb} resource "{name}" in API group "{resource.group}" in the '
            f'namespace "{namespace}"',
        )

    def _allowed(self, user: str, verb: str, group: str, name: str, namespace: str) -> bool:
        for binding in self._store.list("rolebindings", namespace):
            subjects = [
                f"system:serviceaccount:{each.get('namespace', namespace)}:{each['name']}"
                for each in binding.get("subjects") or []
            ]
            if user not in subjects or binding["roleRef"]["kind"] != "Role":
                continue
            role = self._store.find("roles", namespace, binding["roleRef"]["name"]) or {}
            for rule in role.get("rules") or []:
                if (
                    verb in rule["verbs"]
                    and name in (rule.get("resources") or [])
                    and group in (rule.get("apiGroups") or [])
                ):
                    return True
        return False
