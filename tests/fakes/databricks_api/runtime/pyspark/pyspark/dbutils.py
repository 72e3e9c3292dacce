"""The runtime's utilities: secrets only."""

import base64
import json
import os
import urllib.parse
import urllib.request


class _Secrets:
    def get(self, scope: str, key: str) -> str:
        query = urllib.parse.urlencode({"scope": scope, "key": key})
        request = urllib.request.Request(
            f"{os.environ['DATABRICKS_HOST']}/api/2.0/secrets/get?{query}",
            headers={"Authorization": f"Bearer {os.environ['DATABRICKS_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return base64.b64decode(json.loads(answer.read())["value"]).decode()


class DBUtils:
    """The utilities of a session."""

    def __init__(self, session: object) -> None:
        self.secrets = _Secrets()
