"""The arguments that parameters of our additions add to a command: flags, lists, and optional ones that vanish. Pure."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Collection, Iterator, Mapping

from prefect_mlprojects.spec.project import EntryPoint, ProjectParameter
from prefect_mlprojects.spec.shell import Place
from prefect_mlprojects.spec.template import CommandTemplate, Placeholder
from prefect_mlprojects.spec.values import list_items, parse_bool

_NAME = r"(?<=\s){}--?[A-Za-z0-9][\w.-]*"
_OPTION = re.compile(_NAME.format("") + r"(?:=|\s+)$")
"""An option at the end of a text, before its value."""
_OPENINGS = {
    place: (quote, re.compile(f"{_NAME.format(quote)}=$|{quote}$"))
    for place, quote in {"double-quotes": '"', "single-quotes": "'"}.items()
}
"""The beginning of a quoted value, with or without its option, by its place: the quote and the text."""
_BLANKS = re.compile(r"(?<!\\) +$")
_WORD_ENDS = re.compile(r"$|[\s;&|)]")


def adapt_template(
    template: CommandTemplate, entry_point: EntryPoint, values: Mapping[str, str], secrets: Collection[str] = ()
) -> CommandTemplate:
    """Returns a command's template with the arguments of flags, lists and options, and without those of missing values.

    Parameters with ``option``, and optional ones, that the command does not name are appended. All others are placeholders, as in
    MLflow.
    """
    parts: list[str | Placeholder] = []
    rest = list(template.parts)
    while rest:
        part = rest.pop(0)
        parameter = entry_point.parameters.get(part.name) if isinstance(part, Placeholder) else None
        if isinstance(part, str) or parameter is None or (part.name in values and not _is_special(parameter, secrets)):
            parts.append(part)
            continue
        words = list(_words(parameter, part, values, secrets, parameter.option))
        parts += words
        after = rest[0] if rest else ""
        if not words and parameter.optional and parts and isinstance(parts[-1], str) and isinstance(after, str):
            parts[-1], rest[:1] = _without_option(parts[-1], after, part.place)
    appended: list[str | Placeholder] = []
    for parameter in appended_parameters(template, entry_point):
        option = parameter.option or f"--{shlex.quote(parameter.name)}"
        words = list(_words(parameter, Placeholder(parameter.name, template.end), values, secrets, option))
        appended += [" ", *words] if words else []
    if appended and template.line_ends and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return dataclasses.replace(template, parts=(*parts, *appended))


def _without_option(before: str, after: str, place: Place) -> tuple[str, list[str | Placeholder]]:
    """Returns the text before and after a missing value without the option and the quotes that are only for it."""
    outside, end = before, after
    if place in _OPENINGS:
        quote, opening = _OPENINGS[place]
        outside, end = opening.sub("", before), after.removeprefix(quote)
        if outside == before or end == after:
            return before, [after]
    if not _WORD_ENDS.match(end):
        return before, [after]
    return _BLANKS.sub("", _OPTION.sub("", outside)), [end]


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
        if parameter is None or not _is_special(parameter):
            continue
        before, after = (str(each) if isinstance(each, str) else "x" for each in _neighbours(parts, index))
        if template.parts[index].place != "word" or before[-1:].strip() or after[:1].strip(" \t\n;&|)"):  # type: ignore[union-attr]
            found.append(parameter.name)
    return found


def _neighbours(parts: tuple[str | Placeholder, ...], index: int) -> tuple[str | Placeholder, str | Placeholder]:
    return (parts[index - 1] if index else "", parts[index + 1] if index + 1 < len(parts) else "")


def _is_special(parameter: ProjectParameter, secrets: Collection[str] = ()) -> bool:
    return parameter.option is not None or (parameter.is_several and parameter.name not in secrets)


def _words(
    parameter: ProjectParameter,
    part: Placeholder,
    values: Mapping[str, str],
    secrets: Collection[str],
    option: str | None,
) -> Iterator[str | Placeholder]:
    """Yields the text of a parameter's arguments, with placeholders for values."""
    text = values.get(parameter.name)
    if text is None:
        return
    if parameter.type == "bool" and parameter.option is not None and parameter.name not in secrets:
        yield from [parameter.option] if parse_bool(text) else []
    elif parameter.is_several and parameter.name not in secrets:
        items = [shlex.quote(each) for each in list_items(text)]
        if option and not parameter.words:
            items = [f"{option} {each}" for each in items]
        elif option and items:
            items.insert(0, option)
        yield from [" ".join(items)] if items else []
    else:
        yield from [f"{option} "] if option else []
        yield part


def command_values(entry_point: EntryPoint, values: Mapping[str, str]) -> dict[str, str]:
    """Returns the values for a template's placeholders: those of lists with a separator are joined by it."""
    separators = {name: each.separator for name, each in entry_point.parameters.items() if each.separator is not None}
    joined = {name: str(separators[name]).join(list_items(text)) for name, text in values.items() if name in separators}
    return {**values, **joined}
