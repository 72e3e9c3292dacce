"""What several commands share: run options with the names of ``mlflow run``, and the connection to the Prefect server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from prefect_mlprojects.request import Entrance, RunOption, RunRequest, options_of

if TYPE_CHECKING:
    from prefect_mlprojects.request.check import RunSecrets

_F = TypeVar("_F", bound=Callable[..., Any])


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


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


def _complete_entry_points(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's signature
    project = _project_of(context)
    return [name for name in project.entry_points if name.startswith(incomplete)] if project else []


def _complete_parameters(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's signature
    project = _project_of(context)
    entry_point = project.entry_points.get(str(context.params.get("entry_point") or "main")) if project else None
    if entry_point is None:
        return []
    return [f"{name}=" for name in entry_point.parameters if name.startswith(incomplete)]


def _project_of(context: click.Context) -> Any:
    from prefect_mlprojects.exceptions import ExecutionException
    from prefect_mlprojects.spec import load_project

    try:
        return load_project(str(context.params.get("uri") or ".").split("#", 1)[0])
    except ExecutionException:
        return None


def run_options(entrance: Entrance, *, read_environment: bool = False) -> Callable[[_F], _F]:
    """Returns a decorator that adds an entrance's run options; `read_environment` honours `mlflow run`'s variables."""

    def decorate(command: _F) -> _F:
        for option in reversed(options_of(entrance)):
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
        settings["shell_complete"] = _complete_values(option.values)
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


def _complete_values(values: Callable[[], tuple[str, ...]]) -> Callable[..., list[str]]:
    return lambda _context, _option, incomplete: [name for name in values() if name.startswith(incomplete)]


_SPECIAL: dict[str, dict[str, Any]] = {
    "entry_point": {"shell_complete": _complete_entry_points},
    "parameters": {
        "multiple": True,
        "callback": _parse_parameters,
        "shell_complete": _complete_parameters,
    },
    "docker_args": {"multiple": True, "callback": parse_with(_parse_docker_args)},
}


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


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: add `eval "$(mlprojects completion bash)"` to ~/.bashrc.
    """
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    from prefect_mlprojects.cli import group

    completion = {"bash": BashComplete, "fish": FishComplete, "zsh": ZshComplete}[shell]
    click.echo(completion(group, {}, "mlprojects", "_MLPROJECTS_COMPLETE").source())
