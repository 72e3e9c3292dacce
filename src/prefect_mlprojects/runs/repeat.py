"""What a run that repeats an earlier one asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.request import COMMIT_LABEL, OPTIONS, SECRETS_LABEL, SOURCE_LABEL, RunRequest
from prefect_mlprojects.request.check import RunSecrets
from prefect_mlprojects.runs.records import RunRecord

_MERGED = ("parameters", "docker_args")
# An option that is given takes the place of the other, too.
_EXCLUDES = {
    "experiment_name": ("experiment_id",),
    "experiment_id": ("experiment_name",),
    "backend": ("backend_config",),
}
# By run option: the secret, options that can bring another one, and how.
_ADVICE = {
    "uri": (
        "its password or token",
        ("git_credentials",),
        "give the name of a git-credentials block: --git-credentials NAME",
    ),
    "parameters": ("the value of the parameter {!r}", (), "give it again: -P {}=VALUE"),
    "docker_args": ("the container argument {!r}", (), "give it again: -A {}=VALUE"),
    "backend_config": ("{!r} in the backend's configuration", (), "give a configuration block: -c TYPE/NAME"),
    "docker_auth": ("docker_auth", ("backend_config",), "give a configuration block with `credentials`: -c TYPE/NAME"),
}


def repeated_arguments(record: RunRecord, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a run like an earlier one, with other values for the run options in `given`.

    A git project has the commit that ran. Parameters and container arguments are replaced one by one. The run is a new one in
    MLflow.

    Raises:
        ParameterError: The earlier run had values that were kept in memory, and `given` has no others.
    """
    replaced = {name for option in given for name in (option, *_EXCLUDES.get(option, ()))}
    old = {name: value for name, value in record.request.items() if name in OPTIONS and name not in replaced}
    arguments = {**old, **given, "run_id": given.get("run_id")}
    stored = {**record.request, "parameters": record.parameters}
    for name in _MERGED:
        arguments[name] = {**(stored.get(name) or {}), **(given.get(name) or {})} or None
    if "version" not in given:
        arguments["version"] = commit_of(record) or arguments.get("version")
    if problems := _missing(record, arguments, given):
        raise ParameterError(f"Run {record.id} can't be repeated as it was", problems)
    return arguments


def commit_of(record: RunRecord) -> str | None:
    """Returns the commit of a git project that ran; None for a folder, which is used as it is, or an archive."""
    kind, commit = record.labels.get(SOURCE_LABEL), record.labels.get(COMMIT_LABEL)
    return str(commit) if commit and kind == "git" else None


def _missing(record: RunRecord, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> list[Problem]:
    asked = RunRequest.from_arguments(arguments)
    names = [*RunSecrets().missing(asked), *str(record.labels.get(SECRETS_LABEL, "")).split(", ")]
    problems = []
    for option, _, key in (name.partition(": ") for name in dict.fromkeys(filter(None, names))):
        what, instead, fix = _ADVICE[option]
        if not any(name in given for name in instead):
            problem = f"{what.format(key)} was kept in memory and not stored"
            problems.append(Problem(problem, parameter=key or option, fix=fix.format(key)))
    return problems


def unlike(record: RunRecord, request: RunRequest, commit: str | None) -> str | None:
    """Returns in which way a folder is not what ran then; None if it is the same, or not known.

    `commit` is the folder's now.
    """
    then = record.labels.get(COMMIT_LABEL)
    if request.version or not then or record.labels.get(SOURCE_LABEL) != "local" or then == commit:
        return None
    return f"The folder {request.uri} is at commit {str(commit)[:12]} now; run {record.id} was at {str(then)[:12]}."
