"""What belongs to a run's Job: the Secrets with its variables and logins, the ConfigMap with its project; pure."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Literal

from prefect_mlprojects.backends.kubernetes.job import ARCHIVE_FILE, PLAIN_VARIABLES, JobRequest
from prefect_mlprojects.backends.kubernetes.names import MANAGED_BY_LABEL, PREFIX


def build_parts(
    request: JobRequest, archive: bytes | None, owner: Mapping[str, Any]
) -> list[tuple[Literal["Secret", "ConfigMap"], dict[str, Any]]]:
    """Returns the objects that belong to a Job, kinds and manifests; they are removed with it.

    Args:
        request: What the Job is made of.
        archive: The project's archive, for ``archive``.
        owner: The Job as the server returned it.
    """

    def metadata(name: str) -> dict[str, Any]:
        reference = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "blockOwnerDeletion": False,
            "controller": True,
        }
        labels = {**request.labels, MANAGED_BY_LABEL: PREFIX}
        return {"name": name, "namespace": request.namespace, "labels": labels, "ownerReferences": [reference]}

    parts: list[tuple[Literal["Secret", "ConfigMap"], dict[str, Any]]] = []
    hidden = {name: value for name, value in request.variables.items() if name not in PLAIN_VARIABLES}
    if request.checkout is not None:
        hidden |= request.checkout.variables
    if hidden:
        body = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": metadata(request.variables_secret)}
        data = {name: base64.b64encode(value.encode()).decode() for name, value in hidden.items()}
        parts.append(("Secret", {**body, "data": data}))
    if request.registry_auth:
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/dockerconfigjson",
            "metadata": metadata(request.registry_secret),
        }
        login = base64.b64encode(registry_login(request.registry_auth).encode()).decode()
        parts.append(("Secret", {**body, "data": {".dockerconfigjson": login}}))
    if archive is not None:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(request.archive_map)}
        parts.append(("ConfigMap", {**body, "binaryData": {ARCHIVE_FILE: base64.b64encode(archive).decode()}}))
    return parts


def registry_login(auth: Mapping[str, Any]) -> str:
    """Returns credentials as the text of Docker's ``config.json``; secret.

    Args:
        auth: ``username``, ``password`` and ``registry``, as ``docker_auth`` has them.
    """
    username, password = str(auth.get("username", "")), str(auth.get("password", ""))
    registry = str(auth.get("registry") or auth.get("serveraddress") or "https://index.docker.io/v1/")
    login = {
        "username": username,
        "password": password,
        "auth": base64.b64encode(f"{username}:{password}".encode()).decode(),
    }
    return json.dumps({"auths": {registry: login}})
