"""Pulls images as a node does: manifest and layers over the registry's HTTP API, with a pull secret's login.

The API: https://github.com/opencontainers/distribution-spec. Limits: plain HTTP, basic authentication, one platform, no whiteouts.
"""

from __future__ import annotations

import io
import json
import tarfile
import urllib.request
from pathlib import Path

from .store import Json

_MANIFESTS = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"


def pull_image(image: str, logins: Json, target: Path) -> None:
    """Unpacks an image's layers into a folder.

    Args:
        image: ``host:port/name@digest`` or ``host:port/name:tag``.
        logins: The ``auths`` of Docker's ``config.json``.
        target: The folder.

    Raises:
        OSError: The registry can't be reached, or refuses.
    """
    registry, _, rest = image.partition("/")
    name, _, digest = rest.partition("@")
    reference = digest or name.rpartition(":")[2]
    name = name if digest else name.rpartition(":")[0]
    login = logins.get(registry, {}).get("auth")

    def read(path: str) -> bytes:
        request = urllib.request.Request(f"http://{registry}/v2/{name}/{path}", headers={"Accept": _MANIFESTS})
        if login:
            request.add_header("Authorization", f"Basic {login}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            data: bytes = answer.read()
            return data

    manifest = json.loads(read(f"manifests/{reference}"))
    target.mkdir(parents=True)
    for layer in manifest["layers"]:
        with tarfile.open(fileobj=io.BytesIO(read(f"blobs/{layer['digest']}"))) as archive:
            archive.extractall(target, filter="fully_trusted")
