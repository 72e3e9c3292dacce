"""What several commands share: run options with the names of ``mlflow run``, and the connection to the Prefect server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from prefect_mlprojects.cli.completion import (
    complete_blocks,
    complete_entry_points,
    complete_parameters,
    complete_runs,
    complete_values,
)
from prefect_mlprojects.cli.tables import pass_on
from prefect_mlprojects.request import CALL_OPTIONS, Entrance, RunOption, RunRequest, options_of

if TYPE_CHECKING:
    from prefect_mlprojects.request.check import RunSecrets

_F = TypeVar("_F", bound=Callable[..., Any])


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only list what would be removed.")

RUN = click.argument("run", metavar="RUN", shell_complete=complete_runs)
"""A run: an ID or its beginning, a link, a name, an MLflow run's ID, or ``last``."""


def print_json(value: Any) -> None:
    """Prints a value as JSON on stdout; dataclasses as objects, paths and times as text."""
    pass_on(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def connect() -> str:
    """Returns the Prefect API's address, made that of this process; call it before Prefect is imported."""
    from prefect_mlprojects.runs.start import configure_prefect
    from prefect_mlprojects.server.process import resolve_api

    api_url = resolve_api().api_url
    configure_prefect(api_url)
    return api_url


def split_pairs(flag: str, what: str, texts: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Splits each NAME=VALUE at its first ``=``; the value is None where it has none."""
    seen = set()
    for text in texts:
        name, separator, value = text.partition("=")
        if not name:
            raise click.BadParameter(f"{text!r} has no name: write {flag} NAME=VALUE.")
        if name in seen:
            raise click.BadParameter(f"{what} {name!r} is given more than once.")
        seen.add(name)
        yield name, value if separator else None


def parse_with(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Returns a click callback that parses an option's value; None stays None."""
    return lambda _context, _option, value: None if value is None else parse(value)


def parse_values(flag: str, what: str, texts: Iterable[str]) -> dict[str, str]:
    """Parses texts of the form NAME=VALUE."""
    parsed = {}
    for name, value in split_pairs(flag, what, texts):
        if value is None:
            raise click.BadParameter(f"{name!r} has no value: write {flag} {name}=VALUE.")
        parsed[name] = value
    return parsed


def _parse_docker_args(texts: tuple[str, ...]) -> dict[str, str | bool]:
    return {name: True if value is None else value for name, value in split_pairs("-A", "Docker argument", texts)}


def run_options(
    entrance: Entrance, *, read_environment: bool = False, without: tuple[str, ...] = ()
) -> Callable[[_F], _F]:
    """Returns a decorator that adds an entrance's run options; `read_environment` honours `mlflow run`'s variables."""

    def decorate(command: _F) -> _F:
        for option in reversed([each for each in options_of(entrance) if each.name not in without]):
            command = click_option(option, read_environment=read_environment)(command)
        return command

    return decorate


def click_option(option: RunOption, *, read_environment: bool = False, **overrides: Any) -> Callable[[_F], _F]:
    """Returns the command line option of a run option; the project's URI is an argument."""
    if not option.flags:
        return click.argument(option.name, default=".", type=click.Path())
    settings: dict[str, Any] = {"help": option.help, "default": option.default}
    if option.kind == "flag":
        settings["is_flag"] = True
    else:
        settings |= {"metavar": option.metavar, "type": {"integer": int, "number": float}.get(option.kind, str)}
        settings["show_default"] = option.default is not None
    if read_environment:
        settings["envvar"] = option.envvar
    if option.values is not None:
        settings["shell_complete"] = complete_values(option.values)
    settings |= _SPECIAL.get(option.name, {})
    if settings.get("multiple"):
        settings["help"] += " May be repeated."
    decorate: Callable[[_F], _F] = click.option(*option.flags, option.name, **{**settings, **overrides})
    return (lambda command: decorate(_params_file(command))) if option.name == "parameters" else decorate


def _read_params_file(context: click.Context, _option: click.Parameter, file: str | None) -> None:
    from prefect_mlprojects.spec.values_file import read_values

    context.meta[_PARAMS_FILE] = {} if file is None else read_values(file)


def _parse_parameters(context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    return {**context.meta.get(_PARAMS_FILE, {}), **parse_values("-P", "Parameter", texts)}


_PARAMS_FILE = f"{__name__}.params_file"
# Eager: it is read before -P, whose values take precedence, is parsed.
_params_file = click.option(
    "--params-file",
    metavar="FILE",
    type=click.Path(),
    is_eager=True,
    expose_value=False,
    callback=_read_params_file,
    help="YAML or JSON file with parameter values by name; those of -P take precedence.",
)


def given_options(context: click.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the run options that are on the command line."""
    commandline = click.core.ParameterSource.COMMANDLINE
    given = {name: value for name, value in options.items() if context.get_parameter_source(name) is commandline}
    # They may come from a file.
    return {**given, **({"parameters": options["parameters"]} if options.get("parameters") else {})}


_SPECIAL: dict[str, dict[str, Any]] = {
    "entry_point": {"shell_complete": complete_entry_points},
    "parameters": {
        "multiple": True,
        "callback": _parse_parameters,
        "shell_complete": complete_parameters,
    },
    "tracking": {"shell_complete": complete_blocks("mlflow-tracking-server")},
    "git_credentials": {"shell_complete": complete_blocks("git-credentials")},
    "docker_args": {"multiple": True, "callback": parse_with(_parse_docker_args)},
    "tags": {"multiple": True, "show_default": False},
}
TAGS = click_option(CALL_OPTIONS["tags"])


def request_from_options(context: click.Context, options: Mapping[str, Any]) -> tuple[RunRequest, RunSecrets]:
    """Checks a command's run options and returns the run request.

    An experiment on the command line takes precedence over one in an environment variable, which an enclosing run sets.
    """
    from prefect_mlprojects.runs.start import make_request

    chosen = dict(options)
    if chosen.get("experiment_name") and chosen.get("experiment_id"):
        commandline = click.core.ParameterSource.COMMANDLINE
        by_name = context.get_parameter_source("experiment_name") is commandline
        by_id = context.get_parameter_source("experiment_id") is commandline
        if by_name != by_id:
            chosen["experiment_id" if by_name else "experiment_name"] = None
        elif not by_name:
            chosen["experiment_name"] = None
    return make_request(chosen)
