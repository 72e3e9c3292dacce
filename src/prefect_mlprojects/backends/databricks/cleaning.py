"""Removes what runs left in a workspace, and never what a run that is queued or running still needs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from prefect_mlprojects.backends.databricks.config import DatabricksConfig
from prefect_mlprojects.backends.databricks.connection import connect
from prefect_mlprojects.backends.databricks.network import insist
from prefect_mlprojects.backends.databricks.notes import FOLDER as NOTES_FOLDER
from prefect_mlprojects.backends.databricks.notes import read_note
from prefect_mlprojects.backends.databricks.storage import FOLDER, Storage, storage_for
from prefect_mlprojects.backends.databricks.upload import CODE_FOLDER, OUTPUT_FOLDER

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient

_SECONDS_A_DAY = 86_400
_SUBMITTING = 900.0  # Seconds that a run may take from its note to its submission: network trouble is waited out.
_LONGEST_RUN = 60 * _SECONDS_A_DAY  # Whether another user's run has ended can't be asked; after that it has.


def clean_workspace(config: DatabricksConfig, *, days: float, dry_run: bool) -> list[str]:
    """Removes archives, output and notes that have not been changed for some days, except what a run still needs.

    That is told by the notes of runs, whoever submitted them, and by the active runs that this user may see.

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
    what = "The workspace can't be cleaned"
    root, paths = insist(partial(_old_paths, client, config, days), config.network_timeout, None, what)
    storage = storage_for(client, root)
    for path in () if dry_run else paths:
        insist(partial(storage.remove, path), config.network_timeout, None, what)
    return paths


def _old_paths(client: WorkspaceClient, config: DatabricksConfig, days: float) -> tuple[str, list[str]]:
    user = str(client.current_user.me().user_name)
    root = config.code_path or f"/Workspace/Users/{user}/{FOLDER}"
    storage = storage_for(client, root)
    now = time.time()
    # A run notes its code before it looks whether that is there: what is listed first and not noted afterwards is not needed.
    candidates = [
        (folder, name)
        for folder in (CODE_FOLDER, OUTPUT_FOLDER, NOTES_FOLDER)
        for name, changed in storage.names(f"{root}/{folder}")
        if changed <= now - days * _SECONDS_A_DAY
    ]
    if not candidates:
        return root, []
    active = _active_texts(client)
    needed = set(_noted(storage, root, user, active, now, max(_SUBMITTING, config.network_timeout)))
    return root, [
        f"{root}/{folder}/{name}"
        for folder, name in candidates
        if f"{folder}/{name}" not in needed and not any(name.removesuffix(".json") in text for text in active)
    ]


def _active_texts(client: WorkspaceClient) -> list[str]:
    """What the runs that have not ended were told of the code path: they name their archive and their output."""
    runs = client.jobs.list_runs(active_only=True, expand_tasks=True)
    texts = []
    for run in runs:
        for task in run.tasks or ():
            python = task.spark_python_task
            if python is not None:
                texts.append("\n".join([python.python_file, *(python.parameters or ())]))
    return texts


def _noted(storage: Storage, root: str, user: str, active: list[str], now: float, submitting: float) -> Iterator[str]:
    """What the notes of runs that may not have ended ask for, the notes themselves and their output included."""
    for name, changed in storage.names(f"{root}/{NOTES_FOLDER}"):
        note = read_note(storage, f"{root}/{NOTES_FOLDER}/{name}")
        token = name.removesuffix(".json")
        if note is None or note.told:
            continue
        mine = note.user == user
        # One's own runs are all among the active ones, once they are submitted; of others, only the note tells.
        if any(token in text for text in active) or now - changed < (submitting if mine else _LONGEST_RUN):
            yield f"{NOTES_FOLDER}/{name}"
            yield f"{OUTPUT_FOLDER}/{token}"
            yield from (f"{CODE_FOLDER}/{file}" for file in note.files)
