"""Notes about runs beside their code: which code a run needs, so that cleaning leaves it, and whose failure was told.

A note is the file ``runs/<token>.json``. It is there from before the submission until the run has succeeded; after a failure that
was told, it says so, and a retry of the flow run is then a new run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from prefect_mlprojects.backends.databricks.storage import Storage

FOLDER = "runs"


@dataclass(frozen=True)
class RunNote:
    """What is noted of a run.

    Attributes:
        user: Who submitted it.
        files: The names of the files below ``code`` that it needs.
        told: Whether it failed and the failure was told.
    """

    user: str
    files: Sequence[str] = ()
    told: bool = False


def note_path(root: str, token: str) -> str:
    """Returns where the note of a run is."""
    return f"{root}/{FOLDER}/{token}.json"


def read_note(storage: Storage, path: str) -> RunNote | None:
    """Returns a note; None when there is none, or it can't be understood."""
    data = storage.read(path)
    try:
        content = json.loads(data) if data else None
        return RunNote(str(content["user"]), tuple(content["files"]), bool(content["told"])) if content else None
    except (ValueError, KeyError, TypeError):
        return None


def write_note(storage: Storage, path: str, note: RunNote) -> None:
    """Writes a note in place of the one before."""
    storage.write(path, json.dumps(asdict(note)).encode())
