"""Checks the values of a call against what an entry point declares."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from typing_extensions import assert_never

from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.spec.project import EntryPoint, ProjectParameter

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class CheckedParameters:
    """The values of a call, each of its type.

    Attributes:
        declared: Text by name for each declared parameter, defaults filled in, local paths absolute.
        extra: Text by name for each further parameter, in the order given.
        downloads: The URI by name of each ``path`` parameter that has to be downloaded first.
        warnings: What is odd but allowed.
    """

    declared: Mapping[str, str]
    extra: Mapping[str, str] = field(default_factory=dict)
    downloads: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = ()

    def with_downloads(self, local_paths: Mapping[str, str]) -> CheckedParameters:
        """Returns a copy in which the downloaded parameters have the paths they were downloaded to."""
        return dataclasses.replace(self, declared={**self.declared, **local_paths}, downloads={})


def check_parameters(entry_point: EntryPoint, values: Mapping[str, Any] | None) -> CheckedParameters:
    """Checks the values of a call; asks no network.

    A value of None counts as not given. Relative paths are relative to the working directory, as in MLflow.

    Args:
        entry_point: The entry point.
        values: Values by parameter name: text or numbers.

    Raises:
        ParameterError: Values are missing, not of their type, or can't stand in a command line; all of them at once.
    """
    given = {str(name): value for name, value in (values or {}).items() if value is not None}
    problems: list[Problem] = []
    declared: dict[str, str] = {}
    downloads: dict[str, str] = {}
    for parameter in entry_point.parameters.values():
        if parameter.name not in given and parameter.default is None:
            problems.append(_missing(parameter, given, entry_point))
            continue
        value = given.get(parameter.name, parameter.default)
        expected = _expectation(parameter, value)
        if expected is not None:
            problems.append(_ill_typed(parameter, value, expected))
            continue
        text = str(value)
        if parameter.type == "path":
            local = local_path(text)
            if local is None:
                downloads[parameter.name] = text
            else:
                text = str(local)
        declared[parameter.name] = text
    extra = {name: value for name, value in given.items() if name not in entry_point.parameters}
    problems += [problem for name, value in extra.items() if (problem := _unusable(name, value)) is not None]
    if problems:
        raise ParameterError(f"Parameters of entry point '{entry_point.name}' do not fit", problems)
    return CheckedParameters(
        declared, {name: str(value) for name, value in extra.items()}, downloads, _typo_warnings(entry_point, given)
    )


def local_path(text: str) -> Path | None:
    """Returns the absolute local path that a ``path`` value names, or None when it is remote.

    As MLflow decides it: without a scheme, or with ``file:`` and no host, it is local.
    """
    parts = urlsplit(text)
    if not parts.scheme:
        return Path(text).absolute()
    if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return Path(unquote(parts.path)).absolute()
    return None


def _expectation(parameter: ProjectParameter, value: Any) -> str | None:
    """Returns what was expected when a value is not of its parameter's type, else None."""
    text = str(value)
    if "\0" in text:
        return "a value without NUL characters"
    match parameter.type:
        case "string":
            return None if not isinstance(value, Mapping | list) else "text"
        case "int":
            is_int = isinstance(value, int | str) and not isinstance(value, bool) and _INT.fullmatch(text)
            return None if is_int else "a whole number"
        case "float":
            is_number = isinstance(value, int | float | str) and not isinstance(value, bool) and _FLOAT.fullmatch(text)
            return None if is_number else "a number"
        case "uri":
            return None if _has_scheme(text) else "a URI with a scheme, such as s3://bucket/key"
        case "path":
            local = local_path(text) if text else None
            if not text:
                return "a path"
            return None if local is None or local.exists() else "a file or folder that exists, or a remote URI"
        case _:
            assert_never(parameter.type)


def _has_scheme(text: str) -> bool:
    try:
        return bool(urlsplit(text).scheme)
    except ValueError:
        return False


def _missing(parameter: ProjectParameter, given: Mapping[str, Any], entry_point: EntryPoint) -> Problem:
    extras = [name for name in given if name not in entry_point.parameters]
    near = get_close_matches(parameter.name, extras, n=1)
    return Problem(
        f"parameter '{parameter.name}' ({parameter.type}) needs a value",
        fix=f"did you mean it when you wrote {near[0]!r}?" if near else f"give {parameter.name}=VALUE",
        parameter=parameter.name,
    )


def _ill_typed(parameter: ProjectParameter, value: Any, expected: str) -> Problem:
    shown = str(value) if len(str(value)) <= _SHOWN_CHARACTERS else str(value)[:_SHOWN_CHARACTERS] + "…"
    return Problem(
        f"parameter '{parameter.name}' ({parameter.type}) has the value {shown!r}, but {expected} was expected",
        parameter=parameter.name,
        value=shown,
    )


def _unusable(name: str, value: Any) -> Problem | None:
    if not name or "\0" in name or "\0" in str(value):
        return Problem(
            f"parameter {name!r} can't stand in a command line: empty names and NUL characters are not allowed",
            parameter=name,
        )
    return None


def _typo_warnings(entry_point: EntryPoint, given: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Warns of undeclared parameters that look like a declared one that was not given."""
    open_names = [name for name in entry_point.parameters if name not in given]
    warnings = []
    for name in given:
        if name in entry_point.parameters:
            continue
        near = get_close_matches(name, open_names, n=1, cutoff=0.75)
        if near:
            warnings.append(
                Problem(
                    f"parameter {name!r} is not declared and is passed on as it is",
                    fix=f"did you mean {near[0]!r}?",
                    parameter=name,
                )
            )
    return tuple(warnings)
