"""Removes what runs left in a workspace."""

from __future__ import annotations

import time

from prefect_mlprojects.backends.databricks.config import DatabricksConfig
from prefect_mlprojects.backends.databricks.connection import connect, refused
from prefect_mlprojects.backends.databricks.storage import FOLDER, storage_for

_SECONDS_A_DAY = 86_400


def clean_workspace(config: DatabricksConfig, *, days: float, dry_run: bool) -> list[str]:
    """Removes archives, output and markers that have not been changed for some days.

    Args:
        config: Names credentials and ``code_path``.
        days: How old they must be.
        dry_run: Whether to remove nothing.

    Returns:
        The paths that went, or would go.

    Raises:
        BackendError: The workspace refused it.
    """
    client = connect(config, "")
    limit = time.time() - days * _SECONDS_A_DAY
    try:
        root = config.code_path or f"/Workspace/Users/{client.current_user.me().user_name}/{FOLDER}"
        storage = storage_for(client, root)
        old = [
            f"{root}/{folder}/{name}"
            for folder in ("code", "output", "told")
            for name, changed in storage.names(f"{root}/{folder}")
            if changed <= limit
        ]
        for path in () if dry_run else old:
            storage.remove(path)
    except Exception as error:  # noqa: BLE001 - the SDK raises many kinds
        raise refused("The workspace can't be cleaned", error) from None
    return old
