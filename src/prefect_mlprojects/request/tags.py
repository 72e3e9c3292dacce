"""Tags of flow runs: those of a user, and those by which all runs can be filtered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prefect_mlprojects._support.known_secrets import redact_known
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import ParameterError, Problem

_AUTOMATIC = ("project:", "entry-point:", "backend:")
_SCHEDULED = "auto-scheduled"  # Prefect's own, of runs that a schedule started
_WITHOUT_VALUE = "true"


def checked_tags(tags: Any) -> tuple[str, ...]:
    """Returns the tags that a user gave, each once; raises `ParameterError`."""
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise _refused(f"tags must be a list of texts, not {tags!r}", f"write tags=[{str(tags)!r}]")
    found = list(tags)
    for tag in found:
        if not isinstance(tag, str):
            raise _refused(f"a tag must be a text, not {tag!r}")
        if not tag.partition("=")[0].strip() or not tag.isprintable():
            raise _refused(f"{tag!r} is not a tag", "write NAME or NAME=VALUE, on one line")
    return tuple(dict.fromkeys(redact(tag.strip()) for tag in found))


def _refused(problem: str, fix: str | None = None) -> ParameterError:
    return ParameterError("The run options are not valid", [Problem(problem, parameter="tags", fix=fix)])


def automatic_tags(project: str, entry_point: str, backend: str) -> tuple[str, ...]:
    """Returns the tags that every run has, so that runs can be filtered by them."""
    return tuple(name + value for name, value in zip(_AUTOMATIC, (project, entry_point, backend), strict=True))


def user_tags(tags: Sequence[str]) -> list[str]:
    """Returns the tags of a flow run that its user or its deployment gave."""
    return [tag for tag in tags if tag != _SCHEDULED and not tag.startswith(_AUTOMATIC)]


def mlflow_tags(tags: Sequence[str]) -> dict[str, str]:
    """Returns the user's tags of a flow run as tags of its MLflow run: NAME=VALUE, or NAME with the value ``true``."""
    pairs = (redact_known(redact(tag)).partition("=") for tag in user_tags(tags))
    return {name.strip(): value.strip() if separator else _WITHOUT_VALUE for name, separator, value in pairs}
