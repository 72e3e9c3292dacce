"""The arguments that parameters of our additions add to a command: flags, lists, and optional ones that vanish. Pure."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Collection, Iterator, Mapping

from prefect_mlprojects.spec.project import EntryPoint, ProjectParameter
from prefect_mlprojects.spec.template import CommandTemplate, Placeholder
from prefect_mlprojects.spec.values import list_items, parse_bool

_OPTION = re.compile(r"(?:(?<=\s)|^)--?[A-Za-z0-9][\w.-]*(?:=|\s+)$")
"""An option at the end of a text, before its value."""
_BLANKS = re.compile(r"(?<!\\) +$")


def adapt_template(
    template: CommandTemplate, entry_point: EntryPoint, values: Mapping[str, str], secrets: Collection[str] = ()
) -> CommandTemplate:
    """Returns a command's template with the arguments of flags, lists and options, and without those of missing values.

    Parameters with ``option``, and optional ones, that the command does not name are appended. All others are placeholders, as in
    MLflow.
    """
    parts: list[str | Placeholder] = []
    closing = ""
    for part in template.parts:
        if isinstance(part, str):
            parts.append(part.removeprefix(closing))
            closing = ""
            continue
        parameter = entry_point.parameters.get(part.name)
        if parameter is None or (part.name in values and not _is_special(parameter, secrets)):
            parts.append(part)
            continue
        words = list(_words(parameter, part, values, secrets))
        if not words and parameter.optional:
            before = str(parts.pop()) if parts and isinstance(parts[-1], str) else ""
            closing = {"double-quotes": '"', "single-quotes": "'"}.get(part.place, "")
            if not closing or not before.endswith(closing):
                closing = ""
            parts.append(_BLANKS.sub("", _OPTION.sub("", before.removesuffix(closing))))
        parts += words
    appended: list[str | Placeholder] = []
    for parameter in appended_parameters(template, entry_point):
        option = parameter.option or f"--{shlex.quote(parameter.name)}"
        words = list(
            _words(
                dataclasses.replace(parameter, option=option),
                Placeholder(parameter.name, template.end),
                values,
                secrets,
            )
        )
        appended += [" ", *words] if words else []
    if appended and template.line_ends and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return dataclasses.replace(template, parts=(*parts, *appended))


def appended_parameters(template: CommandTemplate, entry_point: EntryPoint) -> list[ProjectParameter]:
    """Returns the declared parameters that follow the command, because it does not name them."""
    named = {each.name for each in template.placeholders}
    return [
        each for name, each in entry_point.parameters.items() if name not in named and (each.option or each.optional)
    ]


def misplaced_parameters(template: CommandTemplate, entry_point: EntryPoint) -> list[str]:
    """Returns the parameters whose value is several words, or none, at a place in the command that takes only one."""
    parts, found = template.parts, []
    for index, part in enumerate(parts):
        parameter = entry_point.parameters.get(part.name) if isinstance(part, Placeholder) else None
        if parameter is None or not (parameter.option or _is_several(parameter)):
            continue
        before, after = (str(each) if isinstance(each, str) else "x" for each in _neighbours(parts, index))
        if template.parts[index].place != "word" or before[-1:].strip() or after[:1].strip(" \t\n;&|)"):  # type: ignore[union-attr]
            found.append(parameter.name)
    return found


def _neighbours(parts: tuple[str | Placeholder, ...], index: int) -> tuple[str | Placeholder, str | Placeholder]:
    return (parts[index - 1] if index else "", parts[index + 1] if index + 1 < len(parts) else "")


def _is_several(parameter: ProjectParameter) -> bool:
    return parameter.type == "list" and parameter.separator is None


def _is_special(parameter: ProjectParameter, secrets: Collection[str]) -> bool:
    if parameter.name in secrets:
        return parameter.option is not None
    return parameter.option is not None or _is_several(parameter)


def _words(
    parameter: ProjectParameter, part: Placeholder, values: Mapping[str, str], secrets: Collection[str]
) -> Iterator[str | Placeholder]:
    """Yields the text of a parameter's arguments, with placeholders for values."""
    text, option = values.get(parameter.name), parameter.option
    if text is None:
        return
    if parameter.name in secrets or not (parameter.type == "bool" or _is_several(parameter)):
        yield from ([f"{option} "] if option else [])
        yield part
    elif parameter.type == "bool":
        if option is None:
            yield part
        elif parse_bool(text):
            yield option
    elif items := list_items(text):
        yield " ".join(f"{option} {shlex.quote(each)}" if option else shlex.quote(each) for each in items)


def command_values(entry_point: EntryPoint, values: Mapping[str, str]) -> dict[str, str]:
    """Returns the values for a template's placeholders: those of lists with a separator are joined by it."""
    separators = {name: each.separator for name, each in entry_point.parameters.items() if each.separator is not None}
    joined = {name: str(separators[name]).join(list_items(text)) for name, text in values.items() if name in separators}
    return {**values, **joined}
