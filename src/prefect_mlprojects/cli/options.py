"""The options that several commands share, with ``mlflow run``'s meanings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from prefect_mlprojects.runs.request import RunRequest


_F = TypeVar("_F", bound=Callable[..., Any])


def parse_parameters(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:  # noqa: ARG001 - click's signature
    """Parses ``-P name=value``; only the first ``=`` separates."""
    parsed: dict[str, str] = {}
    for text in values:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{text!r} has no value: write -P {name or 'name'}=VALUE.")
        if name in parsed:
            raise click.BadParameter(f"parameter {name!r} is given more than once.")
        parsed[name] = value
    return parsed


def parse_docker_args(
    context: click.Context,  # noqa: ARG001 - click's signature
    option: click.Parameter,  # noqa: ARG001 - click's signature
    values: tuple[str, ...],
) -> dict[str, str | bool]:
    """Parses ``-A name=value`` and the flag ``-A name``."""
    parsed: dict[str, str | bool] = {}
    for text in values:
        name, separator, value = text.partition("=")
        if not name:
            raise click.BadParameter(f"{text!r} has no name: write -A name=VALUE or -A name.")
        if name in parsed:
            raise click.BadParameter(f"the docker argument {name!r} is given more than once.")
        parsed[name] = value if separator else True
    return parsed


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


def parameters_option(help_text: str) -> Callable[[Any], Any]:
    """Returns the option ``-P name=value``, which may be repeated.

    Args:
        help_text: What the values are for.
    """
    return click.option(
        "-P",
        "--param-list",
        "parameters",
        multiple=True,
        metavar="NAME=VALUE",
        callback=parse_parameters,
        shell_complete=_complete_parameters,
        help=help_text,
    )


_CALL_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("uri", default=".", type=click.Path()),
    click.option(
        "-e",
        "--entry-point",
        default="main",
        metavar="NAME",
        show_default=True,
        shell_complete=_complete_entry_points,
        help="Entry point; one that the project does not declare runs the .py, .sh or .R file of that name.",
    ),
    click.option("-v", "--version", metavar="VERSION", help="Version of a git project: a branch, a tag or a commit."),
    parameters_option("A parameter; undeclared ones are appended to the command as --NAME VALUE. May be repeated."),
    click.option(
        "-A",
        "--docker-args",
        multiple=True,
        metavar="NAME[=VALUE]",
        callback=parse_docker_args,
        help="An argument for the container of a Docker project. May be repeated.",
    ),
    click.option(
        "--experiment-name",
        envvar="MLFLOW_EXPERIMENT_NAME",
        metavar="NAME",
        help="MLflow experiment by name; created when it is missing.",
    ),
    click.option("--experiment-id", envvar="MLFLOW_EXPERIMENT_ID", metavar="ID", help="MLflow experiment by id."),
    click.option("-b", "--backend", default="local", metavar="NAME", show_default=True, help="Where the command runs."),
    click.option(
        "-c",
        "--backend-config",
        metavar="FILE",
        help="The backend's configuration: a .json or .yaml file, a JSON text, or block-type/block-name.",
    ),
    click.option(
        "--env-manager",
        metavar="NAME",
        help="local, virtualenv, uv or conda; chosen by the project's files when not given.",
    ),
    click.option(
        "--storage-dir",
        envvar="MLFLOW_TMP_DIR",
        type=click.Path(),
        metavar="DIR",
        help="Where remote 'path' parameters are downloaded to.",
    ),
    click.option("--run-id", metavar="ID", help="MLflow run to go on with; a new one when not given."),
    click.option("--run-name", metavar="NAME", help="The MLflow run's name."),
    click.option("--build-image", is_flag=True, help="Build an image for a Docker project."),
    click.option(
        "--git-credentials",
        metavar="NAME",
        help="A git-credentials block; found by the repository's host when not given.",
    ),
    click.option(
        "--tracking", metavar="NAME", help="An mlflow-tracking-server block; MLFLOW_TRACKING_URI when not given."
    ),
    click.option("--timeout", type=float, metavar="SECONDS", help="End the command after so many seconds."),
    click.option(
        "--retries", type=int, default=0, metavar="N", show_default=True, help="How often a failed command is retried."
    ),
)


def call_options(function: _F) -> _F:
    """Gives a command the arguments and options that describe a call of a project."""
    for decorate in reversed(_CALL_OPTIONS):
        function = decorate(function)
    return function


def make_call_from_options(context: click.Context, options: Mapping[str, Any]) -> RunRequest:
    """Builds the call from a command's options.

    An experiment named on the command line wins over one named by an environment variable, which a surrounding
    project run sets.

    Raises:
        ParameterError: Options contradict each other.
        BackendError: The backend is unknown or its configuration is malformed.
    """
    from prefect_mlprojects.projects import make_call

    chosen = dict(options)
    if chosen.get("experiment_name") and chosen.get("experiment_id"):
        commandline = click.core.ParameterSource.COMMANDLINE
        by_name = context.get_parameter_source("experiment_name") is commandline
        by_id = context.get_parameter_source("experiment_id") is commandline
        if by_name != by_id:
            chosen["experiment_id" if by_name else "experiment_name"] = None
        elif not by_name:
            chosen["experiment_name"] = None
    return make_call(**chosen)
