"""Checks the values of a call against what an entry point declares."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from typing_extensions import assert_never

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import MASK, Secret
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.spec.arguments import adapt_template, command_values
from prefect_mlprojects.spec.project import EntryPoint, ParameterType, ProjectParameter
from prefect_mlprojects.spec.secrets import is_reference, shown_value, variables_for
from prefect_mlprojects.spec.shell import Place
from prefect_mlprojects.spec.template import CommandTemplate, fits, parse_template
from prefect_mlprojects.spec.values import BOOLEANS, constraint, list_items, normalised, parse_bool, value_text

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_SHOWN_CHARACTERS = 100
# Higher than difflib's 0.6, since undeclared parameters are legal.
_TYPO_SIMILARITY = 0.75


@dataclass(frozen=True)
class CheckedParameters:
    """The valid values of a call, as text by parameter name.

    Attributes:
        declared: Values of declared parameters, with defaults, and with local paths absolute.
        extra: Values of undeclared parameters, in the order given.
        downloads: URIs of ``path`` parameters that must be downloaded first.
        secrets: Values of secret parameters, which the other fields have redacted, or references to them.
    """

    declared: Mapping[str, str]
    extra: Mapping[str, str] = field(default_factory=dict)
    downloads: Mapping[str, str] = field(default_factory=dict, repr=False)
    warnings: tuple[Problem, ...] = ()
    secrets: Mapping[str, Secret] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variable that carries each secret parameter to the command."""
        return variables_for(self.secrets)

    @property
    def child_variables(self) -> dict[str, Secret]:
        """The secret values by the variables that carry them."""
        return {variable: self.secrets[name] for name, variable in self.variables.items()}

    @property
    def recorded(self) -> dict[str, str]:
        """What the MLflow run records: without values that are nothing but a secret."""
        values = {**self.declared, **self.extra}
        return {name: redact(text) for name, text in values.items() if not (name in self.secrets and text == MASK)}

    @property
    def values(self) -> dict[str, Secret | str]:
        """All values by name, secret ones as `Secret`."""
        return {**self.declared, **self.extra, **self.secrets}

    def with_secrets(self, resolve: Callable[[str, Secret], Secret]) -> CheckedParameters:
        """Returns a copy in which references to secrets are replaced by what `resolve` returns for a name and a value."""
        return dataclasses.replace(self, secrets={name: resolve(name, each) for name, each in self.secrets.items()})

    def with_downloads(self, local_paths: Mapping[str, str]) -> CheckedParameters:
        """Returns a copy with the paths of downloaded parameters."""
        left = {name: uri for name, uri in self.downloads.items() if name not in local_paths}
        secrets = {name: value for name, value in self.secrets.items() if name not in local_paths}
        return dataclasses.replace(self, declared={**self.declared, **local_paths}, downloads=left, secrets=secrets)


def check_parameters(
    entry_point: EntryPoint,
    values: Mapping[str, Any] | None,
    project: Path | None = None,
    hidden: Collection[str] = (),
) -> CheckedParameters:
    """Checks the values of a call without any network request.

    None counts as not given. Relative paths are relative to the working directory, as in MLflow, except for a default that exists
    in the folder `project`. Values become text by ``str``, as in MLflow, and are never rounded; a caller's bool becomes ``True`` or
    ``False``. A default that is not of its type is allowed, as in MLflow; the parser warns of it. Parameters that are declared
    secret, and those in `hidden`, are redacted.

    Raises:
        ParameterError: Values are missing, not of their type, or impossible in a command line; all of them at once.
    """
    given = {
        str(name): value_text(entry_point.parameters.get(str(name)), value)
        for name, value in (values or {}).items()
        if value is not None
    }
    shown = _shown_values(entry_point, given, hidden)
    secrets: dict[str, Secret] = {}
    problems: list[Problem] = []
    declared: dict[str, str] = {}
    downloads: dict[str, str] = {}
    for parameter in entry_point.parameters.values():
        text = given.get(parameter.name, parameter.default)
        if project is not None and text == parameter.default and is_relative_default(parameter):
            text = in_project(project, parameter) or text
        if parameter.optional and not text:
            continue
        if text is None:
            problems.append(_missing(parameter, given, entry_point))
            continue
        if parameter.name in shown:
            secrets[parameter.name] = Secret(text)
        if parameter.secret and is_reference(text):
            declared[parameter.name] = text
            continue
        expected = _expectation(parameter.type, text) or constraint(parameter, text)
        is_lenient_default = text == parameter.default and parameter.type not in {"path", "uri"}
        if expected is not None and not (is_lenient_default and not _unusable(parameter.name, text)):
            seen = shown.get(parameter.name, text)
            problems.append(_ill_typed(parameter, seen, expected, is_default=parameter.name not in given))
            continue
        local = _local_path(text) if parameter.type == "path" else normalised(parameter, text)
        declared[parameter.name] = shown.get(parameter.name) or (text if local is None else local)
        if parameter.name in secrets and local:
            secrets[parameter.name] = Secret(local)
        if local is None:
            downloads[parameter.name] = text
    extra = {name: text for name, text in given.items() if name not in entry_point.parameters}
    secrets |= {name: Secret(text) for name, text in extra.items() if name in shown}
    problems += [problem for name, text in extra.items() if (problem := _unusable(name, text)) is not None]
    known = {name: text for name, text in declared.items() if name not in downloads}
    template = adapt_template(parse_template(entry_point.command), entry_point, known, secrets.keys())
    problems += place_problems(template, command_values(entry_point, known), extra, secrets.keys())
    if problems:
        raise ParameterError(f"Parameters of entry point '{entry_point.name}' do not fit", problems)
    extra |= {name: text for name, text in shown.items() if name in extra}
    return CheckedParameters(declared, extra, downloads, _typo_warnings(entry_point, {**given, **shown}), secrets)


def _shown_values(entry_point: EntryPoint, given: Mapping[str, str], hidden: Collection[str]) -> dict[str, str]:
    """Returns what people see of the secret parameters of a call."""
    declared = {name for name, parameter in entry_point.parameters.items() if parameter.secret}
    texts = {name: entry_point.parameters[name].default for name in declared} | dict(given)
    return {
        name: shown_value(text, declared=name in declared)
        for name, text in texts.items()
        if text is not None and (name in declared or name in hidden)
    }


def is_relative_default(parameter: ProjectParameter) -> bool:
    """Whether a ``path`` parameter's default is a relative local path."""
    default = parameter.default if parameter.type == "path" else None
    parts = _split(default) if default and not os.path.isabs(default) else None  # noqa: PTH117 - any text is taken
    return parts is not None and not parts.scheme


def in_project(project: Path, parameter: ProjectParameter) -> str | None:
    """Returns the absolute path of a relative default in the project; None if it does not exist there."""
    path = os.path.normpath(os.path.join(project, parameter.default or ""))  # noqa: PTH118 - any text is taken
    exists = os.path.exists(path) and Path(path).resolve().is_relative_to(project.resolve())  # noqa: PTH110 - as above
    return path if exists else None


def _local_path(text: str) -> str | None:
    """Returns the absolute local path of a ``path`` value, which need not exist; None for a remote one.

    As in MLflow, a path without a scheme, or with ``file:`` and no host, is local.
    """
    parts = _split(text)
    # abspath, as in MLflow: it removes "a/..", which Path.absolute leaves in.
    if parts is not None and not parts.scheme:
        return os.path.abspath(text)  # noqa: PTH100
    if parts is not None and parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return os.path.abspath(unquote(parts.path))  # noqa: PTH100
    return None


def type_expectation(kind: ParameterType, text: str) -> str | None:
    """Returns what was expected if a text can't be of a type, whatever files exist; else None."""
    if "\0" in text:
        return "a value without NUL characters"
    if not _can_be_passed(text):
        return "text that can be encoded in UTF-8"
    match kind:
        case "string" | "choice":
            return None
        case "bool":
            return None if parse_bool(text) is not None else BOOLEANS
        case "list":
            return None if all(map(_can_be_passed, list_items(text))) else "a list of texts"
        case "int":
            return None if _INT.fullmatch(text) else "a whole number"
        case "float":
            return None if _FLOAT.fullmatch(text) else "a number"
        case "uri":
            parts = _split(text)
            return None if parts is not None and parts.scheme else "a URI with a scheme, such as s3://bucket/key,"
        case "path":
            return None if text and _split(text) is not None else "a path or a URI"
        case _:
            assert_never(kind)


def _expectation(kind: ParameterType, text: str) -> str | None:
    expected = type_expectation(kind, text)
    if expected is None and kind == "path":
        local = _local_path(text)
        if local is not None and not os.path.exists(local):  # noqa: PTH110 - Path.exists raises for names that are too long
            return "a file or folder that exists, or a remote URI,"
    return expected


def _split(text: str) -> SplitResult | None:
    """Returns a URI's parts; None if it is malformed, such as one with an unclosed IPv6 address."""
    try:
        return urlsplit(text)
    except ValueError:
        return None


def _can_be_passed(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _missing(parameter: ProjectParameter, given: Mapping[str, str], entry_point: EntryPoint) -> Problem:
    near = nearest(parameter.name, [name for name in given if name not in entry_point.parameters])
    return Problem(
        f"parameter '{parameter.name}' ({parameter.type}) needs a value",
        fix=f"did you mean it when you wrote {near!r}?" if near else f"give {parameter.name}=VALUE",
        parameter=parameter.name,
    )


def _ill_typed(parameter: ProjectParameter, text: str, expected: str, *, is_default: bool) -> Problem:
    shown, noun = _shorten(text), "default" if is_default else "value"
    relative = parameter.type == "path" and text and not os.path.isabs(text)  # noqa: PTH117 - any text is taken
    near = nearest(text, parameter.choices)
    fix = f"relative paths are relative to the working directory, {os.getcwd()}" if relative else None  # noqa: PTH109
    return Problem(
        f"parameter '{parameter.name}' ({parameter.type}) has the {noun} {shown!r}, but {expected} was expected",
        fix=f"did you mean {near!r}?" if near else fix,
        parameter=parameter.name,
        value=shown,
    )


def _unusable(name: str, text: str) -> Problem | None:
    if not name:
        message = "a parameter without a name can't be passed on a command line"
    elif "\0" in name or "\0" in text:
        message = f"parameter {name!r} can't be passed on a command line: it contains a NUL character"
    elif not _can_be_passed(name + text):
        message = f"parameter {name!r} can't be passed on a command line: it can't be encoded in UTF-8"
    else:
        return None
    return Problem(message, parameter=name, value=_shorten(text))


def place_problems(
    template: CommandTemplate, declared: Mapping[str, str], extra: Mapping[str, str], secrets: Collection[str] = ()
) -> tuple[Problem, ...]:
    """Returns the values that can't be quoted at their placeholders (see :mod:`prefect_mlprojects.spec.template`)."""
    places = {(each.name, each.place) for each in template.placeholders if each.name in declared}
    found = {name: place for name, place in sorted(places) if not fits(declared[name], place)}
    found |= {
        name: template.end
        for name, text in extra.items()
        if not (fits(name, template.end) and fits(text, template.end))
    }
    quotable = {"word", "double-quotes", "single-quotes"}
    misplaced = {each.name for each in template.placeholders if each.place not in quotable}
    hidden = {name for name in secrets if name in misplaced or (template.end != "word" and name in extra)}
    shown = {name: _shorten(text) for name, text in {**declared, **extra}.items()}
    return tuple(
        Problem(
            f"the secret parameter '{name}' can't stand at its place in the command (in backquotes, a here-document, a comment, "
            "arithmetic, a subscript or ${…}, or after a backslash, a $ or >&)",
            fix="write its placeholder as a word of its own",
            parameter=name,
        )
        for name in sorted(hidden)
    ) + tuple(_misplaced(name, place, shown[name]) for name, place in found.items() if name not in hidden)


def _misplaced(name: str, place: Place, shown: str) -> Problem:
    if place == "number":
        where = "where the shell calculates (in arithmetic, a subscript or ${…}) and takes a name for a variable"
        fix = "give a number, or put it elsewhere in the command"
    else:
        where = "(in backquotes, a here-document, a comment or ${…}, or after a backslash, a $ or >&)"
        fix = "give a value of letters, digits and @%+=:,./- only, or put it elsewhere in the command"
    message = f"parameter '{name}' has the value {shown!r}, which can't be quoted at its place in the command {where}"
    return Problem(message, fix=fix, parameter=name, value=shown)


def _typo_warnings(entry_point: EntryPoint, given: Mapping[str, str]) -> tuple[Problem, ...]:
    """Warns of undeclared parameters that look like a declared one that was not given."""
    missing = [name for name in entry_point.parameters if name not in given]
    message = "parameter {!r} is not declared and is passed on as it is"
    return tuple(
        Problem(message.format(name), fix=f"did you mean {near!r}?", parameter=name, value=_shorten(text))
        for name, text in given.items()
        if name not in entry_point.parameters and (near := nearest(name, missing, cutoff=_TYPO_SIMILARITY))
    )
